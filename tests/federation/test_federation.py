import numpy as np
import pytest
from backbones import make_config
from pydantic import ValidationError
from states import TUNING

from fedhpc.config import section_of
from fedhpc.device.local_update import batches
from fedhpc.federation.partition import Partition
from fedhpc.federation.sampling import (
    Homes,
    Placement,
    held_out_devices,
    local_steps,
    make_packs,
    population,
    sample_devices,
    training_devices,
    upload_counts,
)
from fedhpc.registry import PARTITIONS

STEPS = [(7 * device) % 23 + 1 for device in range(40)]


def config(*, sample_rate=0.5, rounds=100, held_out=0.0, curriculum=None, **device):
    federation = {"num_devices": 40, "sample_rate": sample_rate, "rounds": rounds, "held_out": held_out}
    return make_config("unused", federation=federation, device=device, curriculum=curriculum or {})


def load(devices):
    return sum(STEPS[device] for device in devices)


def test_steps_count_short_batches_and_epochs():
    assert [local_steps(config(batch_size=8, epochs=3), n, 0) for n in (1, 8, 9)] == [3, 3, 6]


def test_no_more_steps_than_are_allowed_whatever_the_epochs():
    chosen = config(batch_size=8, epochs=3, max_steps=4)
    assert [local_steps(chosen, n, 0) for n in (1, 8, 9, 800)] == [3, 3, 4, 4]


@pytest.mark.parametrize(("weights", "counts"), [("examples", [2, 1]), ("tokens", [9, 5]), ("uniform", [1, 1])])
def test_an_upload_counts_examples_their_trained_tokens_or_one(weights, counts):
    chosen = make_config("unused", server={"weights": weights})
    partition = Partition([np.array([0, 3]), np.array([1])], [])
    assert upload_counts(chosen, partition, np.array([2, 5, 100, 7])).tolist() == counts


def test_a_curriculum_begins_with_a_share_of_the_batches_and_ends_with_all():
    chosen = config(batch_size=8, epochs=2, curriculum={"order": "fisher", "start": 0.5, "end": 0.5}, rounds=10)
    # 10 batches; 0.5 + 0.5 t / 5 of them, all from round 5 on
    steps = [local_steps(chosen, 80, t) for t in range(10)]
    assert steps == [2 * count for count in (5, 6, 7, 8, 9, 10, 10, 10, 10, 10)]


@pytest.mark.parametrize("pack", [1, 2, 3, 8, 19, 20, 30])
def test_packs_hold_every_sampled_device_once_and_have_about_the_same_work(pack):
    packs = make_packs(sample_devices(config(), 4), STEPS, pack)
    assert sorted(device for each in packs for device in each) == sorted(sample_devices(config(), 4))
    assert len(packs) == max(1, 20 // pack)
    for each in packs:
        assert [STEPS[device] for device in each] == sorted((STEPS[device] for device in each), reverse=True)
    loads = [load(each) for each in packs]
    # Longest first to the lightest: no pack is ahead of another by more than its last, shortest device.
    assert all(load(each) - STEPS[each[-1]] <= min(loads) for each in packs)


def test_devices_batches_and_tensors_of_a_seed_stay_what_they_are():
    # As with the partition: a run that is resumed with a newer version goes on with what it began with.
    assert sample_devices(config(sample_rate=0.2), 4) == [10, 25, 31, 0, 12, 24, 23, 39]
    chosen = make_config("unused", seed=7, device={"epochs": 2, "batch_size": 3})
    plan = batches(chosen, np.arange(20, 28), np.array([5, 3, 9, 4, 4, 8, 2, 7]), round_index=4, device=2)
    first, second = [[26, 21, 23], [24, 20, 27], [25, 22]], [[26, 21, 23], [25, 22], [24, 20, 27]]
    assert [batch.tolist() for batch in plan] == first + second
    drawn = [0.0122971, 0.0128421, -0.0812969, -0.0425905]
    assert TUNING.initial(1)["prompts"].ravel()[:4] == pytest.approx(drawn, abs=1e-7)


def test_devices_are_those_of_the_round_and_the_seed():
    assert sample_devices(config(), 4) == sample_devices(config(), 4)
    assert sample_devices(config(), 4) != sample_devices(config(), 5)


def test_no_pack_is_empty_where_devices_are_absent():
    assert [len(pack) for pack in make_packs([3, 9, 1], STEPS, 2)] == [3]
    assert make_packs([], STEPS, 2) == []
    assert Placement(20, 3).place([], STEPS).tolist() == []


def test_a_state_lives_where_its_device_was_last_trained():
    homes = Homes(6, 4)
    assert [homes[device] for device in range(6)] == [0, 1, 2, 3, 0, 1]
    assert homes.move([[0, 3], [5]], [3, 1]) == [(0, 0, 3)]
    assert [homes.devices_of(worker) for worker in range(4)] == [[4], [1, 5], [2], [0, 3]]
    assert homes.move([[0, 3], [5]], [3, 1]) == []


def makespan(packs, workers, seconds):
    return max(sum(seconds[d] for p, w in zip(packs, workers, strict=True) if w == k for d in p) for k in set(workers))


def test_ten_very_unequal_devices_fill_four_workers_evenly():
    seconds = [0.8, 9.0, 1.3, 4.4, 2.6, 7.1, 0.5, 5.2, 3.1, 6.0]
    placement = Placement(10, 4)
    packs = [[device] for device in range(10)]
    placement.place(packs, [10] * 10)
    for device, each in enumerate(seconds):
        placement.measured(device, each, 10)
    assert makespan(packs, placement.place(packs, [10] * 10), seconds) <= 1.15 * sum(seconds) / 4


def test_what_was_not_measured_counts_by_its_steps():
    placement = Placement(6, 2)
    workers = placement.place([[device] for device in range(6)], [1, 1, 8, 1, 1, 8])
    assert workers[2] != workers[5]
    placement.measured(2, 0.8, 8)
    placement.measured(5, 8.0, 8)  # a step takes ten times as long, so do those of its neighbours on average
    workers = placement.place([[device] for device in range(6)], [1, 1, 8, 1, 1, 8])
    assert all(workers[device] == workers[2] != workers[5] for device in (0, 1, 3, 4))


def test_states_stay_where_they_are_if_nothing_is_gained():
    placement = Placement(8, 4)
    packs = [[device] for device in (7, 2, 5, 0)]
    np.testing.assert_array_equal(placement.place(packs, [5] * 8), [3, 2, 1, 0])
    assert placement.place(packs, [5] * 8).dtype == np.int32


def test_placing_the_same_packs_again_moves_nothing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        placement, steps = Placement(20, 3), rng.integers(1, 30, 20).tolist()
        packs = [part.tolist() for part in np.array_split(rng.permutation(20), 6)]
        np.testing.assert_array_equal(placement.place(packs, steps), placement.place(packs, steps))


def test_devices_stay_where_they_are_while_nothing_is_to_be_gained():
    rng = np.random.default_rng(0)
    placement = Placement(64, num_workers=16)
    packs = [[device] for device in range(64)]
    placed = []
    for _ in range(20):
        placed.append(placement.place(packs, [10] * 64).tolist())
        for device in range(64):
            placement.measured(device, 1.0 + 0.01 * rng.standard_normal(), 10)
    assert placed == [placed[0]] * 20
    placement.measured(0, 2.0, 10)
    placement.measured(0, 2.0, 10)
    assert placement.place(packs, [10] * 64).tolist() != placed[0]


def test_what_is_at_stake_in_a_short_round_moves_no_device():
    """Two devices of 0.1 s on each worker; to send a state takes about as long as what their times differ by."""
    rng = np.random.default_rng(0)
    placement = Placement(64, num_workers=32)
    packs = [[device] for device in range(64)]
    placed = []
    for _ in range(20):
        placed.append(placement.place(packs, [10] * 64).tolist())
        for device in range(64):
            placement.measured(device, 0.1 + 0.01 * rng.standard_normal(), 10)
    assert placed == [placed[0]] * 20


def test_held_out_devices_are_never_sampled_and_not_counted():
    chosen = config(sample_rate=0.25, held_out=0.1)
    apart = held_out_devices(chosen)
    assert len(apart) == 4
    assert chosen.federation.devices_per_round == 9  # a quarter of the 36 that can train
    seen = {device for t in range(100) for device in sample_devices(chosen, t)}
    assert seen == set(range(40)) - set(apart) == set(training_devices(chosen))
    assert held_out_devices(config(sample_rate=0.5, held_out=0.1)) == apart
    assert len(held_out_devices(config(held_out=0.001))) == 1
    assert held_out_devices(config()) == []
    known = population(chosen, np.arange(40))
    assert (known.num_devices, known.total_count) == (36, sum(range(40)) - sum(apart))


def test_somebody_has_to_train():
    with pytest.raises(ValidationError, match=r"held_out: 0\.5 of .*num_devices: 1 leaves no device"):
        section_of(PARTITIONS, num_devices=1, held_out=0.5)
    assert section_of(PARTITIONS, num_devices=100, held_out=0.999).num_held_out == 99
