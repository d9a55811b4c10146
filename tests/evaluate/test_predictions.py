"""Batches of several devices' examples: what they hold, and that each is scored with its own device's tensors."""

import numpy as np
import pytest
import torch
from backbones import load_backbone, read_tuning, save_backbone

from fedhpc.data.prepared import Split
from fedhpc.evaluate.predictions import class_scores, device_batches, evaluation_batches
from fedhpc.tuning.base import as_parameters

SHARES = {7: 3, 2: 0, 0: 6, 5: 1, 3: 9}
"""Examples of each device."""


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, 90, size) for size in rng.integers(2, 12, sum(SHARES.values()))]
    return Split.of([(ids, len(ids) - 1) for ids in texts], [0] * len(texts), pad_id=1)


@pytest.fixture
def shares(split):
    order = np.random.default_rng(1).permutation(len(split))
    return dict(zip(SHARES, np.split(order, np.cumsum(list(SHARES.values()))[:-1]), strict=True))


def listed(batches):
    return [[(device, len(examples)) for device, examples in batch] for batch in batches]


def test_a_batch_goes_on_with_the_next_device(split, shares):
    batches = device_batches(split, shares, 4, side_by_side=True)
    assert listed(batches) == [[(7, 3), (0, 1)], [(0, 4)], [(0, 1), (5, 1), (3, 2)], [(3, 4)], [(3, 3)]]
    for device, examples in shares.items():
        found = np.concatenate([part for batch in batches for own, part in batch if own == device] or [examples[:0]])
        assert sorted(found) == sorted(examples)


def test_devices_with_weights_of_their_own_share_no_batch(split, shares):
    batches = device_batches(split, shares, 4, side_by_side=False)
    assert listed(batches) == [[(7, 3)], [(0, 4)], [(0, 2)], [(5, 1)], [(3, 4)], [(3, 4)], [(3, 1)]]
    in_order = [split.lengths[i] for batch in batches for device, part in batch if device == 3 for i in part]
    assert in_order == sorted(in_order)


@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_an_example_is_scored_with_the_tensors_of_its_device(split, shares, tmp_path, kind):
    path = save_backbone(tmp_path, "llama-gqa")
    backbone, tuning = load_backbone(path, "llama-gqa", kind=kind), read_tuning(path, kind=kind)
    rng = np.random.default_rng(2)
    params = {
        device: as_parameters(
            {name: rng.standard_normal(shape, np.float32) for name, shape in tuning.shapes.items()}, torch.device("cpu")
        )
        for device in shares
    }
    together, alone = (np.zeros((len(split), 3), np.float32) for _ in range(2))
    batches = device_batches(split, shares, 8, side_by_side=True)
    of_devices = ([(params[device], part) for device, part in batch] for batch in batches)
    for examples, scores in class_scores(backbone, tuning, split, of_devices):
        together[examples] = scores
    for device, own in shares.items():
        one_by_one = ([(params[device], batch)] for batch in evaluation_batches(split, own, 1))
        for examples, scores in class_scores(backbone, tuning, split, one_by_one):
            alone[examples] = scores
    assert alone.std() > 0.1
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-3)
