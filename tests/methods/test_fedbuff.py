"""FedBuff: steps and timelines by hand."""

from dataclasses import replace

import numpy as np
from backbones import make_config
from test_methods import P0, method, uploads

from fedhpc.exchange.rounds import plan_round
from fedhpc.exchange.simulation import Load, round_seconds
from fedhpc.federation.partition import Partition
from fedhpc.federation.sampling import most_at_once, sample_devices
from fedhpc.methods.in_flight import Arrivals, in_flight

LOAD = Load(down=1000, up=500)


def sent(params, ids, *, taken, arrives, now=1.0, counts=None):
    """Uploads of these devices, and when they and others arrive."""
    ones = [1] * len(ids)
    given = uploads(np.reshape(params, (len(ids), 2)), ids=ids, examples=counts or ones, steps=ones)
    return replace(given, arrivals=Arrivals(began=0.0, now=now, taken=taken, arrives=arrives))


def test_a_step_adds_up_what_has_arrived_by_staleness_and_keeps_the_rest():
    fedbuff = method(method="fedbuff", learning_rate=2.0, momentum=0.5)
    # From P0 = [1, -2]: device 2's change is [1, 2], that of device 0 [3, 0] and late.
    first = sent([[2, 0], [4, -2]], (2, 0), counts=(1, 3), taken={2: 0}, arrives={2: 1.0, 0: 5.0})
    state = fedbuff.update(fedbuff.init(P0), first)
    # v = [1, 2]; P = P0 + 2 v
    assert state.params.tolist() == [3.0, 2.0]
    assert state.vectors["in_flight.0"].tolist() == [3.0, 0.0]
    assert state.scalars == {"now": 1.0, "in_flight.0.sent": 0, "in_flight.0.arrives": 5.0, "in_flight.0.count": 3}
    # Device 1 goes [0, 4] from there; that of device 0 has missed three steps, and counts 3 of 4, half.
    second = sent([[3, 6]], (1,), taken={1: 0, 0: 3}, arrives={1: 6.0}, now=6.0)
    state = fedbuff.update(replace(state, round=3), second)
    # v = 1/2 [1, 2] + 1/4 [0, 4] + 3/4 (1 + 3)^-1/2 [3, 0] = [1.625, 2]
    assert state.params.tolist() == [6.25, 6.0]
    assert state.vectors.keys() == {"momentum"}
    assert state.scalars == {"now": 6.0}


def test_a_change_that_was_rejected_counts_nothing():
    fedbuff = method(method="fedbuff")
    state = fedbuff.update(fedbuff.init(P0), sent([[2, 0]], (2,), taken={2: 0, 5: 0}, arrives={2: 1.0}))
    assert state.params.tolist() == [2.0, 0.0]
    assert fedbuff.update(state, sent([], (), taken={5: 0}, arrives={})).params.tolist() == [2.0, 0.0]


def timeline(steps, rounds, *, wanted, concurrency, **simulation):
    """So many rounds of devices that need so many seconds, and the states' numbers that lead from one to the next."""
    partition = Partition(train=[np.arange(each) for each in steps], validation=[np.arange(8)] * len(steps))
    config = make_config(
        "unused",
        federation={"num_devices": len(steps), "sample_rate": wanted / len(steps)},
        device={"epochs": 1, "batch_size": 1},
        server={"method": "fedbuff", "concurrency": concurrency},
        simulation={"step_seconds": 1.0, **simulation},
    )
    fedbuff = method(method="fedbuff")
    state, found = fedbuff.init(P0), []
    for index in range(rounds):
        this = plan_round(config, partition, index, LOAD, state.scalars)
        count = len(this.present)
        given = uploads(np.zeros((count, 2)), ids=this.present, examples=[1] * count, steps=[1] * count)
        state = fedbuff.update(state, replace(given, arrivals=this.arrivals))
        found.append(this)
    return config, found, state


def test_two_devices_by_hand():
    """Device 0 takes 2 s and device 1 5 s, both are at work all the time, and a step takes one change.

    | step | sends out   | at | takes | staleness |
    | 0    | 0 and 1 at 0 | 2 | 0     | 0         |
    | 1    | 0 at 2       | 4 | 0     | 0         |
    | 2    | 0 at 4       | 5 | 1     | 2         |
    | 3    | 1 at 5       | 6 | 0     | 1         |
    | 4    | 0 at 6       | 8 | 0     | 0         |
    | 5    | 0 at 8       | 10 | 1    | 2         | both arrive at 10: first who was sent out first
    """
    config, rounds, state = timeline([2, 5], 6, wanted=1, concurrency=2)
    assert [this.arrivals.now for this in rounds] == [2, 4, 5, 6, 8, 10]
    assert [this.arrivals.taken for this in rounds] == [{0: 0}, {0: 0}, {1: 2}, {0: 1}, {0: 0}, {1: 2}]
    assert [sorted(this.sampled) for this in rounds] == [[0, 1], [0], [0], [1], [0], [0]]
    assert {device: flight.sent for device, flight in in_flight(state.scalars).items()} == {0: 5}
    seconds = [round_seconds(config.simulation, 0, this.record() | {"seconds": {"server": 0.5}}) for this in rounds]
    assert seconds == [2.5, 2.5, 1.5, 1.5, 2.5, 2.5]
    record = rounds[2].record()
    assert (record["taken"], record["staleness"]) == ([1], {"mean": 2.0, "max": 2})
    assert [this.record()["bytes"] for this in rounds[:2]] == [2 * LOAD.down + LOAD.up, LOAD.down + LOAD.up]


def test_who_arrives_is_replaced_at_once_and_nobody_trains_twice_from_the_same_parameters():
    steps = [3, 7, 2, 9, 4, 6, 8, 5]
    config, rounds, _ = timeline(steps, 40, wanted=3, concurrency=4)
    at_work, free_at = {}, dict.fromkeys(range(8), 0.0)
    for this in rounds:
        assert len(this.arrivals.taken) == 3
        assert len(set(this.sampled)) == len(this.sampled) <= most_at_once(config)
        for device in this.sampled:
            assert device not in at_work
            began = this.arrivals.arrives[device] - steps[device]
            assert this.arrivals.began <= began <= this.arrivals.now
            assert free_at[device] <= began
            at_work[device] = this.index
        for device, staleness in this.arrivals.taken.items():
            assert staleness == this.index - at_work.pop(device)
            free_at[device] = this.arrivals.now
        # Behind a step, before others are sent out: its last arrival is missing, and those of the same moment.
        assert len(at_work) < 4
    events = [(at, 1) for this in rounds for at in (this.arrivals.arrives[each] - steps[each] for each in this.sampled)]
    events += [(at, -1) for this in rounds for at in this.arrivals.arrives.values()]
    busy, now = 0, rounds[-1].arrivals.now
    levels = {}
    for at, change in sorted(events):
        busy += change
        levels[at] = busy
    assert {level for at, level in levels.items() if at < now} == {4}


def test_a_device_that_drops_out_is_replaced_by_another():
    _, rounds, _ = timeline([3, 7, 2, 9, 4, 6, 8, 5] * 3, 30, wanted=3, concurrency=4, drop_out=0.4)
    assert sum(len(this.absent) for this in rounds) > 20
    for this in rounds:
        assert len(this.arrivals.taken) == 3
        assert not set(this.absent) & (this.arrivals.arrives.keys() | this.arrivals.taken.keys() & set(this.sampled))
    # Where nobody is left, what is under way arrives all the same, and then nothing does.
    _, rounds, _ = timeline([3, 7], 60, wanted=1, concurrency=2, drop_out=0.7)
    assert any(this.is_empty for this in rounds)
    assert any(not this.present and not this.is_empty for this in rounds)


def test_with_as_many_at_work_as_a_step_takes_and_alike_it_samples_as_any_method():
    config, rounds, _ = timeline([2] * 8, 5, wanted=3, concurrency=3)
    for this in rounds:
        assert this.sampled == sample_devices(config, this.index)
        assert this.arrivals.taken == dict.fromkeys(sorted(this.sampled), 0)
