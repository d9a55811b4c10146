"""With all devices, one SGD step each and nothing clipped, federated rounds are steps of centralised SGD; of `mime`, of
SGD with momentum."""

import h5py
import numpy as np
import pytest
import torch
from tiny import NUM_DEVICES, run_dir

from fedhpc.checkpoint.files import SERVER_FILE
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.config.file import load_config
from fedhpc.model.backbone import Backbone
from fedhpc.server.job import load_job
from fedhpc.tuning.base import as_parameters

CPU = torch.device("cpu")
RATE, ROUNDS, MOMENTUM = 0.5, 4, 0.5


def centralised_sgd(config, momentum):
    """Prompts after so many steps on the mean loss of all training examples: along m = (1 - beta) g + beta m."""
    job = load_job(load_config(config))
    backbone = Backbone(job.config.model, job.config.tuning, job.data.description, CPU)
    split, prompts = job.data.split("train"), job.tuning.initial(job.config.seed)["prompts"]
    batch = split.batch(np.arange(len(split)))
    step = np.zeros_like(prompts)
    for _ in range(ROUNDS):
        params = as_parameters({"prompts": prompts}, CPU)
        loss = job.tuning.losses(job.tuning.forward(backbone, [params], batch), batch.labels).mean()
        step = (1 - momentum) * torch.autograd.grad(loss, params["prompts"])[0].numpy() + momentum * step
        prompts = prompts - RATE * step
    return prompts


@pytest.mark.parametrize("method", ["scaffold", "fedavg", "mime"])
def test_full_participation_and_one_step_is_centralised_sgd(run_config, fedhpc, method):
    momentum = MOMENTUM if method == "mime" else 0.0
    config = run_config(
        server={"method": method, "momentum": momentum or None},
        selection={"strategy": "all"},
        federation={"num_devices": NUM_DEVICES, "sample_rate": 1.0, "rounds": ROUNDS},
        device={"optimizer": "sgd", "epochs": 1, "batch_size": 1000, "learning_rate": RATE, "max_grad_norm": 1e6},
    )
    assert fedhpc("run", config)[0] == 0
    checkpoints = Checkpoints(run_dir(config))
    with h5py.File(checkpoints.path(checkpoints.positions()[0]) / SERVER_FILE) as file:
        found = file["prompts"][()]
        assert method != "scaffold" or np.abs(file["control/global"][()]).max()
    expected = centralised_sgd(config, momentum)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
