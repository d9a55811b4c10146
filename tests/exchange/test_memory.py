"""What ranks of one host share."""

import os
import threading
import time

import numpy as np
import pytest

from fedhpc.exchange.exact_sum import SumSize
from fedhpc.exchange.memory import Doorbell, HostMemory, open_doorbell, ring
from fedhpc.exchange.messages import Command, Op, RecordType, upload_headers, upload_payloads, upload_record
from fedhpc.exchange.shared_layout import SharedLayout, lay_out
from fedhpc.methods.updates import Fault

NUMBERS = RecordType(np.dtype("<i8"))


@pytest.fixture
def server():
    memory = HostMemory(owner=os.getpid())
    memory.reserve(1000)
    return memory


@pytest.fixture
def worker(server):
    memory = HostMemory(owner=os.getpid())
    memory.attach(server.address)
    return memory


def test_what_one_writes_the_other_reads(server, worker):
    server.at(64, NUMBERS, 3)[:] = [1, 2, 3]
    assert worker.at(64, NUMBERS, 3).tolist() == [1, 2, 3]
    worker.at(72, NUMBERS, 1)[:] = 7
    assert server.at(64, NUMBERS, 3).tolist() == [1, 7, 3]


def test_room_grows_and_does_not_shrink(server, worker):
    before = server.address.copy()
    server.reserve(10)
    assert server.address == before
    old = worker.at(0, NUMBERS, 1)
    server.reserve(5_000_000)
    worker.attach(server.address)
    server.at(4_000_000, NUMBERS, 1)[:] = 9
    assert worker.at(4_000_000, NUMBERS, 1).tolist() == [9]
    old[:] = 3  # what somebody still holds stays in place
    assert server.at(0, NUMBERS, 1).tolist() == [0]


def test_memory_is_known_by_its_token(server):
    worker, token = HostMemory(owner=os.getpid()), server.write_token()
    assert worker.try_attach(server.address, token)
    assert not worker.try_attach(server.address, token[::-1])
    server.reserve(5_000_000)
    assert not worker.try_attach(server.address, token)


def test_another_file_is_not_taken_for_the_memory(server, tmp_path):
    with (tmp_path / "other").open("wb+") as other:
        address = server.address.copy()
        address["file"] = other.fileno()
        with pytest.raises(OSError, match="another file"):
            HostMemory(owner=os.getpid()).attach(address)
    with pytest.raises(OSError, match=str(address[0]["file"])):
        HostMemory(owner=os.getpid()).attach(address)


def test_parts_do_not_overlap_and_begin_at_cache_lines():
    assert lay_out((NUMBERS, 9), (RecordType(np.dtype("u1"), (3,)), 1), (NUMBERS, 0), (NUMBERS, 8)) == [
        0, 128, 192, 192, 256,
    ]  # fmt: skip


def test_workers_that_share_memory_write_the_sums_of_their_sound_uploads(server):
    counts, near, size = [2, 1, 0, 3], np.array([True, False, True, True]), 150_001
    of = SumSize(num_sums=2, size=size, num_terms=sum(counts))
    layout = SharedLayout(server, near)
    records, sums = layout.write_command(Command(op=Op.TRAIN), upload_record(size), counts, of)
    upload_payloads(records, size)[:] = [[1], [2], [4], [8], [16], [np.nan]]
    headers = upload_headers(records)
    headers["count"], headers["fault"] = 3, [0, 0, 0, 0, 0, Fault.NAN]
    sums[...] = -1
    exponent = 6
    for worker in np.flatnonzero(near):
        layout.add_up(worker, upload_record(size), of, exponent)
    expected = np.array([[3.0], [1.0]]) * (1 + 2 + 8 + 16)
    np.testing.assert_array_equal(of.floats(sums, exponent), np.broadcast_to(expected, (2, size)))


def test_a_doorbell_ends_a_wait():
    doorbell = Doorbell()
    to_ring = open_doorbell(os.getpid(), doorbell.file, doorbell.inode)
    threading.Timer(0.2, lambda: [ring(to_ring) for _ in range(5)]).start()
    began = time.monotonic()
    assert doorbell.wait(30)
    assert time.monotonic() - began < 10
    time.sleep(0.3)
    doorbell.wait(0.01)
    assert not doorbell.wait(0.01)  # however often it was rung


def test_a_doorbell_is_not_taken_for_another():
    doorbell = Doorbell()
    with pytest.raises(OSError, match="another file"):
        open_doorbell(os.getpid(), doorbell.file, doorbell.inode + 1)


def test_nobody_hears_the_doorbell_of_a_process_that_is_gone():
    reading, writing = os.pipe()
    os.close(reading)
    ring(writing)
    os.close(writing)
