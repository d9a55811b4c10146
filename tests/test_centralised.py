"""With all devices, one SGD step each and nothing clipped, federated rounds are steps of centralised SGD."""

import h5py
import numpy as np
import pytest
import torch
from tiny import NUM_DEVICES, run_dir

from fedhpc.checkpoint import SERVER_FILE, Checkpoints
from fedhpc.config_file import load_config
from fedhpc.job import load_job
from fedhpc.models import Backbone
from fedhpc.tuning.base import as_parameters

CPU = torch.device("cpu")
RATE, ROUNDS = 0.5, 4


def centralised_sgd(config):
    """Prompts after so many steps on the mean loss of all training examples."""
    job = load_job(load_config(config))
    backbone = Backbone(job.config.model, job.config.tuning, job.data.description, CPU)
    split, prompts = job.data.split("train"), job.tuning.initial(job.config.seed)["prompts"]
    batch = split.batch(np.arange(len(split)))
    for _ in range(ROUNDS):
        params = as_parameters({"prompts": prompts}, CPU)
        loss = job.tuning.losses(job.tuning.forward(backbone, [params], batch), batch.labels).mean()
        prompts = prompts - RATE * torch.autograd.grad(loss, params["prompts"])[0].numpy()
    return prompts


@pytest.mark.parametrize("method", ["scaffold", "fedavg"])
def test_full_participation_and_one_step_is_centralised_sgd(run_config, fedhpc, method):
    config = run_config(
        server={"method": method},
        selection={"strategy": "all"},
        federation={"num_devices": NUM_DEVICES, "sample_rate": 1.0, "rounds": ROUNDS},
        device={"optimizer": "sgd", "epochs": 1, "batch_size": 1000, "learning_rate": RATE, "max_grad_norm": 1e6},
    )
    assert fedhpc("run", config)[0] == 0
    checkpoints = Checkpoints(run_dir(config))
    with h5py.File(checkpoints.path(checkpoints.positions()[0]) / SERVER_FILE) as file:
        found = file["prompts"][()]
        moved = method == "fedavg" or np.abs(file["control/global"][()]).max()
    expected = centralised_sgd(config)
    assert moved
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
