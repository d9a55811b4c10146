"""Who takes part when, which devices train side by side, and on which worker: the same answer on every rank."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedhpc.config import Config
from fedhpc.federation.partition import Partition
from fedhpc.methods import Population
from fedhpc.registry import METHODS
from fedhpc.seeding import generator

Packs = list[list[int]]
"""The devices of a round; those of one pack train on one worker, side by side."""
PROBES = 6
"""Sizes of packs that `device.pack: auto` tries: 1, 2, 4 to 32 devices side by side."""


@lru_cache(maxsize=8)
def _divided(seed: int, num_devices: int, num_held_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The devices that never train and the others, each ascending; asked for in every round."""
    order = generator(seed, purpose="held-out devices").permutation(num_devices)
    return np.sort(order[:num_held_out]), np.sort(order[num_held_out:])


def _devices(config: Config) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return _divided(config.seed, config.federation.num_devices, config.federation.num_held_out)


def held_out_devices(config: Config) -> list[int]:
    """The devices that never train, ascending."""
    return _devices(config)[0].tolist()


def training_devices(config: Config) -> list[int]:
    """The other devices, ascending."""
    return _devices(config)[1].tolist()


def sample_devices(config: Config, round_index: int) -> list[int]:
    """S_t in sampled order: uniform without replacement from those that can train."""
    rng = generator(config.seed, purpose="sample devices", round_index=round_index)
    return rng.choice(_devices(config)[1], size=config.devices_sampled, replace=False).tolist()


def most_at_once(config: Config) -> int:
    """Devices that train in one round, at most."""
    wanted, at_work = config.federation.devices_per_round, METHODS[config.server.method].concurrency(config)
    return min(config.federation.num_training, at_work + wanted - 1) if at_work else wanted


def sampled_before(config: Config, round_index: int) -> set[int]:
    """The devices that were sampled in any round before this one; where the server waits for none of them, all that can
    train: who was sent out, its state alone knows."""
    if METHODS[config.server.method].concurrency(config):
        return set(training_devices(config)) if round_index else set()
    return {device for t in range(round_index) for device in sample_devices(config, t)}


def local_steps(config: Config, num_examples: int, round_index: int) -> int:
    """K_i of a device with so many training examples."""
    steps = config.device.epochs * batches_per_epoch(config, num_examples, round_index)
    return min(steps, config.device.max_steps or steps)


def batches_per_epoch(config: Config, num_examples: int, round_index: int) -> int:
    """All batches, or with a curriculum `min(1, beta_0 + (1 - beta_0) t / (alpha T))` of them."""
    count, curriculum = -(-num_examples // config.device.batch_size), config.curriculum
    if curriculum.order == "random":
        return count
    share = curriculum.start + (1 - curriculum.start) * round_index / (curriculum.end * config.federation.rounds)
    return math.ceil(min(1.0, share) * count - 1e-9)


def round_steps(config: Config, partition: Partition, round_index: int) -> list[int]:
    """K_i of every device."""
    return [local_steps(config, len(examples), round_index) for examples in partition.train]


def upload_counts(config: Config, partition: Partition, num_terms: NDArray[np.int64]) -> NDArray[np.int64]:
    """What every device's upload counts in a round's mean [N], by `server.weights`.

    Args:
        config: the run's configuration.
        partition: who has which examples.
        num_terms: terms of the loss in each training example; see `fedhpc.data.prepared.Split.num_terms`.
    """
    of_device = {"examples": len, "tokens": lambda examples: num_terms[examples].sum(), "uniform": lambda _: 1}
    return np.array([of_device[config.server.weights](examples) for examples in partition.train], np.int64)


def population(config: Config, counts: NDArray[np.int64]) -> Population:
    """What the server method may know of the devices, from their `upload_counts`."""
    devices = training_devices(config)
    return Population(
        num_devices=len(devices),
        sample_rate=config.federation.sample_rate,
        total_count=int(counts[devices].sum()),
    )


def count_packs(num_devices: int, pack: int) -> int:
    """Packs of a round in which so many devices take part."""
    return max(1, num_devices // pack) if num_devices else 0


def make_packs(devices: Sequence[int], steps: Sequence[int], pack: int) -> Packs:
    """Devices in packs of at least ``pack``, with about the same number of steps in each.

    The rule does not know the ranks: what is computed together must not depend on their number.

    Args:
        devices: that take part in the round.
        steps: K_i of every device.
        pack: N of `device.pack`.
    """
    packs: Packs = [[] for _ in range(count_packs(len(devices), pack))]
    loads = [0] * len(packs)
    for device in sorted(devices, key=lambda device: (-steps[device], device)):
        lightest = loads.index(min(loads))
        packs[lightest].append(device)
        loads[lightest] += steps[device]
    return packs


STAY, MOVE_S = 1.03, 0.05
"""A device leaves home only where more than this share of the least possible time is at stake, and more than so many
seconds: steps that take the same time are never measured to be quite the same, and to move costs more. A state of 4 MB
is packed and unpacked in 0.05 to 0.1 s."""


class Homes:
    """On which worker each device's state is; worker w is rank w + 1."""

    def __init__(self, num_devices: int, num_workers: int) -> None:
        self.num_workers = num_workers
        self._home = [device % num_workers for device in range(num_devices)]

    def __getitem__(self, device: int) -> int:
        return self._home[device]

    def devices_of(self, worker: int) -> list[int]:
        """The devices that live on a worker, ascending."""
        return [device for device, home in enumerate(self._home) if home == worker]

    def move(self, packs: Packs, workers: Sequence[int]) -> list[tuple[int, int, int]]:
        """Every pack's devices live on the pack's worker from now on; the moves: device, from, to."""
        moves = [
            (device, self._home[device], worker)
            for pack, worker in zip(packs, workers, strict=True)
            for device in pack
            if self._home[device] != worker
        ]
        for device, _, worker in moves:
            self._home[device] = worker
        return moves


def spread(packs: Packs, costs: Sequence[float], homes: Homes, *, to_move: float = 0.0) -> list[int]:
    """A worker for every pack: longest first, to the one with the least to do; where it makes no difference, its first
    device's home.

    Args:
        to_move: what it costs to move a device.
    """
    loads = [0.0] * homes.num_workers
    bound = max([sum(costs) / len(loads), *costs])
    """No placement ends sooner."""
    enough = max(STAY * bound, bound + to_move)
    workers = [0] * len(packs)
    for index in sorted(range(len(packs)), key=lambda index: -costs[index]):
        home = homes[packs[index][0]]
        worker = home if loads[home] + costs[index] <= enough else loads.index(min(loads))
        workers[index] = worker
        loads[worker] += costs[index]
    return workers


class Placement:
    """The server's choice of a worker for each pack, by what it has measured."""

    def __init__(self, num_devices: int, num_workers: int) -> None:
        self.homes = Homes(num_devices, num_workers)
        self._seconds_per_step: dict[int, float] = {}
        """By device; each measurement counts as much as all before it, so that one slow round does not decide."""

    def measured(self, device: int, seconds: float, steps: int) -> None:
        """A device's update took so long."""
        before = self._seconds_per_step.get(device, seconds / steps)
        self._seconds_per_step[device] = (before + seconds / steps) / 2

    def place(self, packs: Packs, steps: Sequence[int]) -> NDArray[np.int32]:
        """A worker for every pack, from K_i of every device."""
        known = self._seconds_per_step.values()
        usual = sum(known) / len(known) if known else 1.0
        costs = [sum(steps[d] * self._seconds_per_step.get(d, usual) for d in pack) for pack in packs]
        workers = spread(packs, costs, self.homes, to_move=MOVE_S)
        self.homes.move(packs, workers)
        return np.array(workers, np.int32)
