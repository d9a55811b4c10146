"""`predict` gives, on every architecture that the documentation names, what plain transformers and PEFT give."""

from contextlib import suppress
from dataclasses import replace

import architectures
import numpy as np
import pytest
import tiny
import torch
from backbones import NUM_TOKENS, VOCABULARY, describe
from safetensors.torch import save_file
from test_export import load_with_peft, make_trained
from test_tasks import gpt_like
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from fedhpc.commands.export.forms import peft_form
from fedhpc.commands.predict import class_probabilities
from fedhpc.config import section_of
from fedhpc.config.sections import ModelConfig
from fedhpc.data.prepared import tokenizer_fingerprint
from fedhpc.errors import ModelError, UserError
from fedhpc.model.backbone import Backbone
from fedhpc.model.pretrained import load_tokenizer, read_shape
from fedhpc.registry import TUNINGS as ALL_TUNINGS
from fedhpc.tuning import make_tuning

NO_LAYER_NUMBERS = "does not take it: its attention modules do not say which layer they are in; choose another"
NO_NOTICE = "takes no notice of (it|prompts in any layer)"
NO_CACHE = "past_key_values, which a .* model does not take"
OTHER_LAYERS = "a modernbert model has layers of several kinds"
REFUSED = {
    ("distilbert", "prompt"): NO_LAYER_NUMBERS,
    ("nomic-bert", "prompt"): NO_LAYER_NUMBERS,
    ("falcon", "prompt"): NO_NOTICE,
    ("falcon, alibi", "prompt"): f"{NO_NOTICE}|a falcon model cannot score class words of several tokens; choose words",
    ("stablelm", "prompt"): NO_NOTICE,
    ("eurobert", "prompt"): NO_CACHE,
    ("modernbert", "prompt"): NO_CACHE,
    ("modernbert", "lora"): OTHER_LAYERS,
    ("albert", "prompt"): NO_LAYER_NUMBERS,
    ("albert", "lora"): "a albert model has no layers that can be told apart",
}
"""What is said of an architecture and a tuning instead."""
TUNINGS = {
    "prompt": {"kind": "prompt"},
    "prompt_tuning": {"kind": "prompt_tuning"},
    "lora": {"kind": "lora", "rank": 3, "alpha": 3.0},
}
TEMPLATES = {"encoder": "{a} It was <mask> .", "decoder": "{a} It was {word} ."}
WORDS = {"one token": [[7], [14], [19]], "several tokens": [[7, 12], [14], [7, 20, 3]], "linear head": [[], [], []]}


def compare(folder, name, words, tuning, *, max_length, lengths):
    """Largest difference of two probabilities, for texts of so many words."""
    kind = "encoder" if name in architectures.ENCODERS else "decoder"
    path = architectures.save_architecture(folder / "model", name, vocab_size=320)
    # Transformers makes a byte-level tokenizer of whatever a Qwen2 comes with.
    (gpt_like if name == "qwen2" else tiny.word_tokenizer)().save_pretrained(path)
    tokenizer = load_tokenizer(str(path))
    head = "linear" if words == "linear head" else "verbalizer"
    description = replace(
        describe(name, words=WORDS[words], head=head, longest=max_length),
        kind=kind,
        template="{a}" if head == "linear" else TEMPLATES[kind],
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
    )
    trained = make_trained(path, description, **tuning)
    rng = np.random.default_rng(1)
    rows = [{"a": " ".join(rng.choice(["the", "place", "dull", "calm", "fine", "usual"], n))} for n in lengths]
    ours = class_probabilities(trained, rows)
    form = peft_form(trained)
    loader = AutoModel if head == "linear" else AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM
    model = load_with_peft(form, path, folder / "adapter", loader)
    theirs = [plain_scores(model, form, trained, *trained.text_encoder()([row])[0][:2]).softmax(0) for row in rows]
    assert ours.std(axis=1).min() > 1e-3
    return np.abs(torch.stack(theirs).numpy() - ours).max()


@torch.no_grad()
def plain_scores(model, form, trained, ids, slot):
    """Class scores [C] of one text, as the adapter's README.md computes them."""
    words = trained.job.data.description.word_ids

    def output(ids):
        ids = torch.tensor(ids)[None]
        if form.first_position is None:
            return model(ids)
        return model(ids, position_ids=torch.arange(form.first_position, form.first_position + ids.shape[1])[None])

    if not words[0]:
        hidden = output(ids).last_hidden_state[0, form.output_offset :].mean(0)
        return torch.from_numpy(trained.tensors["head.weight"]) @ hidden + torch.from_numpy(
            trained.tensors["head.bias"]
        )
    if all(len(word) == 1 for word in words):
        return output(ids).logits[0, slot + form.output_offset, [word[0] for word in words]]
    each = [output([*ids, *word][:-1]).logits[0, -len(word) :].log_softmax(-1) for word in words]
    return torch.stack([of[range(len(word)), word].mean() for of, word in zip(each, words, strict=True)])


EVERY = set(ALL_TUNINGS)
TOKENS = {"prompt_tuning", "instance_prompt", "attempt"}
WITHOUT = {
    "bitfit": [
        "eurobert",
        "llama",
        "mistral",
        "qwen3",
        "gemma",
        "gemma3",
        "phi3",
        "olmo2",
        "granite",
        "smollm3",
        "cohere",
    ],
    "prompt": ["distilbert", "nomic-bert", "falcon", "falcon, alibi", "stablelm"],
    "late_prompt": ["distilbert", "nomic-bert", "falcon", "falcon, alibi", "stablelm"],
}
"""Of the table in docs/configuration.md."""
TAKES = {
    "albert": TOKENS,
    "modernbert": TOKENS | {"prompt", "late_prompt"},
    "mixtral": EVERY - {"adapter", "bitfit"},
    "cohere2": EVERY - {"bitfit"},
}
ALIKE = ("xlm-roberta", "camembert", "gemma3, soft cap")
"""As others that are tried, for the tests' time."""
NAMES = [name for name in (*architectures.ENCODERS, *architectures.DECODERS) if name not in ALIKE]


@pytest.mark.parametrize("name", NAMES)
def test_which_tunings_an_architecture_takes(tmp_path, name):
    path = str(architectures.save_architecture(tmp_path / "model", name, VOCABULARY))
    width = read_shape(path).embedding_width
    save_file({"prompt_embeddings": torch.ones(NUM_TOKENS, width)}, tmp_path / "adapter_model.safetensors")
    kind, taken = "encoder" if name in architectures.ENCODERS else "decoder", set()
    config = section_of(ALL_TUNINGS, num_tokens=NUM_TOKENS, bottleneck=5, sources=[str(tmp_path)])
    backbone = Backbone(ModelConfig(name=path), config, replace(describe("gpt2"), kind=kind), torch.device("cpu"))
    for tuning in ALL_TUNINGS:
        with suppress(ModelError):
            make_tuning(config.model_copy(update={"kind": tuning}), read_shape(path), num_classes=3).check_on(backbone)
            taken.add(tuning)
    assert taken == TAKES.get(name, EVERY - {tuning for tuning, names in WITHOUT.items() if name in names})


NEAR, FAR = {"max_length": 14, "lengths": (1, 2, 7, 30)}, {"max_length": 40, "lengths": (1, 19, 20, 21, 35, 60)}
CASES = [("one token", "prompt_tuning", FAR), ("several tokens", "prompt", NEAR), ("linear head", "lora", FAR)]


@pytest.mark.parametrize(("words", "tuning", "texts"), CASES, ids=[f"{words}-{tuning}" for words, tuning, _ in CASES])
@pytest.mark.parametrize("name", NAMES)
def test_predict_gives_what_plain_transformers_and_peft_give(tmp_path, name, words, tuning, texts):
    """Texts of one token and up to beyond a sliding window of 20, or cut before it."""
    if words == "several tokens" and name in architectures.ENCODERS:
        words = "one token"
    if message := REFUSED.get((name, tuning)):
        with pytest.raises(UserError, match=message):
            compare(tmp_path, name, words, TUNINGS[tuning], **texts)
        return
    assert compare(tmp_path, name, words, TUNINGS[tuning], **texts) < 1e-4
