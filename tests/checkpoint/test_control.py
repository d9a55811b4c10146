"""The devices' control variates: what the server reads back is what it computed, whether from memory or a file."""

import threading

import pytest
from states import ALL, SHAPE, SOME, TUNING, bits, vector

from fedhpc.checkpoint.control_variates import ControlVariates
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.config import section_of
from fedhpc.errors import CheckpointError
from fedhpc.registry import TUNINGS
from fedhpc.tuning import make_tuning

AT_ONCE_S = 0.3
"""Long enough for another thread to come in between, if it can."""


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.begin()
    return checkpoints


@pytest.fixture
def control(checkpoints):
    return ControlVariates(checkpoints, TUNING, {})


def vectors(*devices, layers=ALL, seed=0):
    return {device: vector([seed, device], TUNING.exchanged(layers).size) for device in devices}


def to_files(control, *, generation, layers=ALL):
    """What a checkpoint does with the vectors in memory; the files' names and SHA-256."""
    fresh = dict(control.fresh)
    sums = dict(control.write(fresh, generation=generation, round_index=generation, layers=layers))
    control.note_files(sums)
    control.forget(fresh)
    return sums


def same(found, expected):
    return (list(found), bits(found)) == (list(expected), bits(expected))


def test_a_device_never_seen_has_no_entry(control):
    control.update(vectors(2))
    assert list(control.fetch([1, 2, 3], ALL)) == [2]
    assert control.devices() == [2]


def test_memory_and_files_together_are_the_devices_seen(control):
    control.update(vectors(7, 2))
    to_files(control, generation=1)
    control.update(vectors(5, 2, seed=1))
    assert control.devices() == [2, 5, 7]
    expected = vectors(7) | vectors(5, seed=1) | vectors(2, seed=1)
    assert same(control.fetch([7, 5, 2], ALL), expected)
    assert same(control.fetch([2], ALL), vectors(2, seed=1))
    to_files(control, generation=2)
    assert same(control.fetch([7, 5, 2], ALL), expected)
    assert control.files[7][0] == "../control/000007_000001.h5"
    assert control.files[2][0] == "../control/000002_000002.h5"


def test_memory_is_free_once_a_checkpoint_has_the_vectors(control):
    control.update(vectors(*range(100)))
    to_files(control, generation=1)
    assert control.fresh == {}
    assert same(control.fetch(range(100), ALL), vectors(*range(100)))
    assert control.fresh == {}


def test_a_vector_that_has_changed_since_stays_in_memory(control):
    control.update(vectors(2, 3))
    fresh = dict(control.fresh)
    sums = dict(control.write(fresh, generation=1, round_index=1, layers=ALL))
    control.update(vectors(3, seed=1))
    control.note_files(sums)
    control.forget(fresh)
    assert list(control.fresh) == [3]
    assert same(control.fetch([2, 3], ALL), vectors(2) | vectors(3, seed=1))


def test_another_process_reads_what_was_written(control, checkpoints):
    control.update(vectors(2, 3))
    sums = to_files(control, generation=1)
    sums["../local/000004_000001.h5"] = sums["server.h5"] = sums["progress_0001.h5"] = "0"
    again = ControlVariates(checkpoints, TUNING, sums)
    assert again.devices() == [2, 3]
    assert same(again.fetch(range(10), ALL), vectors(2, 3))


def test_when_layers_leave_the_exchange_memory_and_files_lose_the_same_elements(control):
    control.update(vectors(2, 3))
    to_files(control, generation=1)
    control.update(vectors(3, 4, seed=1))
    kept = TUNING.kept_elements(SOME)
    control.restrict(kept)
    whole = vectors(2) | vectors(3, 4, seed=1)
    expected = {device: vector[kept] for device, vector in whole.items()}
    assert same(control.fetch([2, 3, 4], SOME), expected)
    to_files(control, generation=2, layers=SOME)
    assert same(control.fetch([2, 3, 4], SOME), expected)


def test_what_was_fetched_beside_the_local_work_is_the_same(control):
    control.update(vectors(2, 3))
    to_files(control, generation=1)
    control.update(vectors(3, seed=1))
    control.prefetch([3, 2, 9], ALL)
    assert same(control.fetched(), vectors(3, seed=1) | vectors(2))
    control.prefetch([9], ALL)
    assert control.fetched() == {}


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("damage", [flip_bit, link, lambda path: path.unlink()], ids=["flipped bit", "link", "missing"])
def test_a_damaged_file_is_named_not_used(control, checkpoints, damage):
    control.update(vectors(2, 3))
    to_files(control, generation=1)
    damage(checkpoints.folder / "control/000003_000001.h5")
    control.prefetch([2, 3], ALL)
    with pytest.raises(CheckpointError, match=r"control/000003_000001\.h5"):
        control.fetched()
    assert same(control.fetch([2], ALL), vectors(2))


def test_a_file_of_other_shapes_is_named(control, checkpoints):
    control.update(vectors(2, layers=SOME))
    sums = to_files(control, generation=1, layers=SOME)
    other = make_tuning(section_of(TUNINGS, num_tokens=7, head="linear"), SHAPE, num_classes=5)
    with pytest.raises(CheckpointError, match=r"control/000002_000001\.h5.* is float32 .2, 2, 3, 2., not"):
        ControlVariates(checkpoints, other, sums).fetch([2], SOME)


class OpenBetweenLookAndAct(dict):
    """Lets the other thread in after every look at a device's vector."""

    def __init__(self, vectors):
        super().__init__(vectors)
        self.looked, self.changed = threading.Event(), threading.Event()

    def get(self, device):
        vector = super().get(device)
        self.looked.set()
        self.changed.wait(AT_ONCE_S)
        return vector


def test_a_round_that_ends_while_a_checkpoint_forgets_keeps_its_result(control):
    """The writer's thread must not remove a vector that the main thread sets at the same moment."""
    control.update(vectors(2))
    fresh = dict(control.fresh)
    sums = dict(control.write(fresh, generation=1, round_index=1, layers=ALL))
    control.note_files(sums)
    control.fresh = between = OpenBetweenLookAndAct(control.fresh)
    writer = threading.Thread(target=control.forget, args=[fresh])
    writer.start()
    assert between.looked.wait(60)
    control.update(vectors(2, seed=1))
    between.changed.set()
    writer.join()
    control.fresh = dict(control.fresh)
    assert same(control.fetch([2], ALL), vectors(2, seed=1))


class OpenWhileIterated(dict):
    """Lets the other thread in while all vectors are looked at."""

    def __init__(self, vectors):
        super().__init__(vectors)
        self.looked, self.changed = threading.Event(), threading.Event()

    def items(self):
        for item in super().items():
            yield item
            self.looked.set()
            self.changed.wait(AT_ONCE_S)


def test_layers_may_leave_the_exchange_while_a_checkpoint_forgets(control):
    control.update(vectors(2, 3, 4))
    fresh = dict(control.fresh)
    control.note_files(dict(control.write(fresh, generation=1, round_index=1, layers=ALL)))
    control.fresh = between = OpenWhileIterated(control.fresh)

    def forget():
        between.looked.wait(60)
        control.forget(fresh)
        between.changed.set()

    writer = threading.Thread(target=forget)
    writer.start()
    kept = TUNING.kept_elements(SOME)
    control.restrict(kept)
    writer.join()
    assert same(control.fetch([2, 3, 4], SOME), {device: vector[kept] for device, vector in vectors(2, 3, 4).items()})
