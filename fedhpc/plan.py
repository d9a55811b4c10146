"""`fedhpc plan`: what a run would need, from shapes and counts alone."""

import math
from collections.abc import Iterator

import numpy as np

from fedhpc.config import Config
from fedhpc.encoding import make_encoding
from fedhpc.federation import Homes, batches_per_epoch, count_packs, population
from fedhpc.job import Job, check_data, check_run_dir, job_notices, load_job
from fedhpc.messages import HEADER, UPLOAD_HEADER
from fedhpc.methods import Method, make_method
from fedhpc.pretrained import count_parameters
from fedhpc.report import human_bytes
from fedhpc.selection import num_selected
from fedhpc.spectrum import LANCZOS_STEPS

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS_BYTES = 450e6
"""Python with PyTorch and transformers, before any weight; measured on Linux with the CPU build."""
ACTIVATION_FACTOR = 34
ATTENTION_FACTOR = 5
"""Bytes per token, layer and hidden unit (and per attention weight) that a 16-bit transformer layer keeps for its
backward pass: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022, equation 1. A
frozen backbone keeps less: an upper bound."""


def plan_text(config: Config, *, ranks: int, examples_per_second: float | None) -> str:
    """The plan as text.

    Raises:
        UserError: the run could not start.
    """
    job = load_job(config)
    check_data(job)
    check_run_dir(config, create=False)
    num_workers = max(1, ranks - 1)
    total = count_parameters(job.shape.name)
    sections = (
        _overview(job, total),
        _traffic(job, ranks, total),
        _memory(job, ranks, total),
        _stop(job, num_workers),
        _placement(job, ranks),
        _time(job, num_workers, examples_per_second),
        [f"note: {notice}" for notice in job_notices(job)],
    )
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section)))


def _selected(job: Job) -> int:
    """How many layers will be exchanged, as far as that is known before the run."""
    selection, num_layers = job.config.selection, job.shape.num_layers
    if selection.strategy == "explicit":
        return len(selection.layers or [])
    if selection.strategy == "all" or selection.ratio == "auto":
        return num_layers
    return num_selected(selection.ratio, num_layers)


def _trainable(job: Job) -> int:
    return job.tuning.exchanged(range(job.shape.num_layers)).size


def _overview(job: Job, total: int) -> Iterator[str]:
    description, shape = job.data.description, job.shape
    exchanged = job.tuning.exchanged(range(_selected(job))).size
    yield f"backbone     {shape.name}: {shape.num_layers} layers, keys {shape.key_width} wide, {total:,} parameters"
    train, validation = (len(job.data.split(name)) for name in ("train", "validation"))
    yield f"data         {description.task}: {train} training and {validation} evaluation examples"
    yield f"trainable    {_trainable(job):,} parameters ({_trainable(job) / total:.2%} of the backbone)"
    auto = " until the warm-up ends" if job.config.selection.is_automatic else ""
    yield f"exchanged    {exchanged:,} parameters, {_selected(job)} of {shape.num_layers} layers{auto}"


def _traffic(job: Job, ranks: int, total: int) -> Iterator[str]:
    exchanged = 4 * job.tuning.exchanged(range(_selected(job))).size
    everything = 4 * _trainable(job)
    model = DTYPE_BYTES[job.config.model.dtype] * total
    config, method = job.config, _method(job)
    encoding = make_encoding(config, method)
    devices = config.federation.devices_per_round
    packs = count_packs(config.federation.devices_per_round, _pack(job))
    uploads, headers = devices if ranks > 1 else 0, UPLOAD_HEADER.itemsize
    up = ("up, uploads", uploads, method.num_uploaded * encoding.dtype.itemsize / 4, headers)
    if encoding.num_sums:
        up = ("up, sums", min(1, uploads), 2.0 * encoding.num_sums, headers * devices)
    yield "bytes per round        selected layers    all layers    full model"
    for direction, copies, scale, header in (
        ("down, broadcast", ranks - 1, 1.0 + len(method.sends), HEADER.itemsize + 4 * packs),
        up,
    ):
        sizes = [human_bytes(copies * (size + header)) for size in (scale * exchanged, scale * everything, model)]
        yield f"  {direction:<15} x{copies:<4} {sizes[0]:>15} {sizes[1]:>13} {sizes[2]:>13}"


def _memory(job: Job, ranks: int, total: int) -> Iterator[str]:
    config, shape = job.config, job.shape
    n = 4 * job.tuning.exchanged(range(_selected(job))).size
    vectors, method, sampled = _server_vectors(job), _method(job), config.federation.devices_per_round
    summed, uploaded = make_encoding(config, method).num_sums, sampled * method.num_uploaded
    arriving, size = (f"{summed} sums", 4 * n * summed) if summed else (f"{sampled} uploads", 2 * n * uploaded)
    # The sampled devices' own, and those that a checkpoint has not written yet.
    controls = (1 + config.checkpoint.every) * sampled * _has_control(job)
    server = {
        "program": PROCESS_BYTES,
        f"prompts and server state ({vectors} vectors)": n * vectors,
        f"control variates not on disk ({controls})": n * controls,
        f"buffer of {arriving}": size,
    }
    longest = max(split["longest"] for split in job.data.description.splits.values())
    tokens = _pack(job) * config.device.batch_size * (longest + config.tuning.tokens_in_attention)
    scale = DTYPE_BYTES[config.model.dtype] / 2
    per_layer = tokens * (ACTIVATION_FACTOR * shape.hidden_size + ATTENTION_FACTOR * shape.num_heads * longest) * scale
    kept_layers = 1 if config.model.gradient_checkpointing else shape.num_layers
    in_layers = sum(map(math.prod, job.tuning.per_layer.values()))
    in_a_pack = -(-sampled // count_packs(config.federation.devices_per_round, _pack(job)))
    device = {
        "program": PROCESS_BYTES,
        f"backbone, {config.model.dtype}": DTYPE_BYTES[config.model.dtype] * total,
        "weights with the device's changes": DTYPE_BYTES[config.model.dtype] * total * (config.tuning.kind == "full"),
        "prompts, gradients, Adam moments": 4 * _trainable(job) * (3 * in_a_pack + _pack(job)),
        "what devices keep": _kept(job) * -(-config.federation.num_devices // max(1, ranks - 1)),
        "activations (upper bound)": per_layer * kept_layers,
        "Lanczos vectors, once, after the warm-up": 8 * LANCZOS_STEPS * in_layers * config.selection.is_automatic,
    }
    roles = {"rank 0, server": server, "each device rank": device}
    if ranks == 1:
        roles = {"the one process": server | device}
    for role, parts in roles.items():
        yield f"memory of {role}: {human_bytes(sum(parts.values()))}"
        yield from (f"  {human_bytes(size):>9}  {part}" for part, size in parts.items() if size)


def _stop(job: Job, num_workers: int) -> Iterator[str]:
    """What a stop within a round writes: at most, if it comes when all but the last step of each rank is done."""
    config = job.config
    n = 4 * job.tuning.exchanged(range(_selected(job))).size
    sampled = config.federation.devices_per_round
    unwritten = config.checkpoint.every * sampled
    server = n * (_server_vectors(job) + unwritten * _has_control(job))
    finished = n * sampled * _method(job).num_uploaded + unwritten * _kept(job)
    begun = sampled if config.device.pack == "auto" else min(num_workers * config.device.pack, sampled)
    unfinished = (3 + _is_sparse(job)) * 4 * _trainable(job) * begun
    yield f"written at a stop: up to {human_bytes(server + finished + unfinished)} in the grace that the job is given"
    yield f"  {human_bytes(server):>9}  server: its vectors, control variates since the last checkpoint"
    yield f"  {human_bytes(finished):>9}  device ranks together: finished uploads, local states"
    yield f"  {human_bytes(unfinished):>9}  device ranks together: half-done updates, prompts and Adam moments"


def _kept(job: Job) -> int:
    """Bytes that a device keeps between its rounds: its own layers, what is left of its uploads, Adam's moments."""
    n, local = (4 * part(range(_selected(job))).size for part in (job.tuning.exchanged, job.tuning.local))
    method = _method(job)
    uploads = make_encoding(job.config, method).keeps + len(method.keeps)
    moments = 2 * 4 * _trainable(job) if job.config.device.keeps_moments else 0
    return local * (1 + _is_sparse(job)) + n * uploads + moments


def _is_sparse(job: Job) -> bool:
    """Whether devices measure the Fisher information of their own layers."""
    return job.config.sparse.fraction < 1


def _pack(job: Job) -> int:
    """Devices side by side; `auto` takes more than one only where there is memory for them."""
    pack = job.config.device.pack
    return 1 if pack == "auto" else min(pack, job.config.federation.devices_per_round)


def _server_vectors(job: Job) -> int:
    """The parameters and the method's own vectors."""
    return 1 + len(_method(job).init(np.zeros(1, np.float32)).vectors)


def _has_control(job: Job) -> bool:
    """Whether the server holds control variates."""
    return _method(job).has_control and job.config.exchange.mode == "gather"


def _method(job: Job) -> Method:
    return make_method(job.config.server, population(job.config, job.partition))


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
    examples = devices * len(job.data.split("train")) / config.federation.num_devices * _passes(job)
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
    usual = len(job.data.split("train")) // config.federation.num_devices
    used = np.mean([batches_per_epoch(config, usual, t) for t in range(config.federation.rounds)])
    share = used / -(-usual // config.device.batch_size)
    return float(config.device.epochs * share + _method(job).uploads_gradient)
