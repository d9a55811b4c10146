"""What is exported computes in plain transformers and PEFT what fedhpc computes."""

import ast
import re
import shutil
from dataclasses import replace
from pathlib import Path

import backbones
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_tasks import bert_like, gpt_like, llama_like, roberta_like
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from fedhpc.commands.export import write_adapter
from fedhpc.commands.export.forms import peft_files, peft_form
from fedhpc.commands.export.readme import EXAMPLE
from fedhpc.commands.predict import class_probabilities
from fedhpc.commands.trained import Trained
from fedhpc.data.prepared import PreparedData, tokenizer_fingerprint
from fedhpc.data.tasks import template_fields
from fedhpc.errors import ConfigError, ModelError, UserError
from fedhpc.model.backbone import Backbone
from fedhpc.model.pretrained import read_shape
from fedhpc.server.job import Job
from fedhpc.tuning import make_tuning
from fedhpc.tuning.base import as_parameters

PLAIN = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}


def make_trained(path, description, dtype="float32", quantization=None, **tuning):
    """A run of a backbone whose every tuned parameter is random, and large enough to matter."""
    model = {"dtype": dtype, "quantization": quantization}
    config = backbones.make_config(path, model=model, tuning={"head": description.head, **tuning})
    shape = read_shape(str(path))
    tuning = make_tuning(config.tuning, shape, num_classes=len(description.class_names))
    rng = torch.Generator().manual_seed(5)
    shapes = {**tuning.per_layer, **tuning.shared}
    return Trained(
        job=Job(
            config=config,
            data=PreparedData(Path("unused"), description),
            shape=shape,
            tuning=tuning,
            partition=None,
        ),
        device=None,
        rounds=1,
        tensors={key: 0.5 * torch.randn(size, generator=rng).numpy() for key, size in shapes.items()},
    )


def load_with_peft(form, path, folder, loader):
    """The adapter as another tool's user loads it."""
    folder.mkdir()
    for name, content in peft_files(form).items():
        (folder / name).write_bytes(content)
    return PeftModel.from_pretrained(loader.from_pretrained(path, dtype=torch.float32), folder).eval()


def plain_output(model, form, batch):
    positions = {}
    if form.first_position is not None:
        first, length = form.first_position, batch.input_ids.shape[1]
        positions = {"position_ids": torch.arange(first, first + length).expand_as(batch.input_ids)}
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **positions)


def expected_scores(trained, batch):
    config = trained.job.config
    backbone = Backbone(config.model, config.tuning, trained.job.data.description, torch.device("cpu"))
    with torch.no_grad():
        return trained.job.tuning.forward(backbone, [as_parameters(trained.tensors, torch.device("cpu"))], batch)


TUNINGS = [
    {"kind": "prompt"},
    {"kind": "prompt_tuning"},
    {"kind": "lora", "rank": 3, "alpha": 12.0},
    {"kind": "prompt", "position_offset": False},
    {"kind": "lora", "rank": 4, "targets": "all-linear", "rslora": True, "dropout": 0.5},
]
KINDS = [tuning["kind"] for tuning in TUNINGS[:3]]


@pytest.mark.parametrize("tuning", TUNINGS, ids=[*KINDS, "no offset", "all-linear"])
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama-gqa", "qwen3"])
def test_peft_gives_the_same_logits(tmp_path, name, tuning):
    path = backbones.save_backbone(tmp_path, name)
    trained, batch = make_trained(path, backbones.describe(name), **tuning), backbones.make_batch(name)
    form = peft_form(trained)
    model = load_with_peft(form, path, tmp_path / "adapter", PLAIN[backbones.kind_of(name)])
    if tuning["kind"] == "lora":
        assert form.config["use_rslora"] == tuning.get("rslora", False)
        assert form.config["lora_dropout"] == tuning.get("dropout", 0.0)
    logits = plain_output(model, form, batch).logits[range(3), batch.slots + form.output_offset]
    ours = expected_scores(trained, batch)
    assert torch.allclose(logits[:, [word for (word,) in backbones.WORDS]], ours, rtol=0, atol=1e-4)
    assert ours.std() > 0.3


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_what_was_added_to_the_frozen_weights_is_in_the_adapter(tmp_path, name, targets):
    path = backbones.save_backbone(tmp_path, name)
    trained, batch = (
        make_trained(path, backbones.describe(name), kind="lora", targets=targets),
        backbones.make_batch(name),
    )
    before, layout = expected_scores(trained, batch), trained.job.tuning.added_layout
    added = 0.1 * np.random.default_rng(0).normal(size=layout.size).astype(np.float32)
    trained.job.tuning.added = layout.views(added)
    form = peft_form(trained)
    model = load_with_peft(form, path, tmp_path / "adapter", PLAIN[backbones.kind_of(name)])
    logits = plain_output(model, form, batch).logits[range(3), batch.slots]
    ours = expected_scores(trained, batch)
    assert torch.allclose(logits[:, [word for (word,) in backbones.WORDS]], ours, rtol=0, atol=1e-4)
    assert (ours - before).abs().max() > 0.1


@pytest.mark.parametrize("tuning", TUNINGS[:3], ids=KINDS)
@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_peft_gives_the_hidden_states_of_a_linear_head(tmp_path, name, tuning):
    path = backbones.save_backbone(tmp_path, name)
    description = backbones.describe(name, words=[[]] * 3, head="linear")
    trained, batch = make_trained(path, description, **tuning), backbones.make_batch(name)
    form = peft_form(trained)
    model = load_with_peft(form, path, tmp_path / "adapter", AutoModel)
    hidden = plain_output(model, form, batch).last_hidden_state[:, form.output_offset :]
    mask = batch.attention_mask.unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    weight, bias = (torch.from_numpy(trained.tensors[f"head.{part}"]) for part in ("weight", "bias"))
    ours = expected_scores(trained, batch)
    assert torch.allclose(pooled @ weight.T + bias, ours, rtol=0, atol=1e-4)


ODD_TEXT = "a [MASK] {b} <mask> c"
"""With masks and a template's fields in it, which are not the template's."""
READMES = {
    "encoder, pairs": ("bert", bert_like, "{a} ? <mask> , {b}", {}),
    "encoder, tokens first": ("bert", bert_like, "<mask> : {a}", {"kind": "prompt_tuning"}),
    "encoder, no offset": ("roberta", roberta_like, "{a} . It was <mask> .", {"position_offset": False}),
    "encoder, head": ("bert", bert_like, "{a}<sep>{b}", {"head": "linear"}),
    "decoder": ("gpt2", gpt_like, "{a} It was {word} .", {"kind": "lora"}),
    "encoder, head, 16 bits": ("bert", bert_like, "{a}<sep>{b}", {"head": "linear", "dtype": "bfloat16"}),
    "decoder, 16 bits": ("gpt2", gpt_like, "{a} It was {word} .", {"kind": "lora", "dtype": "bfloat16"}),
    "decoder, no offset": ("gpt2", gpt_like, "{a} It was {word} .", {"position_offset": False}),
    "decoder, long words": ("gpt2", gpt_like, "{a} It was {word} .", {"long": True}),
    "decoder, long words, no offset": ("gpt2", gpt_like, "{a} {word} .", {"long": True, "position_offset": False}),
    "decoder, head, end token": ("llama", llama_like, "{a} {b}", {"head": "linear", "kind": "prompt_tuning"}),
}


@pytest.mark.parametrize("case", READMES)
def test_the_lines_of_the_readme_give_the_class_probabilities(tmp_path, monkeypatch, capfd, case):
    name, make_tokenizer, template, changes = READMES[case]
    tuning, tokenizer = dict(changes), make_tokenizer()
    path = backbones.save_backbone(tmp_path, name, vocab_size=len(tokenizer), pad_token_id=1)
    tokenizer.save_pretrained(path)
    head = tuning.pop("head", "verbalizer")
    words = backbones.LONG_WORDS if tuning.pop("long", False) else [[7], [4], [9]]
    words = [[token % len(tokenizer) for token in word] for word in words]
    description = replace(
        backbones.describe(name, words=[[]] * 3 if head == "linear" else words, head=head, longest=40),
        template=template,
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
    )
    trained = make_trained(path, description, **tuning)
    folder = tmp_path / "adapter"
    write_adapter(trained, folder)
    monkeypatch.chdir(folder)
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    exec(compile(snippet.replace(EXAMPLE, ODD_TEXT), "README.md", "exec"), {})
    found = ast.literal_eval(capfd.readouterr().out.splitlines()[-1])
    row = dict.fromkeys(template_fields(template), ODD_TEXT)
    (expected,) = class_probabilities(trained, [row])
    assert list(found) == description.class_names
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert expected.std() > 0.02


def test_attempt_takes_an_exported_prompt_as_a_source(tmp_path):
    path = backbones.save_backbone(tmp_path, "bert")
    trained = make_trained(path, backbones.describe("bert"), kind="prompt_tuning")
    load_with_peft(peft_form(trained), path, tmp_path / "adapter", AutoModelForMaskedLM)
    attempt = backbones.read_tuning(path, kind="attempt", sources=[str(tmp_path / "adapter")])
    assert torch.equal(attempt.sources[0], torch.from_numpy(trained.tensors["tokens"]))


@pytest.mark.parametrize("records_its_backbone", [True, False])
def test_attempt_refuses_a_prompt_of_another_backbone_of_the_same_width(tmp_path, records_its_backbone):
    path, other = (backbones.save_backbone(tmp_path / name, name) for name in ("bert", "roberta"))
    form = peft_form(make_trained(other, backbones.describe("roberta"), kind="prompt_tuning"))
    folder = tmp_path / "adapter"
    load_with_peft(form, other, folder, AutoModelForMaskedLM)
    if not records_its_backbone:  # as exports did before
        save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    attempt = {"kind": "attempt", "sources": [str(folder)]}
    with pytest.raises(ConfigError, match=f"adapter_model.safetensors was tuned on other weights than .* {path};"):
        backbones.read_tuning(path, **attempt)
    backbones.read_tuning(shutil.copytree(other, tmp_path / "moved"), **attempt)
    shutil.rmtree(other)
    if not records_its_backbone:
        backbones.read_tuning(path, **attempt)  # what it was tuned on cannot be told


@pytest.mark.parametrize(
    ("name", "changes", "tuning", "message"),
    [
        (
            "bert",
            {},
            {"kind": "bitfit"},
            "tuning.kind: bitfit cannot be exported: PEFT holds ffa_lora, lora, prompt, prompt_tuning",
        ),
        ("mistral", {"sliding_window": 15}, {}, "window of 15 positions, but texts and prompts have up to 16"),
    ],
)
def test_what_peft_would_compute_otherwise_is_refused(tmp_path, name, changes, tuning, message):
    path = backbones.save_backbone(tmp_path, name, **changes)
    with pytest.raises(UserError, match=message):
        peft_form(make_trained(path, backbones.describe(name), **tuning))


def test_a_model_that_ignores_past_keys_is_refused(tmp_path):
    path = tmp_path / "model"
    config = DistilBertConfig(vocab_size=101, dim=32, n_heads=4, n_layers=3, hidden_dim=48)
    DistilBertForMaskedLM(config).save_pretrained(path)
    with pytest.raises(ModelError, match="past_key_values, which a distilbert model does not take"):
        peft_form(make_trained(path, backbones.describe("bert")))
