"""What is exported computes in plain transformers and PEFT what fedhpc computes."""

from pathlib import Path

import backbones
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from fedhpc.data import PreparedData
from fedhpc.export.forms import peft_form
from fedhpc.job import Job
from fedhpc.models import read_shape
from fedhpc.trained import Trained
from fedhpc.tuning.base import as_parameters

PLAIN = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}


def make_trained(path, name, *, head="verbalizer", longest=12, **tuning):
    """A run of a backbone whose every tuned parameter is random, and large enough to matter."""
    config = backbones.make_config(path, tuning={"head": head, **tuning})
    description = backbones.describe(
        name, words=[[] for _ in backbones.WORDS] if head == "linear" else None, head=head, longest=longest
    )
    tensors = backbones.read_tuning(path, **config.tuning.model_dump(exclude={"num_tokens"})).initial(0)
    rng = torch.Generator().manual_seed(5)
    tensors = {key: 0.5 * torch.randn(tensor.shape, generator=rng).numpy() for key, tensor in tensors.items()}
    return Trained(
        job=Job(
            config=config,
            data=PreparedData(Path("unused"), description),
            shape=read_shape(str(path)),
            tuning=backbones.read_tuning(path, **config.tuning.model_dump(exclude={"num_tokens"})),
            partition=None,
        ),
        device=None,
        rounds=1,
        tensors=tensors,
    )


def load_with_peft(form, path, folder, loader):
    """The adapter as another tool's user loads it."""
    folder.mkdir()
    for name, content in form.files.items():
        (folder / name).write_bytes(content)
    return PeftModel.from_pretrained(loader.from_pretrained(path, dtype=torch.float32), folder).eval()


def plain_output(model, form, batch):
    positions = {}
    if form.first_position is not None:
        first, length = form.first_position, batch.input_ids.shape[1]
        positions = {"position_ids": torch.arange(first, first + length).expand_as(batch.input_ids)}
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **positions)


def expected_scores(trained, path, name, batch):
    head = trained.job.config.tuning.head
    backbone = backbones.load_backbone(path, name, head=head)
    with torch.no_grad():
        return trained.job.tuning.forward(backbone, [as_parameters(trained.tensors, batch.input_ids.device)], batch)


TUNINGS = [{"kind": "prompt"}, {"kind": "prompt_tuning"}, {"kind": "lora", "rank": 3, "alpha": 12.0}, {"kind": "prompt", "position_offset": False}]


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: "-".join(map(str, tuning.values())))
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama-gqa", "qwen3"])
def test_peft_gives_the_same_logits(tmp_path, name, tuning):
    path = backbones.save_backbone(tmp_path, name)
    trained, batch = make_trained(path, name, **tuning), backbones.make_batch(name)
    form = peft_form(trained)
    model = load_with_peft(form, path, tmp_path / "adapter", PLAIN[backbones.kind_of(name)])
    logits = plain_output(model, form, batch).logits[range(3), batch.slots + form.output_offset]
    ours = expected_scores(trained, path, name, batch)
    assert torch.allclose(logits[:, [word for (word,) in backbones.WORDS]], ours, rtol=0, atol=1e-4)
    assert ours.std() > 0.3


@pytest.mark.parametrize("tuning", TUNINGS[:3], ids=lambda tuning: tuning["kind"])
@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_peft_gives_the_hidden_states_of_a_linear_head(tmp_path, name, tuning):
    path = backbones.save_backbone(tmp_path, name)
    trained, batch = make_trained(path, name, head="linear", **tuning), backbones.make_batch(name)
    form = peft_form(trained)
    model = load_with_peft(form, path, tmp_path / "adapter", AutoModel)
    hidden = plain_output(model, form, batch).last_hidden_state[:, form.output_offset :]
    mask = batch.attention_mask.unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    weight, bias = (torch.from_numpy(trained.tensors[f"head.{part}"]) for part in ("weight", "bias"))
    ours = expected_scores(trained, path, name, batch)
    assert torch.allclose(pooled @ weight.T + bias, ours, rtol=0, atol=1e-4)
