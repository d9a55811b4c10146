"""What a checkpoint promises: the run's state to the bit, or a message that says what is wrong with it."""

import errno
import json
import os
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from states import ALL, SHAPE, SOME, TUNING, bits, vector

from fedhpc.checkpoint import files as checkpoint_files
from fedhpc.checkpoint import state_file
from fedhpc.checkpoint import store as checkpoint
from fedhpc.checkpoint.control_variates import ControlVariates
from fedhpc.checkpoint.device_state import DeviceState, UnfinishedUpdate
from fedhpc.checkpoint.files import CONTROL, LOCAL, Position, device_of, read_checksums, verify
from fedhpc.checkpoint.state_file import RoundProgress, RunState, read_server_file
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.commands import inspect as inspection
from fedhpc.config import section_of
from fedhpc.errors import CheckpointError, ConfigError
from fedhpc.exchange import LocalExchange, messages
from fedhpc.files import write_whole
from fedhpc.job.environment import job_environment
from fedhpc.job.lock import RunLock
from fedhpc.job.stopping import StopRequest
from fedhpc.methods import ServerState
from fedhpc.registry import TUNINGS
from fedhpc.server.saving import CheckpointWriter
from fedhpc.tuning import make_tuning

IDENTITY = {"seed": 1, "server.method": "fedpeptao", "server.variant": "released", "sha256": "0"}
RECORD = {
    "round": 3,
    "loss": 0.1 + 0.2,
    "devices": [2, 7],
    "accuracy": None,
    "bytes": 7,
    "seconds": {"local": 1e-9, "idle": 0.0},
}


def run_state(round_index, layers=SOME, seed=0):
    n = TUNING.exchanged(layers).size
    names = ("momentum", "previous_delta", "control_global")
    return RunState(
        server=ServerState(
            round=round_index,
            params=vector([seed, 0], n),
            vectors={name: vector([seed, 1 + place], n) for place, name in enumerate(names)},
            scalars={"server_learning_rate": 0.1 + 0.2},
        ),
        layers=layers,
        selected=layers == SOME,
        ratio=0.5,
        scores=np.random.default_rng(seed).standard_normal(4),
        unseen_local=vector([seed, 9], TUNING.local(layers).size),
        update_norms=(1.0, 1 / 3),
        record=RECORD,
    )


def device_state(seed, layers=SOME, *, moments=True):
    return DeviceState(
        local=vector(seed, TUNING.local(layers).size), steps_taken=5 + seed, moments=adam(seed) if moments else None
    )


def adam(seed):
    """Moments of every tensor; PyTorch's step count is one number."""
    moments = {}
    for tensor, shape in TUNING.shapes.items():
        for part in ("exp_avg", "exp_avg_sq"):
            moments[f"{tensor}.{part}"] = vector([seed, len(moments)], np.prod(shape)).reshape(shape)
        moments[f"{tensor}.step"] = np.array(3 + seed, np.float32)
    return moments


def control(*devices, layers=SOME, seed=0):
    return {device: vector([seed, device], TUNING.exchanged(layers).size) for device in devices}


def upload(device, layers=SOME):
    record = messages.upload_record(TUNING.exchanged(layers).size).zeros(1)
    messages.upload_headers(record)[0] = (device, 20, 6, 1 / 3, 0.1 + 0.2, 3, 1e9, 0)
    payloads = messages.upload_payloads(record, TUNING.exchanged(layers).size)
    payloads[0] = vector(device, payloads.size)
    return record[0]


def unfinished(seed):
    tensors = {name: vector(seed, np.prod(shape)).reshape(shape) for name, shape in TUNING.shapes.items()}
    return UnfinishedUpdate(tensors=tensors, moments=adam(seed), losses=vector(seed, 4))


class Run:
    """The server of a run, with workers that save what they are given."""

    def __init__(self, folder, keep=2):
        self.checkpoints = Checkpoints(folder)
        self.config = SimpleNamespace(keep=keep)
        config = SimpleNamespace(checkpoint=self.config, run_dir=folder)
        job = SimpleNamespace(tuning=TUNING, identity=IDENTITY, config=config)
        exchange = LocalExchange(StopRequest())
        exchange.handler = self.handle
        lock = SimpleNamespace(check=lambda: None)
        self.writer = CheckpointWriter(job, exchange, self.checkpoints, lock)
        self.exchange, self.work = exchange, []

    def save(self, state, *, control=None, states=None, progress=()):
        """A checkpoint within a round has one part of its progress for every worker."""
        self.begin_save(state, control=control, states=states, progress=progress)
        self.writer.wait()
        return self.writer.newest

    def begin_save(self, state, *, control=None, states=None, progress=()):
        self.work = [(states or {}, part) for part in progress or [None]]
        self.exchange.num_workers = len(self.work)
        self.writer.control.update(control or {})
        return self.writer.save(state, in_round=bool(progress))

    def handle(self, command):
        for worker, (states, progress) in enumerate(self.work):
            self.checkpoints.save_devices(
                {device: state for device, state in states.items() if device % len(self.work) == worker},
                progress,
                generation=command.generation,
                round_index=command.round,
                rank=worker + 1,
                layers=command.layers,
                tuning=TUNING,
                post=self.exchange.post,
            )
        return messages.NO_RECORD.zeros(0)

    def newest(self, report=pytest.fail):
        return self.checkpoints.newest(TUNING, check=lambda identity: None, report=report)

    def resume(self, report=pytest.fail):
        state = self.newest(report)
        self.writer.go_on_from(state)
        return state

    def devices(self, position, wanted, layers=SOME, unseen=None):
        return self.checkpoints.load_devices(position, set(wanted), TUNING, layers, unseen)

    def control(self, position, layers=SOME):
        found = ControlVariates(self.checkpoints, TUNING, self.checkpoints.device_files(position))
        return found.fetch(range(100), layers)

    def names(self, kind):
        return sorted(path.name for path in (self.checkpoints.folder / kind).iterdir())


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.mark.parametrize("layers", [SOME, ALL])
def test_what_is_saved_comes_back_to_the_bit(run, layers):
    state = run_state(4, layers)
    states = {3: device_state(3, layers), 11: device_state(11, layers, moments=False)}
    position = run.save(state, control=control(2, 7, layers=layers), states=states)
    identities = []
    found = run.checkpoints.newest(TUNING, check=identities.append, report=pytest.fail)
    assert identities == [IDENTITY]
    assert position == Position.of(found) == Position(4)
    assert bits(found) == bits(replace(state, generation=1))
    devices, progress = run.devices(position, {3, 11, 99}, layers)
    assert bits(devices) == bits(states)
    assert bits(progress) == bits(RoundProgress(round=4))
    assert list(run.devices(position, {11, 99}, layers)[0]) == [11]
    assert bits(run.control(position, layers)) == bits(control(2, 7, layers=layers))


def test_a_state_without_scores_record_or_local_tensors_comes_back_too(run):
    state = replace(run_state(0, ALL), scores=None, record=None, update_norms=())
    run.save(state)
    assert bits(run.newest()) == bits(replace(state, generation=1))


def test_a_round_under_way_comes_back_to_the_bit_on_any_number_of_ranks(run):
    first = RoundProgress(round=4, finished={2: upload(2), 4: upload(4)}, unfinished={6: unfinished(6)})
    second = RoundProgress(round=4, finished={7: upload(7)}, unfinished={9: unfinished(9)})
    states = {2: device_state(2), 4: device_state(4), 7: device_state(7)}
    run.save(run_state(4))
    position = run.save(run_state(4), states=states, control=control(5), progress=[first, second])
    assert position == Position(4, part=2)
    state = run.newest()
    assert (Position.of(state), state.generation) == (position, 2)
    everything = RoundProgress(
        round=4,
        finished={**first.finished, **second.finished},
        unfinished={**first.unfinished, **second.unfinished},
    )
    assert bits(run.devices(position, range(10))) == bits((states, everything))
    devices, progress = run.devices(position, {4, 5, 6})
    assert bits(devices) == bits({4: states[4]})
    assert bits(progress) == bits(RoundProgress(round=4, finished={4: first.finished[4]}, unfinished=first.unfinished))


def test_generations_within_a_round_stand_between_the_rounds(run):
    assert [str(position) for position in sorted([Position(5), Position(4, 9), Position(4), Position(4, 10)])] == [
        "round_000004",
        "round_000004_part_000009",
        "round_000004_part_000010",
        "round_000005",
    ]
    for name in ("round_000004", "round_000004_part_000009", "round_1000000", "round_000004_part_1234567"):
        assert str(Position.parse(name)) == name
    for name in ("round_4", "round_000004_part_", "round_000004.partial", "xround_000004", "round_000004_part_000009x"):
        assert Position.parse(name) is None
    for state, progress in ((4, []), (4, [RoundProgress(round=4)]), (5, [])):
        run.save(run_state(state), progress=progress)
    assert run.checkpoints.positions() == [Position(5), Position(4, 2)]


def datasets(file):
    found = {}
    file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    return found


def layout_of(path):
    """Dataset -> shape and type; every array that has chunks has checksums."""
    with h5py.File(path) as file:
        for dataset in datasets(file).values():
            assert dataset.fletcher32 or not dataset.size or not dataset.ndim
        assert (file.attrs["format"], file.attrs["version"]) == ("fedhpc-checkpoint", 3)
        found = {name: (dataset.shape, dataset.dtype.name) for name, dataset in datasets(file).items()}
        return found, dict(file.attrs), {name: dict(item.attrs) for name, item in datasets(file).items() if item.attrs}


def test_the_files_are_as_documented(run):
    prompts, head = ((2, 2, 3, 2), "float32"), ((5, 2), "float32")
    bias = ((5,), "float32")
    whole = {tensor: (shape, "float32") for tensor, shape in TUNING.shapes.items()}
    progress = RoundProgress(round=4, finished={2: upload(2)}, unfinished={6: unfinished(6)})
    position = run.save(run_state(4), control=control(7, 2), states={2: device_state(2)}, progress=[progress])
    folder = run.checkpoints.path(position)
    assert folder.name == (run.checkpoints.folder / "LATEST").read_text().strip() == "round_000004_part_000001"
    assert {path.name for path in folder.iterdir()} == {"server.h5", "progress_0001.h5", "SHA256SUMS", "COMPLETE"}
    assert run.names(CONTROL) == ["000002_000001.h5", "000007_000001.h5"]
    assert run.names(LOCAL) == ["000002_000001.h5"]

    found, attributes, of_datasets = layout_of(folder / "server.h5")
    names = {"": "", "momentum": "momentum_", "previous_delta": "previous_delta_", "control/global": "control/global_"}
    assert found == {
        **{name or "prompts": prompts for name in names},
        **{f"{prefix}params/head.weight": head for prefix in names.values()},
        **{f"{prefix}params/head.bias": bias for prefix in names.values()},
        "control/device_ids": ((2,), "int64"),
        "unseen_local_prompts": prompts,
        "selection/layers": ((2,), "int64"),
        "selection/scores": ((4,), "float64"),
        "history/update_norm": ((2,), "float64"),
        "history/record": ((len(json.dumps(RECORD)),), "uint8"),
    }
    assert (attributes["round"], attributes["part"], attributes["generation"]) == (4, 1, 1)
    assert (attributes["seed"], attributes["method"], attributes["variant"]) == (1, "fedpeptao", "released")
    assert json.loads(attributes["config"]) == IDENTITY
    assert {"config_sha256", "fedhpc_version", "created", "selected", "vectors", "scalars"} <= set(attributes)
    assert of_datasets["prompts"]["layers"].tolist() == [1, 3]
    assert of_datasets["selection/layers"]["ratio"] == of_datasets["selection/scores"]["ratio"] == 0.5

    found, attributes, _ = layout_of(run.checkpoints.folder / "control/000002_000001.h5")
    assert found == {"control": prompts, "control_params/head.weight": head, "control_params/head.bias": bias}
    assert (attributes["round"], attributes["layers"].tolist()) == (4, [1, 3])

    moments = {f"{tensor}.{part}": form for tensor, form in whole.items() for part in ("exp_avg", "exp_avg_sq")}
    moments |= {f"{tensor}.step": ((), "float32") for tensor in whole}
    found, attributes, _ = layout_of(run.checkpoints.folder / "local/000002_000001.h5")
    assert found == {"local_prompts": prompts, **{f"optimizer/{name}": form for name, form in moments.items()}}
    assert (attributes["round"], attributes["layers"].tolist(), attributes["steps_taken"]) == (4, [1, 3], 7)

    found, attributes, _ = layout_of(folder / "progress_0001.h5")
    assert found == {
        "finished/2/upload": ((TUNING.exchanged(SOME).size,), "float32"),
        "unfinished/6/losses": ((4,), "float32"),
        **{f"unfinished/6/params/{tensor}": form for tensor, form in whole.items()},
        **{f"unfinished/6/optimizer/{name}": form for name, form in moments.items()},
    }
    assert attributes["round"] == 4
    with h5py.File(folder / "progress_0001.h5") as file:
        assert dict(file["finished/2"].attrs) == {
            "num_examples": 20,
            "num_steps": 6,
            "loss": 1 / 3,
            "seconds": 0.1 + 0.2,
            "fault": 3,
            "norm": 1e9,
        }


def test_sha256sum_checks_a_checkpoint(run):
    everything = {"control": control(2), "states": {3: device_state(3)}, "progress": [RoundProgress(round=4)]}
    folder = run.checkpoints.path(run.save(run_state(4), **everything))

    def problems(*names):
        found = subprocess.run(
            ["sha256sum", "--strict", "--quiet", "-c", *names], cwd=folder, capture_output=True, text=True, check=False
        )
        assert bool(found.returncode) == bool(found.stdout)
        return found.stdout

    files = {"server.h5", "progress_0001.h5", "../control/000002_000001.h5", "../local/000003_000001.h5"}
    assert set(read_checksums(folder)) == files
    assert problems("COMPLETE", "SHA256SUMS") == ""
    for name in sorted(files):
        content = (folder / name).read_bytes()
        flip_bit(folder / name)
        assert problems("COMPLETE", "SHA256SUMS") == f"{name}: FAILED\n"
        (folder / name).write_bytes(content)
    drop_line(folder / "SHA256SUMS")
    assert problems("COMPLETE", "SHA256SUMS") == "SHA256SUMS: FAILED\n"


def test_a_local_state_from_before_the_layers_changed_starts_from_the_unseen_one(run):
    control = vector(1, TUNING.exchanged(ALL).size)
    states = {3: replace(device_state(3, ALL), kept={"control": control}), 5: device_state(5, ALL, moments=False)}
    run.save(run_state(1, ALL), states=states)
    position = run.save(run_state(2, SOME))
    unseen = vector(0, TUNING.local(SOME).size)
    found, _ = run.devices(position, {3, 5}, SOME, unseen)
    whole, narrowed = TUNING.exchanged(ALL).views(control), TUNING.exchanged(SOME).views(found[3].kept["control"])
    assert bits(narrowed) == bits({name: each[[1, 3]] if name == "prompts" else each for name, each in whole.items()})
    states[3] = replace(states[3], kept=found[3].kept)
    assert bits(found) == bits({device: replace(state, local=unseen) for device, state in states.items()})


def test_a_control_variate_from_before_the_layers_changed_is_restricted_when_read(run):
    run.save(run_state(1, ALL), control=control(2, 3, layers=ALL))
    position = run.save(run_state(2, SOME), control=control(3))
    whole = TUNING.exchanged(ALL).views(control(2, layers=ALL)[2])
    found = run.control(position)
    assert list(found) == [2, 3]
    tensors = TUNING.exchanged(SOME).views(found[2])
    assert bits(tensors["prompts"]) == bits(whole["prompts"][[1, 3]])
    assert bits(tensors["head.weight"]) == bits(whole["head.weight"])
    assert bits(found[3]) == bits(control(3)[3])


def test_old_generations_go_and_of_the_devices_files_those_that_no_generation_names(run):
    for round_index, devices in ((1, (0, 1)), (2, (1, 2)), (3, (2, 3)), (10, (3,))):
        states = {device: device_state(device) for device in devices}
        run.save(run_state(round_index), control=control(*devices, seed=round_index), states=states)
    assert run.checkpoints.positions() == [Position(10), Position(3)]
    assert (run.checkpoints.folder / "LATEST").read_text() == "round_000010\n"
    assert {path.name for path in run.checkpoints.folder.iterdir()} == {
        "LATEST",
        "control",
        "local",
        "round_000003",
        "round_000010",
    }
    # Device 3: generation 3 for round 3, generation 4 for round 10.
    files = ["000000_000001.h5", "000001_000002.h5", "000002_000003.h5", "000003_000003.h5", "000003_000004.h5"]
    assert run.names(CONTROL) == run.names(LOCAL) == files
    for position in run.checkpoints.positions():
        verify(run.checkpoints.path(position))
    for position, seed_of_3 in ((Position(10), 10), (Position(3), 3)):
        expected = control(0, seed=1) | control(1, seed=2) | control(2, seed=3) | control(3, seed=seed_of_3)
        assert bits(run.control(position)) == bits(expected)
        assert set(run.devices(position, range(10))[0]) == {0, 1, 2, 3}


def identities_of_files(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_only_the_files_of_devices_that_took_part_are_written_anew(run):
    everyone = range(5)
    run.save(run_state(1), control=control(*everyone), states={device: device_state(device) for device in everyone})
    kinds = [run.checkpoints.folder / kind for kind in (CONTROL, LOCAL)]
    before = [identities_of_files(kind) for kind in kinds]
    position = run.save(run_state(2), control=control(1, seed=5), states={3: device_state(4)})
    after = [identities_of_files(kind) for kind in kinds]
    for old, new, device in zip(before, after, (1, 3), strict=True):
        assert old.items() <= new.items()
        assert new.keys() - old.keys() == {f"{device:06d}_000002.h5"}
    assert bits(run.control(position)) == bits(control(*everyone) | control(1, seed=5))
    assert bits(run.devices(position, everyone)[0]) == bits(
        {device: device_state(device) for device in everyone} | {3: device_state(4)}
    )


def test_a_resumed_run_goes_on_with_the_device_files_of_its_checkpoint(run, tmp_path):
    run.save(run_state(1), control=control(2, 3), states={3: device_state(3)})
    again = Run(tmp_path)
    assert again.resume().generation == 1
    position = again.save(run_state(2), control=control(3, seed=7))
    assert bits(again.control(position)) == bits(control(2) | control(3, seed=7))
    assert bits(again.devices(position, {3})[0]) == bits({3: device_state(3)})
    assert again.newest().generation == 2


def test_a_checkpoint_holds_what_was_in_memory_when_it_was_begun(run, monkeypatch):
    go_on = threading.Event()
    write = Checkpoints.write_device_file

    def slow_write(*arguments):
        assert go_on.wait(60)
        return write(*arguments)

    monkeypatch.setattr(Checkpoints, "write_device_file", slow_write)
    run.begin_save(run_state(1), control=control(2, 3))
    run.writer.control.update(control(3, seed=8))
    go_on.set()
    run.writer.wait()
    assert bits(run.control(Position(1))) == bits(control(2, 3))
    assert list(run.writer.control.fresh) == [3]
    assert bits(run.writer.control.fetch([2, 3], SOME)) == bits(control(2) | control(3, seed=8))
    assert bits(run.control(run.save(run_state(2)))) == bits(control(2) | control(3, seed=8))


def test_an_unfinished_checkpoint_does_not_count_and_leaves_nothing_behind(run, tmp_path):
    run.save(run_state(1), control=control(2))
    killed = Run(tmp_path)
    killed.checkpoints.begin()
    killed.work = [({3: device_state(3)}, RoundProgress(round=1))]
    killed.handle(messages.Command(op=messages.Op.SAVE, round=1, generation=9, layers=SOME))
    (run.checkpoints.folder / "local/000003_000010.h5.partial").write_bytes(b"cut off")
    assert run.newest().server.round == 1
    run.save(run_state(2))
    assert run.newest().server.round == 2
    assert (run.names(LOCAL), run.names(CONTROL)) == ([], ["000002_000001.h5"])
    assert not run.checkpoints.partial.exists()


@pytest.mark.parametrize("method", ["write_device_file", "commit"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(run, monkeypatch, method):
    run.save(run_state(1), control=control(2))

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, method, fail)
    with pytest.raises(OSError, match="No space"):
        run.save(run_state(2), control=control(2, seed=4))
    assert run.newest().server.round == 1
    assert bits(run.control(Position(1))) == bits(control(2))


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def drop_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def replace_by_link(path, elsewhere="../elsewhere"):
    path.rename(path.parent / elsewhere)
    path.symlink_to(elsewhere)


def swap(path, other):
    between = path.with_name("between")
    path.rename(between)
    other.rename(path)
    between.rename(other)


CONTROL_FILE, LOCAL_FILE = "../control/000002_000002.h5", "../local/000003_000002.h5"
DAMAGES = {
    "flipped bit": lambda folder: flip_bit(folder / "server.h5"),
    "flipped bit in the progress": lambda folder: flip_bit(folder / "progress_0001.h5"),
    "flipped bit in a control variate": lambda folder: flip_bit(folder / CONTROL_FILE),
    "flipped bit in a local state": lambda folder: flip_bit(folder / LOCAL_FILE),
    "truncated": lambda folder: (folder / "server.h5").write_bytes((folder / "server.h5").read_bytes()[:-1]),
    "empty": lambda folder: (folder / "server.h5").write_bytes(b""),
    "missing": lambda folder: (folder / "progress_0001.h5").unlink(),
    "missing control variate": lambda folder: (folder / CONTROL_FILE).unlink(),
    "missing local state": lambda folder: (folder / LOCAL_FILE).unlink(),
    "additional": lambda folder: (folder / "progress_0002.h5").write_bytes(b""),
    "no sums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "empty sums": lambda folder: (folder / "SHA256SUMS").write_text(""),
    "sums with a line less": lambda folder: drop_line(folder / "SHA256SUMS"),
    "sums that are no text": lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\x00"),
    "no seal": lambda folder: (folder / "COMPLETE").unlink(),
    "flipped bit in the seal": lambda folder: flip_bit(folder / "COMPLETE"),
    "swapped": lambda folder: swap(folder / "server.h5", folder / "progress_0001.h5"),
    "swapped devices": lambda folder: swap(folder / CONTROL_FILE, folder / "../control/000003_000002.h5"),
    "an older control variate": lambda folder: write_whole(
        folder / CONTROL_FILE, (folder / "../control/000002_000001.h5").read_bytes()
    ),
    "symbolic link": lambda folder: replace_by_link(folder / "server.h5"),
    "symbolic link to a control variate": lambda folder: replace_by_link(folder / CONTROL_FILE),
    "symbolic link to a local state": lambda folder: replace_by_link(folder / LOCAL_FILE),
    "symbolic link to the folder": lambda folder: replace_by_link(folder, "elsewhere"),
    "a file in the folder's place": lambda folder: (
        folder.rename(folder.parent / "elsewhere"),
        folder.write_bytes(b""),
    ),
    "a folder in a file's place": lambda folder: ((folder / "server.h5").unlink(), (folder / "server.h5").mkdir()),
}


def save_two(run):
    """After round 1, and within round 2, where every device has a new file; the state of the first."""
    progress = RoundProgress(round=1, finished={2: upload(2)})
    run.save(run_state(1), control=control(2, 3), states={3: device_state(3)})
    state = run.newest()
    run.save(run_state(1), control=control(2, 3, seed=5), states={3: device_state(4)}, progress=[progress])
    assert run.checkpoints.positions() == [Position(1, 2), Position(1)]
    return state


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_reported_and_the_generation_before_is_used(run, tmp_path, damage):
    state = save_two(run)
    broken = run.checkpoints.path(Position(1, 2))
    damage(broken)
    reports = []
    assert bits(run.newest(reports.append)) == bits(state)
    assert len(reports) == 1
    assert str(broken) in reports[0]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_goes_on_from_behind_a_damaged_checkpoint_and_removes_it(run, tmp_path, damage):
    save_two(run)
    damage(run.checkpoints.path(Position(1, 2)))
    again = Run(tmp_path)
    again.resume(report=lambda line: None)
    for round_index in (2, 3):
        again.save(run_state(round_index), control=control(4, seed=round_index))
    assert again.checkpoints.positions() == [Position(3), Position(2)]
    for position in again.checkpoints.positions():
        verify(again.checkpoints.path(position))
        assert set(again.control(position)) == {2, 3, 4}


def test_without_a_whole_checkpoint_nothing_is_used(run):
    for name in ("round_000001", "round_000001_part_000002"):
        if name.endswith("1"):
            save_two(run)
        flip_bit(run.checkpoints.folder / name / "server.h5")
    reports = []
    with pytest.raises(CheckpointError, match="no checkpoint is whole") as caught:
        run.newest(reports.append)
    assert len(reports) == 2
    for position in run.checkpoints.positions():
        assert str(run.checkpoints.path(position)) in str(caught.value)


def test_a_run_that_saves_meanwhile_is_read_again(run, monkeypatch):
    """A checkpoint may be gone before its reader comes to it: the run beside it keeps two."""
    save_two(run)
    monkeypatch.setattr(checkpoint, "verify", save_meanwhile(run, checkpoint.verify))
    reports = []
    assert run.newest(reports.append).server.round == 3
    assert len(reports) == 2


def test_a_checkpoint_leaves_the_list_before_any_file_of_it_goes(run, monkeypatch):
    """So whoever reads beside a run can tell what it has removed from what is damaged."""
    remove, removed = shutil.rmtree, []

    def slow(path, **options):
        for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
            file.unlink()
            removed.append(file)
            for position in run.checkpoints.positions():
                verify(run.checkpoints.path(position))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)
    for round_index in (1, 2, 3, 4):
        run.save(run_state(round_index), control=control(round_index, 7), states={5: device_state(round_index)})
    assert len(removed) == 2 * 3
    assert run.checkpoints.positions() == [Position(4), Position(3)]


def save_meanwhile(run, function):
    """The function, during whose first call the run saves twice: the checkpoints before are gone."""

    def slow(*arguments):
        if run.checkpoints.positions()[0].round == 1:
            for round_index in (2, 3):
                run.save(run_state(round_index), control=control(4))
        return function(*arguments)

    return slow


def test_inspect_leaves_out_what_a_run_removes_meanwhile(run, tmp_path, monkeypatch):
    save_two(run)
    monkeypatch.setattr(inspection, "verify", save_meanwhile(run, inspection.verify))
    text, valid = inspection.inspect_text(str(tmp_path))
    assert valid
    assert "NOT VALID" not in text
    assert [Path(line.split()[1]).name for line in text.splitlines() if line.startswith("checkpoint ")] == [
        "round_000003:",
        "round_000002:",
    ]


def test_what_a_report_wants_is_read_from_the_newest_whole_file(run, monkeypatch):
    save_two(run)
    assert run.checkpoints.newest_readable(lambda file: int(file.attrs["part"])) == 2
    flip_bit(run.checkpoints.path(Position(1, 2)) / "server.h5")
    assert run.checkpoints.newest_readable(lambda file: int(file.attrs["part"])) == 0
    monkeypatch.setattr(checkpoint_files, "read_checksums", save_meanwhile(run, read_checksums))
    assert run.checkpoints.newest_readable(lambda file: int(file.attrs["round"])) == 3
    for position in run.checkpoints.positions():
        flip_bit(run.checkpoints.path(position) / "server.h5")
    assert run.checkpoints.newest_readable(dict) is None


@pytest.mark.parametrize("name", ["round_000007", "round_000001_part_000009", "round_000002"])
def test_a_folder_under_the_name_of_another_round_is_refused(run, name):
    state = save_two(run)
    run.checkpoints.path(Position(1, 2)).rename(run.checkpoints.folder / name)
    reports = []
    assert bits(run.newest(reports.append)) == bits(state)
    assert len(reports) == 1
    assert "not what its name says" in reports[0]
    assert name in reports[0]


def test_two_folders_that_were_swapped_are_refused(run):
    save_two(run)
    swap(*(run.checkpoints.path(position) for position in run.checkpoints.positions()))
    reports = []
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        run.newest(reports.append)
    assert all("not what its name says" in report for report in reports)
    assert len(reports) == 2


def test_going_on_from_behind_broken_checkpoints_keeps_the_whole_ones(run, tmp_path):
    run.config.keep = 3
    for round_index in (2, 4, 6):
        run.save(run_state(round_index), control=control(round_index))
    for broken in (4, 6):
        flip_bit(run.checkpoints.path(Position(broken)) / "SHA256SUMS")
    again = Run(tmp_path)
    assert again.resume(report=lambda line: None).server.round == 2
    again.save(run_state(3), control=control(3))
    assert again.checkpoints.positions() == [Position(3), Position(2)]
    assert again.newest().server.round == 3
    assert set(again.control(Position(3))) == {2, 3}


def test_a_broken_checkpoint_does_not_take_the_place_of_a_whole_one(run, tmp_path):
    save_two(run)
    flip_bit(run.checkpoints.path(Position(1, 2)) / "server.h5")
    again = Run(tmp_path)
    again.resume(report=lambda line: None)
    again.save(run_state(2))
    assert again.checkpoints.positions() == [Position(2), Position(1)]


def test_checkpoints_that_cannot_be_listed_or_read_now_are_neither_passed_over_nor_removed(run, monkeypatch):
    run.save(run_state(3))
    run.save(run_state(4))

    def fail(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    for holder, name in ((os, "listdir"), (Path, "read_text"), (Path, "read_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, fail)
            with pytest.raises(OSError, match="Stale file handle"):
                run.newest()
    assert run.checkpoints.positions() == [Position(4), Position(3)]


def test_a_run_that_saw_no_checkpoint_removes_none(run, tmp_path):
    run.save(run_state(4))
    other = Run(tmp_path)
    with pytest.raises(RuntimeError, match="has checkpoints that were not there when this run began"):
        other.save(run_state(1))
    assert run.resume().server.round == 4


def test_device_files_stay_while_a_list_that_may_name_them_cannot_be_read(run):
    run.save(run_state(3), control=control(2), states={2: device_state(2)})
    run.save(run_state(4), control=control(7))
    (run.checkpoints.path(Position(4)) / "SHA256SUMS").unlink()
    run.save(run_state(5), control=control(8))
    assert run.names(CONTROL) == ["000002_000001.h5", "000007_000002.h5", "000008_000003.h5"]
    assert run.names(LOCAL) == ["000002_000001.h5"]


def test_a_run_that_has_lost_its_directory_saves_nothing_more(run, tmp_path):
    run.save(run_state(3))
    with RunLock(tmp_path, job_environment({})) as run.writer.lock:
        run.save(run_state(4))
        run.writer.lock.path.unlink()  # as its successor does at its end
        with pytest.raises(RuntimeError, match="another run has taken over"):
            run.save(run_state(5))
    assert run.checkpoints.positions() == [Position(4), Position(3)]
    assert not run.checkpoints.partial.exists()


@pytest.mark.parametrize("damage", [drop_line, flip_bit], ids=["line dropped", "flipped bit"])
def test_a_broken_older_generation_does_not_end_the_run(run, damage):
    run.config.keep = 3
    for round_index in (1, 2, 3):
        run.save(run_state(round_index), control=control(round_index))
        damage(run.checkpoints.path(Position(1)) / "SHA256SUMS")
    run.save(run_state(4))
    assert run.newest().server.round == 4
    assert set(run.control(Position(4))) == {1, 2, 3}


def test_another_run_is_told_apart_before_its_tensors_are_read(run):
    run.save(run_state(1))
    other = make_tuning(section_of(TUNINGS, num_tokens=99), SHAPE, num_classes=5)

    def refuse(identity):
        raise ConfigError(f"not {identity['seed']}")

    with pytest.raises(ConfigError, match="not 1"):
        run.checkpoints.newest(other, check=refuse, report=pytest.fail)


def test_no_checkpoint_is_no_error(run):
    assert run.newest() is None
    run.checkpoints.folder.mkdir()
    (run.checkpoints.folder / "notes.txt").write_text("")
    assert run.newest() is None


def test_a_checkpoint_of_a_newer_format_is_refused(run, monkeypatch):
    monkeypatch.setattr(state_file, "VERSION", 4)
    run.save(run_state(1))
    monkeypatch.undo()
    reports = []
    with pytest.raises(CheckpointError, match="version 4; this fedhpc reads version 3"):
        run.newest(reports.append)
    assert len(reports) == 1


@pytest.mark.parametrize(
    ("attribute", "value", "words"), [("version", 4, "version 4"), ("format", "x", "not a fedhpc checkpoint")]
)
def test_files_of_another_format(run, attribute, value, words):
    path = run.checkpoints.path(run.save(run_state(1))) / "server.h5"
    with h5py.File(path, "a") as file:
        file.attrs[attribute] = value
    with pytest.raises(CheckpointError, match=words):
        read_server_file(path.read_bytes(), "server.h5", TUNING, lambda identity: None)


def test_a_device_file_is_known_by_its_name():
    assert device_of("../control/000123_000007.h5") == 123
    assert device_of("../local/1000000_000007.h5") == 1_000_000
