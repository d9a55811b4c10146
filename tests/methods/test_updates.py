import math

import numpy as np
import pytest

from fedhpc.exchange.encoding import Upload
from fedhpc.exchange.messages import (
    HEADER,
    NOTE,
    UPLOAD_HEADER,
    Command,
    Note,
    NoteKind,
    Op,
    place_packs,
    upload_headers,
    upload_payloads,
    upload_record,
)
from fedhpc.methods.updates import Layout


def test_a_layout_lays_tensors_one_behind_the_other():
    layout = Layout({"prompts": (2, 2, 1, 3), "head": (4,)})
    assert (layout.size, layout.nbytes) == (16, 64)
    prompts, head = np.arange(12.0).reshape(2, 2, 1, 3), np.arange(12.0, 16.0)
    vector = layout.pack({"head": head, "prompts": prompts})
    assert vector.tolist() == list(range(16))
    views = layout.views(vector)
    assert np.array_equal(views["prompts"], prompts)
    views["head"][0] = -1
    assert vector[12] == -1


def test_views_keep_leading_axes():
    layout = Layout({"a": (2,), "b": (3, 1)})
    views = layout.views(np.arange(20).reshape(2, 2, 5))
    assert views["b"].shape == (2, 2, 3, 1)
    assert views["a"][1, 0].tolist() == [10, 11]


def test_an_empty_layout():
    assert Layout({}).size == 0
    assert Layout({"a": (0, 2)}).views(np.empty(0))["a"].shape == (0, 2)


def test_commands_cross_as_fixed_headers():
    payload = np.arange(3, dtype=np.float32)
    placed = place_packs([[7], [3, 5]], np.array([2, 0], np.int32))
    where = {"round": 1 << 40, "generation": 1 << 41, "layers": (0, 31, 255)}
    command = Command(op=Op.TRAIN, **where, placed=placed, clip=1 / 3, payload=payload)
    header = command.header()
    assert header.nbytes == HEADER.itemsize == 72
    assert UPLOAD_HEADER.itemsize == 64
    assert (header[0]["num_placed"], header[0]["payload_size"]) == (3, 3)
    assert command.nbytes == 72 + 3 * 12 + 3 * 4
    arrived = Command.from_header(np.frombuffer(header.tobytes(), HEADER), placed, payload)
    assert (arrived.op, arrived.round, arrived.generation, arrived.clip) == (Op.TRAIN, 1 << 40, 1 << 41, 1 / 3)
    assert arrived.layers == (0, 31, 255)
    assert arrived.packs() == ([[7], [3, 5]], [2, 0])


@pytest.mark.parametrize(
    "note",
    [
        Note(kind=NoteKind.HALT),
        Note(kind=NoteKind.STOP_REQUESTED, text="SIGUSR1 at rank 3 (node-7)", seconds=0.1 + 0.2),
        Note(kind=NoteKind.SAVED, text="../control/000123_000007.h5", sha256="0123456789abcdef" * 4),
    ],
)
def test_notes_cross_as_fixed_records(note):
    packed = note.packed()
    assert packed.nbytes == NOTE.itemsize == 256
    assert Note.unpacked(np.frombuffer(packed.tobytes(), NOTE)) == note


def test_an_upload_is_its_header_and_its_numbers():
    for size in (1, 2, 1001):
        assert upload_record(size).nbytes == 64 + 4 * size
        narrow = Upload(size=size, length=size, dtype=np.dtype(np.int16), with_gradient=False)
        assert (narrow.nbytes, narrow.record.nbytes) == (2 * size, 64 + 4 * math.ceil(size / 2))
    records = upload_record(3).zeros(2)
    headers, vectors = upload_headers(records), upload_payloads(records, 3)
    headers["device"] = [5, 1 << 40]
    vectors[1] = [1, 2, 3]
    arrived = np.frombuffer(records.tobytes(), "<f4").reshape(2, -1)
    assert upload_headers(arrived)["device"].tolist() == [5, 1 << 40]
    assert upload_payloads(arrived, 3).tolist() == [[0, 0, 0], [1, 2, 3]]
