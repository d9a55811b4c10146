"""The memory that a run's ranks take at most, part by part; `fedhpc plan` shows it."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from transformers.utils import cached_file

from fedhpc.commands.rehearsal import Rehearsal, rehearsal
from fedhpc.errors import ModelError
from fedhpc.evaluate.predictions import device_batches, evaluation_examples
from fedhpc.exchange.encoding import Upload, make_encoding
from fedhpc.exchange.messages import UPLOAD_HEADER
from fedhpc.federation.packing import largest_pack
from fedhpc.federation.sampling import count_packs, most_at_once, population, upload_counts
from fedhpc.job.progress import human_bytes
from fedhpc.methods import Method, make_method
from fedhpc.model.numbers import no_surprise
from fedhpc.model.pretrained import run_config
from fedhpc.registry import METHODS
from fedhpc.selection import make_strategy
from fedhpc.selection.spectrum import LANCZOS_STEPS
from fedhpc.server.job import Job

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROGRAM_BYTES = 330e6
"""Python with PyTorch, transformers and MPI. This and the numbers below: Linux, PyTorch's CPU build, glibc 2.36, one
thread a rank; benchmarks/plan.py compares with runs."""
DEVICE_BYTES = 75e6
"""What a device rank loads besides: the model's code, kernels and their buffers."""
STRUCTURE_BYTES = 50e6
"""What any rank loads for a tuning that names modules of a backbone: its code, and its outline for a while."""
COMPILER_BYTES = 60e6
"""PyTorch's compiler, which its recomputation of activations loads."""
COMPILED_BYTES = 60e6
"""Kernels for 16 bits and for prepacked weights, which oneDNN compiles for every shape of a batch."""
ROOM = {"float32": 1.3, "bfloat16": 1.4, "float16": 1.4}
"""Memory that the allocator takes for tensors of many sizes, by what they hold. In 16 bits kernels lie among them."""
ROOM_RECOMPUTED = 2.4
"""The same with recomputation, whose layers' inputs stay between what each layer frees: 1.7 to 3.3."""
TOKENIZER_FACTOR = 15
"""Bytes of memory that a tokenizer takes while it is loaded, for each byte of its file."""
TOKENIZER_LEFT = 0.1
"""Share of these bytes that the allocator cannot use for anything else."""
ADDED = "what rounds add to the frozen weights"
STRUCTURE = "a look into the model's layers"
TOKENIZER = "tokenizer, while the data are checked"
Parts = dict[str, float]
"""What memory is for -> bytes."""


def memory_lines(job: Job, ranks: int) -> Iterator[str]:
    """Every role's memory and its parts, a line each."""
    try:
        with no_surprise("memory of the ranks: not known, its work cannot be rehearsed"):
            roles = memory_parts(job, ranks)
    except ModelError as error:
        yield str(error)
        return
    for role, parts in roles.items():
        yield f"memory of {role}: {human_bytes(sum(parts.values()))}"
        yield from (f"  {human_bytes(size):>9}  {part}" for part, size in parts.items() if size)
    yield "  with a GPU, backbone and tensors are in its memory, beside what CUDA takes there and on the host"


def memory_parts(job: Job, ranks: int) -> dict[str, Parts]:
    """The parts of the most that each kind of rank takes at a time, by role."""
    server = _server(job)
    with rehearsal(job) as work:
        packs = [pack_of(job)]
        if job.config.device.pack == "auto":
            packs.append(largest_pack(job.config.federation.devices_per_round, max(1, ranks - 1)))
        devices = {pack: _device(job, ranks, pack, work) for pack in dict.fromkeys(packs)}
    role = "each device rank" if ranks > 1 else "the one process"
    named = {
        role + (f", for pack {pack}" if len(devices) > 1 else ""): parts if ranks > 1 else _one_process(server, parts)
        for pack, parts in devices.items()
    }
    return named if ranks == 1 else {"rank 0, server": server, **named}


def _one_process(server: Parts, device: Parts) -> Parts:
    """A process that is both: it loads the program once, and has freed the tokenizer when it trains, but for pieces."""
    left = TOKENIZER_LEFT * server[TOKENIZER]
    return {**server, **device, TOKENIZER: 0, "pieces of the tokenizer's memory": left}


def _server(job: Job) -> Parts:
    config, n = job.config, exchanged_bytes(job)
    vectors, method, sampled = server_vectors(job), method_of(job), most_at_once(config)
    encoding, uploaded = make_encoding(config, method), sampled * method.num_uploaded
    summed, copies = encoding.num_sums, 4 if encoding.masked_among else 2
    arriving, size = (f"{summed} sums", 2 * copies * n * summed) if summed else (f"{sampled} uploads", 2 * n * uploaded)
    # The sampled devices' own, and those that a checkpoint has not written yet.
    controls = (1 + config.checkpoint.every) * sampled * has_control(job)
    state: Parts = {
        f"prompts and server state ({vectors} vectors), and the next prompts": n * (vectors + 1),
        "changes under way, copied in a step": n * changes_under_way(job),
        f"control variates not on disk ({controls})": n * controls,
        ADDED: 2 * added_bytes(job) + 2 * factors_bytes(job),
        f"buffer of {arriving}": size,
    }
    tokenizer = TOKENIZER_FACTOR * _tokenizer_bytes(config.model.name)
    return {
        "program": PROGRAM_BYTES,
        STRUCTURE: STRUCTURE_BYTES * job.tuning.reads_structure,
        **state,
        TOKENIZER: max(0, tokenizer - sum(state.values())),
    }


def _device(job: Job, ranks: int, pack: int, work: Rehearsal) -> Parts:
    config = job.config
    method, n, everything = method_of(job), exchanged_bytes(job), 4 * trainable(job)
    encoding = make_encoding(config, method)
    sampled = most_at_once(config)
    here = -(-sampled // max(1, ranks - 1))
    record = UPLOAD_HEADER.itemsize + upload_of(job).nbytes
    room = ROOM[config.model.dtype]
    lent = local_bytes(job) * -(-config.federation.num_devices // max(1, ranks - 1)) * (ranks > 2)
    room_of_steps = ROOM_RECOMPUTED if config.model.gradient_checkpointing else room
    phases = {
        "training": room_of_steps * work.training(pack, -(-sampled // count_packs(sampled, pack))),
        "evaluation": room * work.evaluation(devices_in_batch(job)) + everything + lent,
        "loading": work.loading - work.weights + _narrowed_bytes(job, work.loading),
    }
    if config.evaluate.generate:
        phases["answers"] = room * work.answers(devices_in_batch(job)) + everything + lent
    if make_strategy(config.selection).scored:
        phases["layer scores"] = room * work.scoring()
    if config.curriculum.order == "fisher":
        phases["order of the batches"] = room * work.curriculum()
    if config.selection.is_automatic and config.selection.warmup_rounds < config.federation.rounds:
        lanczos = 8 * LANCZOS_STEPS * _num_trained(job, job.tuning.per_layer)
        phases["Hessian"] = room * work.hessian() + lanczos
    first, *others = sorted(phases, key=lambda name: -phases[name])
    then = ", ".join(f"{name} {human_bytes(phases[name])}" for name in others if phases[name] > 0)
    is_compiled = config.model.dtype != "float32" or config.model.prepack_weights
    code = DEVICE_BYTES + is_compiled * COMPILED_BYTES
    code += config.model.gradient_checkpointing * COMPILER_BYTES
    return {
        "program": PROGRAM_BYTES,
        "model's code, kernels and their buffers": code,
        STRUCTURE: STRUCTURE_BYTES * job.tuning.reads_structure,
        f"backbone, {config.model.quantization or config.model.dtype}": work.weights,
        "backbone, prepacked": work.prepacked,
        "what was received, uploads": n * (1 + len(method.sends)) + here * record,
        ADDED: added_bytes(job) * (2 + DTYPE_BYTES[config.model.dtype] / 4) + factors_bytes(job),
        "masked sums": 2 * n * encoding.num_sums * (encoding.masked_among > 0),
        "what devices keep": kept_bytes(job) * -(-config.federation.num_devices // max(1, ranks - 1)),
        f"{first}: tensors at once (at other times: {then})": phases[first],
    }


def _narrowed_bytes(job: Job, loading: int) -> float:
    """What a backbone's files hold, if in more bits than are wanted: in memory until all of it is converted.

    The files may not be here yet; the model's configuration says their type, unless it is PyTorch's own.
    """
    stored = run_config(job.config.model).dtype or torch.float32
    wider = stored.itemsize / DTYPE_BYTES[job.config.model.dtype]
    return loading * wider if wider > 1 else 0


def _tokenizer_bytes(name: str) -> int:
    file = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    return Path(file).stat().st_size if file else 0


def selected(job: Job) -> int:
    """How many layers will be exchanged, as far as that is known before the run."""
    return make_strategy(job.config.selection).num_exchanged(job.shape.num_layers)


def exchanged_bytes(job: Job) -> int:
    """Bytes of a vector of the exchanged tensors."""
    return job.tuning.exchanged(range(selected(job))).nbytes


def trainable(job: Job) -> int:
    """Trained parameters of a device."""
    return _num_trained(job, job.tuning.shapes)


def _num_trained(job: Job, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(prod(shape) for name, shape in shapes.items() if job.tuning.is_trained(name))


def added_bytes(job: Job) -> int:
    """Bytes of what rounds add to the frozen weights."""
    return job.tuning.added_layout.nbytes * method_of(job).adds_weights


def factors_bytes(job: Job) -> int:
    """Bytes of the factors of what a round adds to the frozen weights."""
    return job.config.federation.devices_per_round * exchanged_bytes(job) * method_of(job).adds_weights


def local_bytes(job: Job) -> int:
    """Bytes of the tensors that a device has for itself."""
    layers = range(selected(job))
    return job.tuning.local(layers).nbytes if job.tuning.trains_local(layers) else 0


def devices_in_batch(job: Job) -> int:
    """The most devices whose examples are evaluated on together."""
    if not (local_bytes(job) or job.config.selection.is_automatic):
        return 1
    config, split, evaluated = job.config, job.data.split("validation"), job.partition.evaluated
    most = 1
    for count in {None, config.evaluate.examples}:
        chosen = evaluated[evaluation_examples(split.labels[evaluated], count, config.seed)]
        shares = {device: np.intersect1d(own, chosen) for device, own in enumerate(job.partition.validation)}
        batches = device_batches(split, shares, config.evaluate.batch_size, side_by_side=job.tuning.packable)
        most = max([most, *map(len, batches)])
    return most


def kept_bytes(job: Job) -> int:
    """What a device keeps between its rounds: its own layers, what is left of its uploads, Adam's moments."""
    local, method = local_bytes(job), method_of(job)
    uploads = make_encoding(job.config, method).keeps + len(method.keeps) + method.has_personal
    moments = 2 * 4 * trainable(job) if job.config.device.keeps_moments else 0
    return local * (1 + is_sparse(job)) + exchanged_bytes(job) * uploads + moments


def is_sparse(job: Job) -> bool:
    """Whether devices measure the Fisher information of their own layers."""
    return job.config.sparse.fraction < 1


def server_vectors(job: Job) -> int:
    """The parameters and the method's own vectors, the most changes under way included."""
    return 1 + len(method_of(job).init(np.zeros(1, np.float32)).vectors) + changes_under_way(job)


def changes_under_way(job: Job) -> int:
    """Vectors that a server which waits for no device keeps between two steps, at most."""
    return max(0, METHODS[job.config.server.method].concurrency(job.config) - 1)


def has_control(job: Job) -> bool:
    """Whether the server holds control variates."""
    return method_of(job).has_control and not job.config.exchange.sums_only


def method_of(job: Job) -> Method:
    """The server's."""
    counts = upload_counts(job.config, job.partition, job.data.split("train").num_terms)
    return make_method(job.config.server, population(job.config, counts))


def upload_of(job: Job) -> Upload:
    """How a device's upload is laid out."""
    method = method_of(job)
    return Upload.of(exchanged_bytes(job) // 4, make_encoding(job.config, method), method)


def pack_of(job: Job) -> int:
    """Devices side by side; `auto` takes more than one only where there is memory for them."""
    pack = job.config.device.pack
    return 1 if pack == "auto" else min(pack, job.config.federation.devices_per_round)
