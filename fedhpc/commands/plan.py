"""`fedhpc plan`: what a run would need, from shapes and counts alone."""

from collections.abc import Callable, Iterator

import numpy as np

from fedhpc.commands.plan_memory import (
    DTYPE_BYTES,
    added_bytes,
    exchanged_bytes,
    has_control,
    is_sparse,
    kept_bytes,
    memory_lines,
    method_of,
    pack_of,
    selected,
    server_vectors,
    trainable,
    upload_of,
)
from fedhpc.config import Config
from fedhpc.exchange.encoding import Upload, make_encoding
from fedhpc.exchange.messages import HEADER, UPLOAD_HEADER
from fedhpc.exchange.secure.records import device_bytes, rank_bytes
from fedhpc.federation.sampling import Homes, count_packs, local_steps, most_at_once, training_devices
from fedhpc.job.progress import human_bytes
from fedhpc.model.pretrained import count_parameters
from fedhpc.server.job import Job, check_data, check_run_dir, check_trackers, job_notices, load_job


def plan_text(config: Config, *, ranks: int, examples_per_second: float | None) -> str:
    """The plan as text.

    Raises:
        UserError: the run could not start.
    """
    job = load_job(config)
    check_data(job)
    check_run_dir(config, create=False)
    check_trackers(config)
    num_workers = max(1, ranks - 1)
    total = count_parameters(job.shape.name)
    sections = (
        _overview(job, total),
        _traffic(job, ranks, total),
        memory_lines(job, ranks),
        _stop(job, num_workers),
        _placement(job, ranks),
        _time(job, num_workers, examples_per_second),
        [f"note: {notice}" for notice in job_notices(job)],
    )
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section)))


def _overview(job: Job, total: int) -> Iterator[str]:
    description, shape = job.data.description, job.shape
    exchanged = job.tuning.exchanged(range(selected(job))).size
    yield f"backbone     {shape.name}: {shape.num_layers} layers, keys {shape.key_width} wide, {total:,} parameters"
    train, validation = (len(job.data.split(name)) for name in ("train", "validation"))
    yield f"data         {description.task}: {train} training and {validation} evaluation examples"
    yield f"trainable    {trainable(job):,} parameters ({trainable(job) / total:.2%} of the backbone)"
    auto = " until the warm-up ends" if job.config.selection.is_automatic else ""
    yield f"exchanged    {exchanged:,} parameters, {selected(job)} of {shape.num_layers} layers{auto}"
    if job.privacy:
        yield f"privacy      {job.privacy.describe(job.config.federation.rounds)}"


def _traffic(job: Job, ranks: int, total: int) -> Iterator[str]:
    exchanged = exchanged_bytes(job)
    everything = 4 * trainable(job)
    model = DTYPE_BYTES[job.config.model.dtype] * total
    config, method = job.config, method_of(job)
    encoding = make_encoding(config, method)
    devices = config.federation.devices_per_round
    packs = count_packs(devices, pack_of(job))
    uploads, headers = devices if ranks > 1 else 0, UPLOAD_HEADER.itemsize

    def uploaded(nbytes: float) -> float:
        return Upload.of(int(nbytes / 4), encoding, method).nbytes

    def summed(nbytes: float) -> float:
        return 8.0 * encoding.num_sums * encoding.length(int(nbytes / 4))

    rows: list[tuple[str, int, Callable[[float], float], float]] = [("up, uploads", uploads, uploaded, headers)]
    if encoding.num_sums:
        rows = [("up, sums", min(1, uploads), summed, headers * devices)]
    if uploads and (among := encoding.masked_among):
        down, (_, first, last) = rank_bytes(among), device_bytes(among)
        sending = min(ranks - 1, devices)  # of ranks beside rank 0; those of other hosts send one sum together
        rows = [
            ("up, masked sums", sending, summed, headers * devices / sending),
            ("down, keys", ranks - 1, lambda nbytes: down, 0),
            ("up, keys", devices, lambda nbytes: first + last, 0),
        ]
    factors = [("down, factors", ranks - 1, lambda nbytes: devices * nbytes, HEADER.itemsize)] * method.adds_weights
    yield "bytes per round        selected layers    all layers    full model"
    for direction, copies, payload, header in (
        ("down, broadcast", ranks - 1, lambda nbytes: (1.0 + len(method.sends)) * nbytes, HEADER.itemsize + 4 * packs),
        *factors,
        *rows,
    ):
        sizes = [human_bytes(copies * (size + header)) for size in (payload(exchanged), payload(everything), model)]
        yield f"  {direction:<15} x{copies:<4} {sizes[0]:>15} {sizes[1]:>13} {sizes[2]:>13}"


def _stop(job: Job, num_workers: int) -> Iterator[str]:
    """What a stop within a round writes: at most, if it comes when all but the last step of each rank is done."""
    config = job.config
    n = exchanged_bytes(job)
    sampled = most_at_once(config)
    unwritten = config.checkpoint.every * sampled
    server = n * (server_vectors(job) + unwritten * has_control(job)) + added_bytes(job)
    finished = sampled * upload_of(job).nbytes + unwritten * kept_bytes(job)
    begun = sampled if config.device.pack == "auto" else min(num_workers * config.device.pack, sampled)
    unfinished = (3 + is_sparse(job)) * 4 * trainable(job) * begun
    yield f"written at a stop: up to {human_bytes(server + finished + unfinished)} in the grace that the job is given"
    yield f"  {human_bytes(server):>9}  server: its vectors, control variates since the last checkpoint"
    yield f"  {human_bytes(finished):>9}  device ranks together: finished uploads, local states"
    yield f"  {human_bytes(unfinished):>9}  device ranks together: half-done updates, prompts and Adam moments"


def _placement(job: Job, ranks: int) -> Iterator[str]:
    workers = {0: 0} if ranks == 1 else {rank: rank - 1 for rank in range(1, ranks)}
    sizes = [len(examples) for examples in job.partition.train]
    yield f"devices on ranks ({len(sizes)} devices, {min(sizes)} to {max(sizes)} training examples each)"
    for rank, worker in workers.items():
        devices = Homes(len(sizes), len(workers)).devices_of(worker)
        shown = " ".join(map(str, devices[:8])) + (" ..." if len(devices) > 8 else "")
        yield f"  rank {rank}: {len(devices)} devices, {sum(sizes[d] for d in devices)} examples: {shown or 'idle'}"


def _time(job: Job, num_workers: int, examples_per_second: float | None) -> Iterator[str]:
    config = job.config
    devices = config.federation.devices_per_round
    examples = devices * _examples_each(job) * _passes(job)
    yield f"work         about {examples:.0f} training examples a round, {config.federation.rounds} rounds"
    if examples_per_second:
        busy = min(num_workers, devices)
        seconds = examples / examples_per_second / busy
        yield (
            f"time         at {examples_per_second:g} examples/s per rank: {seconds:.1f} s a round, "
            f"{seconds * config.federation.rounds / 60:.1f} min in all, evaluation and exchange not counted"
        )


def _passes(job: Job) -> float:
    """How often a device passes over its examples in a round, as a mean over the run."""
    config = job.config
    usual = int(_examples_each(job))
    steps = np.mean([local_steps(config, usual, t) for t in range(config.federation.rounds)])
    return float(steps / -(-usual // config.device.batch_size) + method_of(job).uploads_gradient)


def _examples_each(job: Job) -> float:
    """Training examples of a device that can train, as a mean."""
    devices = training_devices(job.config)
    return sum(len(job.partition.train[device]) for device in devices) / len(devices)
