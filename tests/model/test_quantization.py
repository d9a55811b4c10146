"""Frozen weights in four and eight bits: what is refused without the package, and what is computed with it."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from backbones import describe, load_backbone, load_plain, make_batch, read_tuning, save_backbone
from test_export import load_with_peft, make_trained, plain_output
from test_tasks import gpt_like
from tiny import final_tensors, metrics
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedhpc.commands.export import write_adapter
from fedhpc.commands.export.forms import peft_form
from fedhpc.config.sections import ModelConfig
from fedhpc.data.prepared import tokenizer_fingerprint
from fedhpc.errors import ModelError
from fedhpc.model import quantization
from fedhpc.model.quantization import keep_layout, quantization_arguments, saved_bytes
from fedhpc.tuning.base import as_parameters

CPU = torch.device("cpu")
KINDS = ("nf4", "int8")
installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantization")


@pytest.fixture(scope="module")
def llama(folder):
    return save_backbone(folder, "llama-gqa")


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_a_package_that_is_missing_is_named(llama, monkeypatch, package):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ModelError, match=f"model.quantization: nf4 needs the package {package}: pip install {package}"):
        load_backbone(llama, "llama-gqa", quantization="nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_it_does_not_run_on_is_named(llama, monkeypatch, kind):
    def refuse(*_, **__):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    modules = SimpleNamespace(Linear4bit=refuse, Linear8bitLt=refuse)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(nn=modules))
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", modules)
    message = f"model.quantization: {kind}: bitsandbytes does not run on cpu here: no kernel image is available; leave"
    with pytest.raises(ModelError, match=message):
        load_backbone(llama, "llama-gqa", quantization=kind)


def test_without_the_key_nothing_is_asked_for():
    assert quantization_arguments(ModelConfig(name="-"), CPU) == {}


@installed
@pytest.mark.parametrize("name", ["llama-gqa", "bert", "gpt2"])
def test_four_bits_compute_what_their_numbers_say(folder, name):
    """Scores and gradients are those of a plain model with the dequantized weights, also after an evaluation."""
    path = save_backbone(folder / "four", name)
    backbone, tuning = (
        load_backbone(path, name, quantization="nf4"),
        read_tuning(path, kind="lora", targets="all-linear"),
    )
    plain, batch = load_backbone(path, name), make_batch(name)
    own = dict(plain.model.named_modules())
    for module_path, weight in dequantized_nf4(backbone.model).items():
        with torch.no_grad():
            own[module_path].weight.copy_(weight.T if isinstance(own[module_path], Conv1D) else weight)
    results = []
    for each in (backbone, plain):
        with torch.no_grad():
            each.word_scores(batch)  # after which weights could lie otherwise
        params = {key: torch.from_numpy(tensor).requires_grad_() for key, tensor in tuning.initial(1).items()}
        loss = tuning.loss_terms(each, [params], batch).sum()
        results.append((loss.detach(), *each.gradients(loss, list(params.values()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    untouched = load_backbone(path, name).word_scores(batch)
    assert (untouched - plain.word_scores(batch)).abs().max() > 0.05


def dequantized_nf4(model):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    found = {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    return {path: dequantize_4bit(each.weight.data, each.weight.quant_state) for path, each in found.items()}


@installed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_eight_bits_are_near_the_plain_model_and_pass_gradients_on(llama, dtype):
    backbone, batch = load_backbone(llama, "llama-gqa", quantization="int8", dtype=dtype), make_batch("llama-gqa")
    tuning = read_tuning(llama, kind="lora", targets="all-linear")
    tuning.check_on(backbone)
    plain = load_plain(llama, "llama-gqa").float()
    logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    scores = logits[torch.arange(3), batch.slots][:, [7, 41, 90]]
    assert (backbone.word_scores(batch).float() - scores).abs().max() < 0.15 * scores.std()


@installed
@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.5625 / 2), ("int8", 1 / 2)])
def test_the_plan_counts_the_bytes_of_quantized_weights(llama, kind, share):
    plain, quantized = (load_backbone(llama, "llama-gqa", dtype="bfloat16", quantization=q) for q in (None, kind))
    in_linears = sum(p.nbytes for path, p in plain.base.named_parameters() if "_proj." in path)
    assert saved_bytes(plain, kind) == pytest.approx((1 - share) * in_linears)
    held = [sum(p.nbytes for path, p in each.base.named_parameters()) for each in (plain, quantized)]
    scales = in_linears / 2 / 64 * 4 if kind == "nf4" else 0  # which are no parameters
    assert held[0] - held[1] - scales == pytest.approx(saved_bytes(plain, kind))


@installed
def test_an_adapter_of_a_quantized_model_computes_the_same_in_peft(llama, tmp_path):
    trained = make_trained(llama, describe("llama-gqa"), quantization="nf4", kind="lora", targets="all-linear", rank=3)
    config, batch = trained.job.config, make_batch("llama-gqa")
    loading = quantization_arguments(config.model, CPU)

    class Loader:
        """The quantized model."""

        @staticmethod
        def from_pretrained(path, dtype):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **loading)
            keep_layout(model)  # the other one needs widths that are multiples of 64
            return model

    form = peft_form(trained)
    model = load_with_peft(form, llama, tmp_path / "adapter", Loader)
    logits = plain_output(model, form, batch).logits[range(3), batch.slots]
    backbone = load_backbone(llama, "llama-gqa", quantization="nf4")
    with torch.no_grad():
        ours = trained.job.tuning.forward(backbone, [as_parameters(trained.tensors, CPU)], batch)
    torch.testing.assert_close(logits[:, [7, 41, 90]], ours, rtol=0, atol=1e-4)


def test_the_readme_of_an_adapter_loads_the_model_in_the_same_bits(folder, tmp_path):
    tokenizer = gpt_like()
    path = save_backbone(folder / "readme", "gpt2", vocab_size=len(tokenizer), pad_token_id=1)
    tokenizer.save_pretrained(path)
    description = replace(
        describe("gpt2", words=[[2], [4], [9]], longest=40),
        template="{a} It was {word} .",
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
    )
    write_adapter(make_trained(path, description, quantization="nf4", kind="lora"), tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    options = "load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype='float32'"
    assert f"dtype=torch.float32, quantization_config=BitsAndBytesConfig({options}))" in text
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig" in text


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_quantized_weights_learns_and_gives_the_same_bits(run_config, fedhpc, kind):
    configs = [
        run_config(run, model__quantization=kind, tuning={"kind": "lora"}, device__pack=pack, federation__rounds=2)
        for run, pack in (("one", 2), ("two", 2))
    ]
    for config in configs:
        assert fedhpc("run", config)[0] == 0
    one, two = map(final_tensors, configs)
    assert one == two
    losses = [record["loss"] for record in metrics(configs[0])]
    assert losses[1] < losses[0]
