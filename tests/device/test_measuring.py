"""What a rank measures beside training: on which batch, with which tensors, by which rule."""

import numpy as np
import pytest
import torch
from tiny import NUM_DEVICES

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.config.file import load_config
from fedhpc.device.measuring import Measurements
from fedhpc.device.round_context import RoundContext
from fedhpc.model.backbone import Backbone
from fedhpc.seeding import generator
from fedhpc.selection.spectrum import lossless_ratio
from fedhpc.selection.strategies.score import layer_score
from fedhpc.selection.strategies.sensitivity import layer_sensitivity
from fedhpc.server.job import load_job

DEVICES = (7, 2)


@pytest.fixture
def measure(run_config):
    """Measurements of a run, its job, and its batch of so many examples of a device for a purpose."""

    def make(**selection):
        config = run_config(selection=selection, federation={"num_devices": NUM_DEVICES, "alpha": 0.5})
        job = load_job(load_config(config))
        backbone = Backbone(job.config.model, job.config.tuning, job.data.description, torch.device("cpu"))
        train = job.data.split("train")

        def batch(device, purpose, size):
            rng = generator(job.config.seed, purpose=purpose, device=device)
            return train.batch(rng.permutation(job.partition.train[device])[:size])

        return Measurements(job.config, train, job.partition, backbone, job.tuning, lambda activity: None), job, batch

    return make


def sizes(job):
    return [len(job.partition.train[device]) for device in DEVICES]


@pytest.mark.parametrize("strategy", ["score", "sensitivity"])
def test_layers_are_scored_on_one_batch_of_each_device_by_the_rule_asked_for(measure, strategy):
    measurements, job, batch = measure(strategy=strategy, distance="l1", batch_size=5)
    records = measurements.layer_scores(DEVICES)
    assert records["device"].tolist() == list(DEVICES)
    assert records["num_examples"].tolist() == sizes(job)
    assert len(set(sizes(job))) == 2
    for device, scores in zip(DEVICES, records["scores"], strict=True):
        examples, backbone = batch(device, "score batch", 5), measurements.backbone
        if strategy == "score":
            expected = [layer_score(out.numpy(), "l1") for out in backbone.layer_outputs(examples)]
        else:
            expected = layer_sensitivity(backbone, job.tuning, job.tuning.initial(job.config.seed), examples)
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.parametrize("by", ["eigengap", "density"])
def test_the_lossless_ratio_is_that_of_the_parameters_sent(measure, by):
    measurements, job, batch = measure(ratio="auto", auto_by=by)
    layers = tuple(range(job.shape.num_layers))
    sent = np.linspace(-1, 1, job.tuning.exchanged(layers).size, dtype=np.float32)
    context = RoundContext(round=3, layers=layers, params=sent)
    nothing = DeviceState(local=np.empty(0, np.float32))
    (record,) = measurements.lossless_ratios(DEVICES[:1], context, nothing)
    assert (record["device"], record["num_examples"]) == (DEVICES[0], sizes(job)[0])

    def ratio_at(tensors):
        return lossless_ratio(
            measurements.backbone,
            job.tuning,
            tensors,
            batch(DEVICES[0], "hessian batch", job.config.device.batch_size),
            by=by,
            rng=generator(job.config.seed, purpose="hessian", round_index=3, device=DEVICES[0]),
            beat=lambda: None,
        )

    assert record["ratio"] == pytest.approx(ratio_at(job.tuning.merge(sent, nothing.local, layers)).ratio)
    if by == "density":  # too few parameters for a wide gap at either place
        assert record["ratio"] != pytest.approx(ratio_at(job.tuning.initial(job.config.seed)).ratio)
