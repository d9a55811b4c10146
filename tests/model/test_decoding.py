"""Answers are those of PEFT's own `generate` on the exported adapter, token by token."""

import json

import architectures
import numpy as np
import pytest
import torch
from backbones import VOCABULARY, load_backbone, load_plain, read_tuning, save_backbone
from peft import PeftModel
from safetensors.numpy import save_file
from torch.nn import functional

from fedhpc.data.prepared import Split
from fedhpc.model.decoding import Choice, Decoding, decode
from fedhpc.tuning.base import as_parameters

NAMES = ("llama-gqa", "gpt2", "qwen3")
LENGTHS = (9, 4, 12, 7)
GREEDY = Decoding(max_new_tokens=12, temperature=0.0, top_p=1.0, ends=(3,), pad_id=1, seed=0)
KINDS = {"prompt": {}, "lora": {"rank": 3, "alpha": 12.0}, "prompt_tuning": {}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoding")
    for name in NAMES:
        save_backbone(folder, name)
    return folder


def prompts(openings=None):
    """Prompts of several lengths; those of ``openings`` tokens go on with an answer that is over."""
    rng = np.random.default_rng(4)
    offsets = np.cumsum([0, *LENGTHS])
    spans = []
    for start, length, opening in zip(offsets, LENGTHS, openings or LENGTHS, strict=False):
        spans += [start + opening, start + length] if opening < length else []
    return Split(
        tokens=rng.integers(4, VOCABULARY, offsets[-1], dtype=np.int32),
        offsets=offsets,
        labels=np.zeros(len(LENGTHS), np.int32),
        slots=np.array(LENGTHS, np.int32) - 1,
        pad_id=1,
        spans=np.array(spans, np.int64),
    )


def random_tensors(tuning, seed=5, scale=0.5):
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(size).astype(np.float32) for name, size in tuning.shapes.items()}


def answers(backbone, tuning, tensors, split, examples, how=GREEDY, sizes=None):
    """Our own answers to prompts that pass together, those of each device with its tensors."""
    batch = split.batch(examples, sizes)
    with torch.no_grad():
        overlay = tuning.overlay(backbone, [as_parameters(own, CPU) for own in tensors], batch, None)
        return decode(backbone, overlay, batch, how, examples)


def with_peft(folder, name, kind, tensors, tuning):
    """The exported adapter on the model, as another tool's user has it."""
    adapter = folder / f"{name}-{kind}"
    adapter.mkdir()
    plain = load_plain(folder / name, name, torch.float32)
    form = tuning.to_peft(tensors, plain, longest=max(LENGTHS))
    save_file(
        {key: np.ascontiguousarray(value) for key, value in form.tensors.items()}, adapter / "adapter_model.safetensors"
    )
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder / name), "inference_mode": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config | form.config))
    return PeftModel.from_pretrained(plain, adapter).eval()


def of_peft(model, split, examples):
    """PEFT's greedy answers to prompts that are padded on the left."""
    rows = [split.tokens[split.offsets[i] : split.offsets[i + 1]].tolist() for i in examples]
    longest = max(map(len, rows))
    ids = torch.tensor([[1] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=GREEDY.max_new_tokens,
        do_sample=False,
        eos_token_id=3,
        pad_token_id=1,
    )
    return [until_end(row) for row in found[:, longest:].tolist()]


def until_end(tokens):
    return tokens[: tokens.index(3)] if 3 in tokens else tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_are_those_of_peft(folder, name, kind):
    tuning = read_tuning(folder / name, kind=kind, head="language_model", **KINDS[kind])
    tensors = random_tensors(tuning)
    backbone = load_backbone(folder / name, name, kind=kind, head="language_model", dtype="float32")
    model, split, everything = with_peft(folder, name, kind, tensors, tuning), prompts(), range(len(LENGTHS))
    alone = [of_peft(model, split, [i])[0] for i in everything]
    assert len({tuple(answer) for answer in alone}) == len(LENGTHS)
    assert answers(backbone, tuning, [tensors], split, everything) == alone
    assert [answers(backbone, tuning, [tensors], split, [i])[0] for i in everything] == alone
    if kind != "prompt_tuning":  # with padding between its tokens and the text, PEFT numbers positions otherwise
        assert of_peft(model, split, everything) == alone


def taught(split, found):
    """Prompts that go on with the answers that were found, which are what is trained."""
    rows, spans, start = [], [], 0
    for i, own in enumerate(found):
        prompt = split.tokens[split.offsets[i] : split.offsets[i + 1]].tolist()
        answer = own + [3] * (len(own) < GREEDY.max_new_tokens)
        earlier = split.spans_of(i).ravel()
        spans += [*(start + earlier), start + len(prompt), start + len(prompt) + len(answer)]
        rows.append(prompt + answer)
        start += len(rows[-1])
    return Split(
        tokens=np.concatenate(rows).astype(np.int32),
        offsets=np.cumsum([0, *map(len, rows)]),
        labels=split.labels,
        slots=np.array([len(row) - 1 for row in rows], np.int32),
        pad_id=1,
        spans=np.array(spans, np.int64),
    )


def check_as_in_training(path, name, kind):
    """Every token of the answers is what the forward pass of training finds likeliest behind all before it.

    Whether the tuning makes a difference to the answers.
    """
    tuning = read_tuning(path, kind=kind, head="language_model")
    backbone = load_backbone(path, name, kind=kind, head="language_model", dtype="float32", longest=24)
    tensors = [random_tensors(tuning, seed, 0.2) for seed in range(2 if tuning.packable else 1)]
    split, everything = prompts(openings=(5, 4, 12, 3)), range(len(LENGTHS))
    sizes = (1, 3) if tuning.packable else (4,)
    found = answers(backbone, tuning, tensors, split, everything, sizes=sizes)
    batch = taught(split, found).batch(everything, sizes)
    with torch.no_grad():
        overlay = tuning.overlay(backbone, [as_parameters(own, CPU) for own in tensors], batch, None)
        _, right = backbone.token_scores(batch, overlay)
    assert right[batch.targets.columns + 1 >= torch.tensor(LENGTHS)[batch.targets.texts]].all()
    zeros = [random_tensors(tuning, scale=0.0)] * len(tensors)
    return answers(backbone, tuning, zeros, split, everything, sizes=sizes) != found


@pytest.mark.parametrize(
    "kind", ["prompt", "lora", "adapter", "prompt_tuning", "late_prompt", "instance_prompt", "bitfit", "full"]
)
def test_answers_are_decoded_as_it_was_trained(folder, kind):
    assert check_as_in_training(folder / "gpt2", "gpt2", kind)


@pytest.mark.parametrize("kind", ["prompt", "prompt_tuning"])
@pytest.mark.parametrize("name", architectures.DECODERS)
def test_every_architecture_decodes_as_it_was_trained(tmp_path, name, kind):
    """Sliding windows, shorter than text and answer together, among them."""
    check_as_in_training(architectures.save_architecture(tmp_path / "model", name, VOCABULARY), name, kind)


def test_what_is_drawn_depends_on_seed_and_example_alone(folder):
    name = "llama-gqa"
    tuning = read_tuning(folder / name, kind="lora", head="language_model")
    backbone = load_backbone(folder / name, name, kind="lora", head="language_model", dtype="float32")
    tensors, split = [random_tensors(tuning)], prompts()
    warm = {"max_new_tokens": 12, "temperature": 2.0, "ends": (3,), "pad_id": 1}
    how = Decoding(**warm, top_p=0.9, seed=0)
    together = answers(backbone, tuning, tensors, split, [0, 1, 2, 3], how)
    assert [answers(backbone, tuning, tensors, split, [i], how)[0] for i in (3, 2, 1, 0)] == together[::-1]
    assert answers(backbone, tuning, tensors, split, [0, 1, 2, 3], Decoding(**warm, top_p=0.9, seed=1)) != together
    narrow = Decoding(**warm, top_p=1e-9, seed=0)
    assert answers(backbone, tuning, tensors, split, [0, 1, 2, 3], narrow) == answers(
        backbone, tuning, tensors, split, [0, 1, 2, 3]
    )


def test_draws_follow_the_probabilities():
    scores = torch.tensor([[1.0, 3.0, 2.0, -1.0]]).expand(4000, -1)
    how = Decoding(max_new_tokens=1, temperature=2.0, top_p=0.8, ends=(), pad_id=0, seed=0)
    rngs = [np.random.default_rng(i) for i in range(4000)]
    chosen = Choice(how, rngs, lambda: None)(torch.zeros(4000, 0), scores).argmax(1)
    wanted = functional.softmax(scores[0] / 2, dim=0)
    kept = wanted * torch.tensor([0, 1, 1, 0]) if wanted[1:3].sum() >= 0.8 else wanted * torch.tensor([1, 1, 1, 0])
    shares = torch.bincount(chosen, minlength=4) / 4000
    assert torch.allclose(shares, kept / kept.sum(), atol=0.03)
    assert shares[3] == 0


def test_next_to_no_temperature_is_that_of_the_likeliest_token():
    scores = torch.tensor([[1.0, 3.0, -torch.inf, 2.0]])
    how = Decoding(max_new_tokens=1, temperature=5e-324, top_p=1.0, ends=(), pad_id=0, seed=0)
    assert Choice(how, [np.random.default_rng(0)], lambda: None)(torch.zeros(1, 0), scores).argmax(1) == 1
