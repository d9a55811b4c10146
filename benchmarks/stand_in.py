"""A job of RoBERTa large's shape whose devices do no work, for benchmarks of what is around the local steps."""

from types import SimpleNamespace

import numpy as np

from fedhpc.config import Config, TuningConfig
from fedhpc.models import BackboneShape
from fedhpc.tuning import make_tuning

EXAMPLES = 64


def make_job(run_dir, *, ratio=1.0, rounds=1, num_devices=100, sampled=10, **sections):
    """A job without data and backbone, which exchanges the first layers."""
    selection = {"strategy": "all"} if ratio == 1 else {"strategy": "first", "ratio": ratio}
    config = Config.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"name": "stand-in"},
            "data": {"path": "stand-in"},
            "federation": {"num_devices": num_devices, "sample_rate": sampled / num_devices, "rounds": rounds},
            "selection": selection,
            **sections,
        }
    )
    shape = BackboneShape(
        name="stand-in",
        num_layers=24,
        num_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        hidden_size=1024,
        initializer_range=0.02,
        max_positions=512,
    )
    tuning = make_tuning(TuningConfig(num_tokens=20), shape, num_classes=2)
    description = SimpleNamespace(class_names=["no", "yes"], metric="accuracy")
    data = SimpleNamespace(description=description, split=lambda name: [])
    partition = SimpleNamespace(train=[np.arange(EXAMPLES)] * num_devices, validation=[np.arange(1)] * num_devices)
    identity = {**config.identity(), "sha256": config.sha256}
    return SimpleNamespace(config=config, data=data, shape=shape, tuning=tuning, partition=partition, identity=identity)
