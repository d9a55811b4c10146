import h5py
import numpy as np
import pytest

from fedhpc.checkpoint import Checkpoints, device_file
from fedhpc.errors import CheckpointError, ConfigError
from fedhpc.local_update import DeviceState
from fedhpc.methods import ServerState
from fedhpc.state_file import RunState
from fedhpc.updates import Layout

IDENTITY = {"seed": 1, "server.method": "fedpeptao", "server.variant": "released", "sha256": "0"}


class Layouts:
    """Prompts of 4 layers, T = 3, D = 2, and a linear head."""

    def exchanged(self, layers):
        return Layout({"prompts": (len(layers), 2, 3, 2), "head.weight": (5, 2), "head.bias": (5,)})

    def local(self, layers):
        return Layout({"prompts": (4 - len(layers), 2, 3, 2)})


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path)


def run_state(round_index, layers=(1, 3), seed=0):
    rng = np.random.default_rng(seed)
    n, n_local = Layouts().exchanged(layers).size, Layouts().local(layers).size

    def vector(size=n):
        return rng.standard_normal(size).astype(np.float32)

    return RunState(
        server=ServerState(
            round=round_index,
            params=vector(),
            vectors={"momentum": vector(), "previous_delta": vector(), "control_global": vector()},
            control={7: vector(), 2: vector()},
            scalars={"server_learning_rate": 0.1 + 0.2},
        ),
        layers=layers,
        ratio=0.5,
        scores=rng.standard_normal(4),
        unseen_local=vector(n_local),
        update_norms=(1.0, 1 / 3),
    )


def device_states(layers=(1, 3)):
    size = Layouts().local(layers).size
    moments = {"prompts.exp_avg": np.ones((4, 2, 3, 2), np.float32), "prompts.step": np.array(3, np.float32)}
    return {
        3: DeviceState(local=np.arange(size, dtype=np.float32), steps_taken=5, moments=moments),
        11: DeviceState(local=np.ones(size, np.float32), steps_taken=2),
    }


def save(checkpoints, state, keep=2):
    checkpoints.begin(state.server.round)
    digest = checkpoints.save_devices(state.server.round, 1, device_states(state.layers), Layouts(), state.layers)
    checkpoints.commit(state, Layouts(), IDENTITY, {device_file(1): digest}, keep)


def newest(checkpoints, report=pytest.fail):
    return checkpoints.newest(Layouts(), check=lambda identity: None, report=report)


def assert_same(ours, theirs):
    assert (ours.layers, ours.ratio, ours.selected, ours.update_norms) == (
        theirs.layers,
        theirs.ratio,
        theirs.selected,
        theirs.update_norms,
    )
    assert (ours.server.round, ours.server.scalars) == (theirs.server.round, theirs.server.scalars)
    for a, b in (
        (ours.server.params, theirs.server.params),
        (ours.unseen_local, theirs.unseen_local),
        (ours.scores, theirs.scores),
        *((ours.server.vectors[name], theirs.server.vectors[name]) for name in theirs.server.vectors),
        *((ours.server.control[device], theirs.server.control[device]) for device in theirs.server.control),
    ):
        assert (a.tobytes(), a.dtype) == (b.tobytes(), b.dtype)


@pytest.mark.parametrize("layers", [(1, 3), (0, 1, 2, 3)])
def test_what_is_saved_comes_back_to_the_bit(checkpoints, layers):
    state = run_state(4, layers)
    save(checkpoints, state)
    identities = []
    assert_same(checkpoints.newest(Layouts(), check=identities.append, report=pytest.fail), state)
    assert identities == [IDENTITY]
    devices = checkpoints.load_devices(4, {3, 99}, Layouts(), layers)
    assert list(devices) == [3]
    expected = device_states(layers)[3]
    assert devices[3].local.tobytes() == expected.local.tobytes()
    assert devices[3].steps_taken == 5
    assert devices[3].moments["prompts.step"] == 3
    assert np.array_equal(devices[3].moments["prompts.exp_avg"], expected.moments["prompts.exp_avg"])


def test_the_file_is_as_documented(checkpoints):
    save(checkpoints, run_state(4))
    with h5py.File(checkpoints.path(4) / "server.h5") as file:
        assert file.attrs["format"] == "fedhpc-checkpoint"
        assert {"version", "round", "seed", "method", "variant", "config_sha256", "fedhpc_version", "created"} <= set(
            file.attrs
        )
        assert file["prompts"].attrs["layers"].tolist() == [1, 3]
        for name in ("prompts", "momentum", "previous_delta", "control/global"):
            assert (file[name].shape, file[name].dtype) == ((2, 2, 3, 2), np.float32)
        assert file["control/device_ids"][()].tolist() == [2, 7]
        assert file["control/devices"].shape == (2, 2, 2, 3, 2)
        assert file["selection/scores"].dtype == np.float64
        assert file["selection/scores"].attrs["ratio"] == 0.5
        assert file["params/head.weight"].shape == (5, 2)
        file.visititems(
            lambda _, item: pytest.fail(item.name) if isinstance(item, h5py.Dataset) and not item.fletcher32 else None
        )
    with h5py.File(checkpoints.path(4) / "devices_0001.h5") as file:
        assert file["devices/3/local_prompts"].shape == (2, 2, 3, 2)


def test_generations(checkpoints):
    for round_index in (1, 2, 3, 10):
        save(checkpoints, run_state(round_index), keep=2)
    assert checkpoints.rounds() == [10, 3]
    assert (checkpoints.folder / "LATEST").read_text() == "round_000010\n"
    assert {path.name for path in checkpoints.folder.iterdir()} == {"LATEST", "round_000003", "round_000010"}


def test_an_unfinished_checkpoint_does_not_count(checkpoints):
    save(checkpoints, run_state(1))
    checkpoints.begin(2)
    checkpoints.save_devices(2, 1, device_states(), Layouts(), (1, 3))
    assert newest(checkpoints).server.round == 1
    save(checkpoints, run_state(2))
    assert newest(checkpoints).server.round == 2


def damage_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": lambda folder: damage_byte(folder / "server.h5"),
    "flipped bit in a device file": lambda folder: damage_byte(folder / "devices_0001.h5"),
    "truncated": lambda folder: (folder / "server.h5").write_bytes((folder / "server.h5").read_bytes()[:-1]),
    "empty": lambda folder: (folder / "server.h5").write_bytes(b""),
    "missing": lambda folder: (folder / "devices_0001.h5").unlink(),
    "additional": lambda folder: (folder / "devices_0002.h5").write_bytes(b""),
    "no sums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "empty sums": lambda folder: (folder / "SHA256SUMS").write_text(""),
    "swapped": lambda folder: (folder / "server.h5").write_bytes((folder / "devices_0001.h5").read_bytes()),
    "symbolic link": lambda folder: (
        (folder / "server.h5").rename(folder.parent / "elsewhere"),
        (folder / "server.h5").symlink_to(folder.parent / "elsewhere"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_reported_and_the_generation_before_is_used(checkpoints, damage):
    state = run_state(1)
    save(checkpoints, state)
    save(checkpoints, run_state(2, seed=5))
    damage(checkpoints.path(2))
    reports = []
    assert_same(newest(checkpoints, reports.append), state)
    assert len(reports) == 1
    assert str(checkpoints.path(2)) in reports[0]
    damage(checkpoints.path(1))
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        newest(checkpoints, reports.append)


def test_going_on_from_behind_broken_checkpoints_keeps_the_whole_ones(checkpoints):
    for round_index in (2, 4, 6):
        save(checkpoints, run_state(round_index), keep=3)
    for broken in (4, 6):
        DAMAGES["flipped bit"](checkpoints.path(broken))
    save(checkpoints, run_state(3), keep=2)
    assert checkpoints.rounds() == [3, 2]
    assert newest(checkpoints).server.round == 3


def test_another_run_is_told_apart_before_its_tensors_are_read(checkpoints):
    save(checkpoints, run_state(1, layers=(0, 1, 2)))

    class OtherLayouts(Layouts):
        def exchanged(self, layers):
            return Layout({"prompts": (len(layers), 2, 99, 2)})

    def refuse(identity):
        raise ConfigError(f"not {identity['seed']}")

    with pytest.raises(ConfigError, match="not 1"):
        checkpoints.newest(OtherLayouts(), check=refuse, report=pytest.fail)


def test_no_checkpoint_is_no_error(checkpoints):
    assert newest(checkpoints) is None


@pytest.mark.parametrize(
    ("attribute", "value", "words"), [("version", 2, "version 2"), ("format", "x", "not a fedhpc")]
)
def test_files_of_another_format(checkpoints, attribute, value, words):
    from fedhpc.state_file import read_server_state

    save(checkpoints, run_state(1))
    path = checkpoints.path(1) / "server.h5"
    with h5py.File(path, "a") as file:
        file.attrs[attribute] = value
    with pytest.raises(CheckpointError, match=words):
        read_server_state(path, Layouts(), lambda identity: None)
