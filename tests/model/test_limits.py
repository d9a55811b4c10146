"""How long a text may be, and of which tokens: what is accepted fits, and one token more would not."""

import json
import shutil
from dataclasses import replace

import backbones
import pytest
import torch
from states import SHAPE
from transformers import MptConfig, MptForCausalLM

from fedhpc.errors import ConfigError
from fedhpc.model.backbone import Backbone
from fedhpc.model.limits import check_lengths, most_tokens
from fedhpc.model.pretrained import read_shape
from fedhpc.tuning import make_tuning
from fedhpc.tuning.base import as_parameters

T = backbones.NUM_TOKENS
LONG = [[7, 12], [41], [7, 55, 3]]
"""Class words; two tokens of the longest stand behind a text."""
FLASH = {"attention": "flash_attention_2", "dtype": "bfloat16"}


def arguments(name, *, head="verbalizer", words=None, longest=12, max_length=1000, shape=None, model=None, **tuning):
    """Configuration, description and shape, as the functions of fedhpc.model.limits take them."""
    selection = {"strategy": "all"}
    config = backbones.make_config(name, model=model or {}, tuning={"head": head, **tuning}, selection=selection)
    data = backbones.describe(name, words=[[]] * 3 if head == "linear" else words, head=head, longest=longest)
    return config, replace(data, max_length=max_length), shape or replace(SHAPE, max_positions=64)


@pytest.mark.parametrize(
    ("name", "changes", "most"),
    [
        ("gpt2", {}, 64 - T),
        ("gpt2", {"head": "linear"}, 64 - T),
        ("gpt2", {"head": "linear", "kind": "lora"}, 64),
        ("gpt2", {"words": LONG}, 64 - T - 2),
        ("gpt2", {"words": LONG, "position_offset": False}, 64 - 2),
        ("gpt2", {"words": LONG, "kind": "late_prompt"}, 64 - T - 2),
        ("bert", {"head": "linear", "kind": "prompt_tuning"}, 64 - T),
        ("roberta", {}, 64 - 2 - T),  # its positions begin behind that of padding
    ],
)
def test_the_longest_text_takes_the_last_position(tmp_path, name, changes, most):
    folder = str(backbones.save_backbone(tmp_path, name))
    config, data, shape = arguments(name, **changes, shape=read_shape(folder))
    assert most_tokens(config, data, shape) == most
    tuning = make_tuning(config.tuning, shape, num_classes=3)
    model = config.model.model_copy(update={"name": folder})
    backbone = Backbone(model, config.tuning, data, torch.device("cpu"))
    params = as_parameters(tuning.initial(0), torch.device("cpu"))
    assert tuning.forward(backbone, [params], backbones.make_batch(name, (most, 4, 5))).isfinite().all()
    with pytest.raises((IndexError, RuntimeError), match=r"index .*out of "):
        tuning.forward(backbone, [params], backbones.make_batch(name, (most + 1, 4, 5)))


def test_positions_that_a_configuration_names_otherwise(tmp_path):
    model = MptForCausalLM(MptConfig(vocab_size=16, d_model=8, n_heads=2, n_layers=1, max_seq_len=16))
    model.save_pretrained(tmp_path)
    assert most_tokens(*arguments("gpt2", kind="lora", shape=read_shape(str(tmp_path)))) == 16
    assert model(input_ids=torch.ones(1, 16, dtype=torch.long)).logits.isfinite().all()
    with pytest.raises(RuntimeError, match="must match the size"):
        model(input_ids=torch.ones(1, 17, dtype=torch.long))


def test_no_text_is_longer_than_in_preparation():
    assert most_tokens(*arguments("gpt2", max_length=20)) == 20
    assert most_tokens(*arguments("gpt2", shape=SHAPE)) == 1000  # no positions of its own


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 1000),  # the mask of every layer knows the window
        ({"model": FLASH}, 16 - T),
        ({"model": FLASH, "kind": "lora"}, 16),
        ({"words": LONG}, 16 - T - 2),
        ({"words": LONG, "kind": "lora"}, 16 - 2),
        ({"kind": "late_prompt"}, 16 - T),
    ],
)
def test_texts_and_what_stands_beside_them_are_within_a_window_that_masks_do_not_know(changes, most):
    shape = replace(SHAPE, sliding_window=16)
    assert most_tokens(*arguments("llama", **changes, shape=shape)) == most
    check_lengths(*arguments("llama", **changes, longest=most, shape=shape))
    if most < 1000:
        with pytest.raises(ConfigError, match=r"attends to 16 positions at a time, and .* cannot handle more, but 17"):
            check_lengths(*arguments("llama", **changes, longest=most + 1, shape=shape))


def test_class_words_of_several_tokens_need_the_window_behind_the_text_too(tmp_path):
    path = backbones.save_backbone(tmp_path, "mistral", sliding_window=16)
    most = most_tokens(*arguments("mistral", words=LONG, kind="lora", shape=read_shape(str(path))))
    backbone, plain = backbones.load_backbone(path, "mistral", words=LONG), backbones.load_plain(path, "mistral")

    def differs(length):
        batch = backbones.make_batch("mistral", (length,))
        scores = []
        for word in LONG:
            ids = torch.cat([batch.input_ids, torch.tensor([word])], dim=1)
            found = plain(input_ids=ids).logits[0, length - 1 : -1].log_softmax(-1)
            scores.append(found[range(len(word)), word].mean())
        return not torch.allclose(backbone.word_scores(batch)[0].double(), torch.stack(scores), atol=1e-3)

    assert (differs(most), differs(most + 1)) == (False, True)


def test_a_refusal_says_what_would_do():
    with pytest.raises(ConfigError) as caught:
        check_lengths(*arguments("gpt2", words=LONG, longest=63))
    assert str(caught.value) == (
        "model.name: gpt2 has 64 positions, but 69 are needed: texts have up to 63 tokens, prompts 4, class words 2 "
        "behind the text; prepare the data with --max-length 58, or use a smaller tuning.num_tokens, or set "
        "tuning.position_offset: false"
    )


FLASH_LATE = {
    "tuning__kind": "late_prompt",
    "selection": {},
    **{f"model__{key}": value for key, value in FLASH.items()},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning__num_tokens": 60}, "has 64 positions, but 73 are needed: texts have up to 13 tokens, prompts 60"),
        (FLASH_LATE, "model.attention: flash_attention_2 takes no tuning.kind: late_prompt; use model.attention: sdpa"),
    ],
)
def test_plan_refuses_what_a_run_would(fedhpc, run_config, changes, message):
    for command in (["plan", run_config(**changes), "--ranks", 2], ["run", run_config(**changes)]):
        status, _, err = fedhpc(*command)
        assert (status, message in err) == (2, True), err


def test_a_model_that_does_not_know_the_prepared_tokens_is_refused(fedhpc, world, run_config, tmp_path):
    """It has the same tokenizer, but its embeddings were not resized."""
    model = tmp_path / "model"
    shutil.copytree(world.parent / "backbone", model)
    config = json.loads((model / "config.json").read_text())
    for rows, message in ((20, "split train of "), (12, "class word 'okay' of "), (1, "padding of ")):
        (model / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
        status, _, err = fedhpc("plan", run_config(model={"name": str(model)}), "--ranks", 2)
        assert status == 2
        assert message in err
        assert f"has no row in the embeddings: the model knows {rows} tokens" in err
