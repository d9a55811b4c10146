"""The frozen weights of a backbone's linear modules in four or eight bits, by bitsandbytes.

QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers, Pagnoni, Holtzman, Zettlemoyer. NeurIPS 2023.
https://arxiv.org/abs/2305.14314: `nf4`, without double quantization. LLM.int8(): 8-bit Matrix Multiplication for
Transformers at Scale. Dettmers, Lewis, Belkada, Zettlemoyer. NeurIPS 2022. https://arxiv.org/abs/2208.07339: `int8`,
which also rounds what enters a module, to eight bits a row.
"""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fedhpc.config.sections import ModelConfig
from fedhpc.errors import ModelError, first_line
from fedhpc.model.numbers import NOT_TAKEN

BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
"""Of a weight; in four bits, every 64 have a float32 scale."""
PROBE_WIDTH = 64


def saved_bytes(model: nn.Module, kind: str) -> float:
    """Bytes by which a model's weights become fewer: those of its layers' linear modules are quantized."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    linears = [part for layer in layers for part in layer.modules() if isinstance(part, nn.Linear | Conv1D)]
    return sum(module.weight.numel() * (module.weight.itemsize - BYTES[kind]) for module in linears)


def quantization_arguments(config: ModelConfig, torch_device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told of `model.quantization`; nothing where there is none.

    Raises:
        ModelError: a package is missing, or does not run on the device.
    """
    kind = config.quantization
    if kind is None:
        return {}
    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            raise ModelError(f"model.quantization: {kind} needs the package {package}: pip install {package}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every step that `int8` rounds
    try:
        _probe(kind, torch_device)
    except (ImportError, OSError, *NOT_TAKEN) as error:
        raise ModelError(
            f"model.quantization: {kind}: bitsandbytes does not run on {torch_device} here: {first_line(error)}; leave "
            "the key out"
        ) from None
    return {"quantization_config": BitsAndBytesConfig(**options_of(config)), "device_map": {"": torch_device}}


def options_of(config: ModelConfig) -> dict[str, Any]:
    """What transformers' `BitsAndBytesConfig` is told where there is a `model.quantization`."""
    if config.quantization == "int8":
        return {"load_in_8bit": True}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": config.dtype}


def _probe(kind: str, torch_device: torch.device) -> None:
    """A step of a small module."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    made = Linear4bit if kind == "nf4" else Linear8bitLt
    options = {"quant_type": "nf4"} if kind == "nf4" else {"has_fp16_weights": False}
    module = made(PROBE_WIDTH, PROBE_WIDTH, bias=False, **options).requires_grad_(False).to(torch_device)
    inputs = torch.ones(2, PROBE_WIDTH, device=torch_device, dtype=torch.float16, requires_grad=True)
    torch.autograd.grad(module(inputs).sum(), inputs)


def keep_layout(model: nn.Module) -> None:
    """Have quantized weights lie as they were loaded: on some CPUs those of `nf4` would be laid out anew by the first
    evaluation, and give no gradients any more.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
