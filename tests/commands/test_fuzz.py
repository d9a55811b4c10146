"""Hundreds of ways to damage a real checkpoint: each is noticed, or does no harm; never is there another state."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny
import yaml
from states import bits

from fedhpc.checkpoint.control_variates import ControlVariates
from fedhpc.checkpoint.files import CHECKSUMS_FILE, SEAL, Position, read_checksums, verify
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.commands import cli
from fedhpc.config.file import load_config
from fedhpc.errors import EXIT_STOPPED, EXIT_USER_ERROR, CheckpointError
from fedhpc.exchange import LocalExchange
from fedhpc.server import job as jobs

SEED = 20231206
AT_LEAST = 500
"""Mutations in all."""
NUM_DEVICES = 8
CHANGES = {
    "federation": {"num_devices": NUM_DEVICES, "sample_rate": 0.5, "rounds": 5, "partition": "iid"},
    "device": {"epochs": 1, "batch_size": 8, "learning_rate": 0.05, "reset_moments": False},
    "checkpoint": {"every": 2},
    "trace": False,
}
STOP_AT = 11
"""Step of round 3 before which the run is stopped: 240 examples on 8 devices are 4 batches of at most 8 for each, so
that two devices are done and one is begun."""
STEPPED_BACK, REFUSED, HARMLESS = "noticed, the generation before is used", "noticed, refused", "harmless"


@dataclass(frozen=True)
class Mutation:
    """One way to damage the folder `checkpoints`."""

    kind: str
    name: str
    apply: Callable[[Path], None]
    """On a copy, in which only whole files may be replaced: it shares them with the original."""
    hits: frozenset[str] = frozenset()
    """Files, relative to the folder, whose content or place the mutation changes."""
    unseen: bool = False
    """The newest generation is not there any more; nothing tells that it ever was."""


class Original:
    """A run that was stopped within a round, and what it would load."""

    def __init__(self, config):
        self.config, self.run_dir = config, tiny.run_dir(config)
        self.folder = self.run_dir / "checkpoints"
        self.job = jobs.load_job(load_config(config, []))
        self.newest, self.older = Checkpoints(self.run_dir).positions()
        self.belongs = {
            position: {
                os.path.normpath(f"{position}/{name}")
                for name in (*read_checksums(self.folder / str(position)), CHECKSUMS_FILE, SEAL)
            }
            for position in (self.newest, self.older)
        }
        self.files = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
        self.content = {name: (self.folder / name).read_bytes() for name in self.files}

    def copy(self, target, *, whole=False):
        """A run directory with the same checkpoints; with ``whole``, one that a run can go on in."""
        shutil.copytree(self.folder, target / "checkpoints", copy_function=os.link)
        for path in self.run_dir.iterdir() if whole else ():
            if path.is_file():
                shutil.copy(path, target)
        return target

    def load(self, run_dir):
        """What a run in this directory would start from, on its server and for all devices."""
        job = replace(self.job, config=self.job.config.model_copy(update={"run_dir": str(run_dir)}))
        state = jobs.load_state(job, "require")
        position, checkpoints = Position.of(state), Checkpoints(run_dir)
        everyone = set(range(NUM_DEVICES))
        devices, progress = checkpoints.load_devices(position, everyone, job.tuning, state.layers, state.unseen_local)
        control = ControlVariates(checkpoints, job.tuning, checkpoints.device_files(position))
        return bits((state, devices, progress, control.fetch(everyone, state.layers)))

    def expected(self, mutation):
        """The one outcome that a mutation should have."""
        if mutation.unseen or mutation.hits & self.belongs[self.newest]:
            return REFUSED if mutation.hits & self.belongs[self.older] else STEPPED_BACK
        return HARMLESS


@pytest.fixture(scope="module")
def configs(world, tmp_path_factory):
    """Of the run that is stopped and of one that is not; both have been run."""

    def run(name):
        folder = tmp_path_factory.mktemp(name)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(world.read_text()) | CHANGES | {"run_dir": str(folder / "run")}))
        return path, cli.main(["run", str(path)])

    undisturbed, status = run("undisturbed")
    assert status == 0
    beat, steps = LocalExchange.beat, []

    def stopping_beat(exchange, activity):
        if "in round 3" in activity:
            steps.append(activity)
        if len(steps) == STOP_AT:
            exchange.stop.ask("the test")
        beat(exchange, activity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalExchange, "beat", stopping_beat)
        stopped, status = run("stopped")
    assert status == EXIT_STOPPED
    return stopped, undisturbed


@pytest.fixture(scope="module")
def original(configs):
    return Original(configs[0])


# Each of these gets the folder of a copy, whose files are those of the original under a second name.


def rewrite(name, change):
    def apply(folder):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(change(content))

    return apply


def swap(one, other):
    def apply(folder):
        (folder / one).rename(folder / "between")
        (folder / other).rename(folder / one)
        (folder / "between").rename(folder / other)

    return apply


def delete(name):
    return lambda folder: (folder / name).unlink()


def link(name, target=None):
    """A link to the same content elsewhere, or to nowhere."""

    def apply(folder):
        (folder / name).rename(folder / "elsewhere")
        (folder / name).symlink_to(folder / (target or "elsewhere"))

    return apply


def rename(one, other):
    return lambda folder: (folder / one).rename(folder / other)


def duplicate(one, other):
    """A second folder with the same content: under the name of a later round it is reported, and the first is used."""
    return lambda folder: shutil.copytree(folder / one, folder / other, copy_function=os.link)


def add(name, content=b"something else"):
    def apply(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return apply


def boundaries(path):
    """Where the parts of an HDF5 file begin or end: superblock, object headers, chunks of data, the file."""
    places = {0, path.stat().st_size - 1}
    with h5py.File(path) as file:
        objects = [file]
        file.visititems(lambda _, item: objects.append(item))
        places |= {h5py.h5o.get_info(item.id).addr for item in objects}  # the first is behind the superblock
        for dataset in (item for item in objects if isinstance(item, h5py.Dataset)):
            if dataset.chunks:
                chunks = [dataset.id.get_chunk_info(place) for place in range(dataset.id.get_num_chunks())]
                places |= {end for c in chunks for end in (c.byte_offset, c.byte_offset + c.size)}
            elif (offset := dataset.id.get_offset()) is not None:
                places |= {offset, offset + dataset.nbytes}
    return sorted(place for place in places if place < path.stat().st_size)


def kind_of(name):
    """A file's name without numbers: files of one kind are built alike."""
    return re.sub(r"\d{4,}", "0", name)


def truncations(original):
    looked_into = set()
    for name in original.files:
        path, size, kind = original.folder / name, len(original.content[name]), kind_of(name)
        within = name.endswith(".h5") and kind not in looked_into
        looked_into.add(kind)
        places = boundaries(path) if within else [0, size // 2, size - 1]
        for place in places:
            cut = rewrite(name, lambda content, place=place: content[:place])
            yield Mutation("truncated", f"{name} at {place}", cut, frozenset([name]))


def flipped_bits(original):
    rng = np.random.default_rng([SEED, 0])
    for name, content in original.content.items():
        count = 1 if name.startswith(("control/", "local/")) else 6  # of those there are many
        for place in rng.integers(8 * len(content), size=count).tolist():

            def flip(content, place=place):
                changed = bytearray(content)
                changed[place // 8] ^= 1 << place % 8
                return changed

            yield Mutation("flipped bit", f"{name} bit {place}", rewrite(name, flip), frozenset([name]))


def zeroed_ranges(original):
    rng = np.random.default_rng([SEED, 1])
    for name, content in original.content.items():
        for _ in range(1):
            first, last = sorted(rng.integers(len(content) + 1, size=2).tolist())
            if any(content[first:last]):

                def zero(content, first=first, last=last):
                    return content[:first] + bytes(last - first) + content[last:]

                yield Mutation("zeroed", f"{name} {first}-{last}", rewrite(name, zero), frozenset([name]))


def swapped_files(original):
    newest, older = str(original.newest), str(original.older)
    pairs = [(f"{newest}/{name}", f"{older}/{name}") for name in ("server.h5", CHECKSUMS_FILE, SEAL)]
    own = ["server.h5", "progress_0001.h5", CHECKSUMS_FILE, SEAL]
    pairs += [(f"{newest}/{one}", f"{newest}/{other}") for one in own for other in own if one < other]
    devices = [name for name in original.files if name.startswith(("control/", "local/"))]
    rng = np.random.default_rng([SEED, 2])
    for one, other in (rng.permutation(devices)[:2].tolist() for _ in range(15)):
        pairs.append((one, other))
    # The same device in two generations.
    pairs += [
        (one, other)
        for one in devices
        for other in devices
        if one < other and one.rpartition("_")[0] == other.rpartition("_")[0]
    ]
    for one, other in dict.fromkeys(pairs):
        yield Mutation("swapped", f"{one} and {other}", swap(one, other), frozenset([one, other]))


def deleted_files(original):
    for name in original.files:
        yield Mutation("deleted", name, delete(name), frozenset([name]))


def links(original):
    for name in original.files:
        # The list and its seal are text for everybody: what is sealed is their content.
        same = frozenset() if name.endswith((CHECKSUMS_FILE, SEAL)) else frozenset([name])
        yield Mutation("link", name, link(name), same)
        yield Mutation("dangling link", name, link(name, "nowhere"), frozenset([name]))
    for position in (original.newest, original.older):
        yield Mutation("linked folder", str(position), link(str(position)), frozenset([f"{position}/server.h5"]))
    for kind in ("control", "local"):
        yield Mutation("linked folder", kind, link(kind))


def foreign_files(original):
    for position in (original.newest, original.older):
        hit = frozenset([f"{position}/{CHECKSUMS_FILE}"])
        for name in ("notes.txt", "progress_0002.h5", "server.h5.partial", ".hidden", "folder/file"):
            yield Mutation("foreign file", f"{position}/{name}", add(f"{position}/{name}"), hit)
    for name in (
        "notes.txt",
        "control/notes.txt",
        "control/000001_999999.h5",
        "control/folder/file",
        "local/000001_999999.h5",
        "local/000000_000001.h5.partial",
        "partial/server.h5",
        "round_000001/notes.txt",
        "round_x",
        "round_000002.old/server.h5",
    ):
        if name not in original.files:
            yield Mutation("foreign file", name, add(name))


def list_lines(original):
    for position in (original.newest, original.older):
        name = f"{position}/{CHECKSUMS_FILE}"
        count = len(original.content[name].splitlines())
        for place in range(count):
            for kind, times in (("line dropped", 0), ("line duplicated", 2)):

                def change(content, place=place, times=times):
                    lines = content.splitlines(keepends=True)
                    return b"".join([*lines[:place], *lines[place : place + 1] * times, *lines[place + 1 :]])

                yield Mutation(kind, f"{name} line {place}", rewrite(name, change), frozenset([name]))


def moved_folders(original):
    newest, older = str(original.newest), str(original.older)
    old, new = (frozenset([f"{name}/{CHECKSUMS_FILE}"]) for name in (older, newest))
    later = ("round_000003", "round_000002_part_000099", "round_123456789", "round_000009_part_000001")
    earlier = ("round_000001", "round_000000", "round_000001_part_000099")
    odd = ("old", "round_x", "round_000002_part_", "round_000003.bak", "round_000003 ")
    for name in later:
        yield Mutation("renamed folder", f"{newest} to {name}", rename(newest, name), new)
        yield Mutation("copied folder", f"{newest} to {name}", duplicate(newest, name))
        yield Mutation("copied folder", f"{older} to {name}", duplicate(older, name))
        yield Mutation("renamed folder", f"{older} to {name}", rename(older, name), old)
    for name in (*earlier, *odd):
        yield Mutation("renamed folder", f"{newest} to {name}", rename(newest, name), unseen=True)
        yield Mutation("renamed folder", f"{older} to {name}", rename(older, name), old)
        yield Mutation("copied folder", f"{newest} to {name}", duplicate(newest, name))
    yield Mutation("swapped folders", f"{newest} and {older}", swap(newest, older), new | old)
    for kind in ("control", "local"):
        yield Mutation("renamed folder", f"{kind} to old", rename(kind, "old"), new | old)
    yield Mutation("swapped folders", "control and local", swap("control", "local"), new | old)


KINDS = (
    truncations,
    flipped_bits,
    zeroed_ranges,
    swapped_files,
    deleted_files,
    links,
    foreign_files,
    list_lines,
    moved_folders,
)


def outcome(original, mutation, run_dir, reports, whole):
    """What loading after a mutation comes to, in words; anything but an outcome that is allowed is a failure."""
    reports.clear()
    try:
        found = original.load(run_dir)
    except CheckpointError as error:
        return REFUSED if str(run_dir) in str(error) else f"does not say where: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if found == whole[original.newest]:
        return HARMLESS
    if found != whole[original.older]:
        return "another state"
    return STEPPED_BACK if mutation.unseen or any(str(run_dir) in line for line in reports) else "lost in silence"


def test_damage_anywhere_is_noticed_or_harmless(original, tmp_path, reports):
    whole = {original.newest: original.load(original.copy(tmp_path / "whole"))}
    shutil.rmtree(tmp_path / "whole/checkpoints" / str(original.newest))
    whole[original.older] = original.load(tmp_path / "whole")
    assert whole[original.newest] != whole[original.older]
    assert not reports
    assert {*map(kind_of, original.files)} >= {
        "control/0_0.h5",
        "local/0_0.h5",
        "LATEST",
        "round_0_part_0/progress_0.h5",
    }

    outcomes, wrong = Counter(), []
    for mutations in KINDS:
        for number, mutation in enumerate(mutations(original)):
            run_dir = original.copy(tmp_path / f"{mutations.__name__}_{number}")
            mutation.apply(run_dir / "checkpoints")
            found = outcome(original, mutation, run_dir, reports, whole)
            shutil.rmtree(run_dir)
            outcomes[mutation.kind, found] += 1
            if found != original.expected(mutation):
                wrong.append(f"{mutation.kind}: {mutation.name}: {found}, not {original.expected(mutation)}")
    in_all = Counter()
    for (kind, found), count in sorted(outcomes.items()):
        print(f"{count:5d}  {kind}: {found}")
        in_all[found] += count
    print(f"{in_all.total():5d}  in all: {dict(in_all)}")
    assert not wrong, "\n".join([f"{len(wrong)} of {outcomes.total()}:", *wrong[:30]])
    assert outcomes.total() >= AT_LEAST
    assert {name: (original.folder / name).read_bytes() for name in original.files} == original.content


def to_the_end(original, run_dir):
    """Let a run go on there."""
    return cli.main(["run", str(original.config), "--set", f"run_dir={run_dir}"])


def only_in_newest(original, kind):
    """A file of control/ or local/ that the generation before does not need."""
    names = original.belongs[original.newest] - original.belongs[original.older]
    return next(name for name in sorted(names) if name.startswith(f"{kind}/"))


GOING_ON = {
    "nothing": lambda o: [],
    "flipped bit in the server's file": lambda o: [rewrite(f"{o.newest}/server.h5", halve)],
    "progress cut": lambda o: [rewrite(f"{o.newest}/progress_0001.h5", halve)],
    "control variate cut": lambda o: [rewrite(only_in_newest(o, "control"), halve)],
    "local state deleted": lambda o: [delete(only_in_newest(o, "local"))],
    "list cut": lambda o: [rewrite(f"{o.newest}/{CHECKSUMS_FILE}", halve)],
    "seal deleted": lambda o: [delete(f"{o.newest}/{SEAL}")],
    "foreign file": lambda o: [add(f"{o.newest}/notes.txt")],
    "foreign folder among the device files": lambda o: [add("control/folder/file")],
    "newest folder a link": lambda o: [link(str(o.newest))],
    "newest folder renamed to a later round": lambda o: [rename(str(o.newest), "round_000009")],
    "newest folder renamed to the next round": lambda o: [rename(str(o.newest), "round_000004")],
    "older folder copied to a later round": lambda o: [duplicate(str(o.older), "round_000005")],
    "older folder broken": lambda o: [rewrite(f"{o.older}/{CHECKSUMS_FILE}", halve)],
    "older folder a link": lambda o: [link(str(o.older))],
    "a file in the place of a later round": lambda o: [add("round_000004")],
    "a round written with more digits": lambda o: [rename(str(o.newest), str(o.newest).replace("_0", "_00", 1))],
}


def halve(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", GOING_ON)
def test_a_run_goes_on_after_damage_to_the_same_bits(original, configs, tmp_path, capfd, damage):
    run_dir = original.copy(tmp_path / "run", whole=True)
    for change in GOING_ON[damage](original):
        change(run_dir / "checkpoints")
    assert to_the_end(original, run_dir) == 0
    newest, *_ = checkpoints = Checkpoints(run_dir).positions()
    assert [position.round for position in checkpoints] == [5, 4]
    assert prompts(run_dir, newest) == tiny.final_prompts(configs[1])
    for position in checkpoints:
        verify(Checkpoints(run_dir).path(position))
    assert {name: (original.folder / name).read_bytes() for name in original.files} == original.content


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_leaves_them_alone(original, tmp_path, capfd):
    run_dir = original.copy(tmp_path / "run", whole=True)
    swap(f"{original.newest}/server.h5", f"{original.older}/server.h5")(run_dir / "checkpoints")
    before = {path: path.stat().st_ino for path in (run_dir / "checkpoints").rglob("*")}
    assert to_the_end(original, run_dir) == EXIT_USER_ERROR
    assert "no checkpoint is whole" in capfd.readouterr().err
    assert {path: path.stat().st_ino for path in (run_dir / "checkpoints").rglob("*")} == before


def prompts(run_dir, position):
    with h5py.File(Checkpoints(run_dir).path(position) / "server.h5") as file:
        return file["prompts"][()].tobytes()
