"""Who takes part when, and where a device lives: the same answer on every rank, without a message."""

from collections.abc import Iterable

from fedhpc.config import Config
from fedhpc.seeding import generator


def sample_devices(config: Config, round_index: int) -> list[int]:
    """S_t in sampled order: uniform without replacement."""
    rng = generator(config.seed, purpose="sample devices", round_index=round_index)
    chosen = rng.choice(config.federation.num_devices, size=config.federation.devices_per_round, replace=False)
    return [int(device) for device in chosen]


def worker_of(device: int, num_workers: int) -> int:
    """The worker, 0 to num_workers - 1, on which a device lives; worker w is rank w + 1."""
    return device % num_workers


def devices_of(worker: int, num_devices: int, num_workers: int) -> list[int]:
    """The devices that live on a worker, ascending."""
    return list(range(worker, num_devices, num_workers))


def counts_per_worker(devices: Iterable[int], num_workers: int) -> list[int]:
    """How many of the devices live on each worker."""
    counts = [0] * num_workers
    for device in devices:
        counts[worker_of(device, num_workers)] += 1
    return counts
