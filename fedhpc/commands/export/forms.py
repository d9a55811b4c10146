"""A run's tuned parameters as PEFT holds them; see `fedhpc.tuning.peft_form`."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fedhpc.commands.trained import Trained
from fedhpc.errors import ConfigError
from fedhpc.model.pretrained import load_pretrained
from fedhpc.model.structure import outline
from fedhpc.model.weight_files import weights_sha256
from fedhpc.registry import TUNINGS
from fedhpc.tuning.attempt import BACKBONE_SHA256
from fedhpc.tuning.peft_form import PeftForm


def peft_files(form: PeftForm) -> dict[str, bytes]:
    """The files that PEFT reads, by name."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in form.tensors.items()}
    return {
        "adapter_config.json": (json.dumps(form.config, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, {"format": "pt", BACKBONE_SHA256: form.backbone_sha256}),
    }


def peft_form(trained: Trained) -> PeftForm:
    """The adapter for a run's tuned parameters.

    Raises:
        ConfigError: PEFT has no form for the tuning, or computes something else with it.
        ModelError: PEFT cannot put this tuning on the backbone.
    """
    job = trained.job
    tuning, name, kind = job.config.tuning, job.config.model.name, job.data.description.kind
    if job.tuning.peft_type is None:
        held = ", ".join(each for each, part in TUNINGS.items() if part.peft_type is not None)
        raise ConfigError(f"tuning.kind: {tuning.kind} cannot be exported: PEFT holds {held} only")
    model = outline(name, head=tuning.head, kind=kind)
    # What is generated may be longer than any text of the training.
    answer = job.config.evaluate.max_new_tokens if tuning.head == "language_model" else 0
    form = job.tuning.to_peft(trained.tensors, model, longest=trained.max_length + answer)
    causal = kind == "decoder" and tuning.head != "linear"
    general = {
        "base_model_name_or_path": os.path.abspath(name) if Path(name).exists() else name,
        "inference_mode": True,
        # PEFT has no task of masked words; FEATURE_EXTRACTION takes any model, and hands on what it puts out.
        "task_type": "CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
    }
    return replace(form, config={**general, **form.config}, backbone_sha256=load_pretrained(weights_sha256, name))
