"""What ranks of one host share."""

import os
import threading
import time

import numpy as np
import pytest

from fedhpc.exchange.exact_sum import SumSize, Terms
from fedhpc.exchange.memory import Bell, HostMemory, bell_of, ring
from fedhpc.exchange.messages import NO_RECORD, Command, Op, RecordType
from fedhpc.exchange.room import Room, lay_out

NUMBERS = RecordType(np.dtype("<i8"))


@pytest.fixture
def server():
    memory = HostMemory(owner=os.getpid())
    memory.make_room(1000)
    return memory


@pytest.fixture
def worker(server):
    memory = HostMemory(owner=os.getpid())
    memory.look_at(server.address)
    return memory


def test_what_one_writes_the_other_reads(server, worker):
    server.at(64, NUMBERS, 3)[:] = [1, 2, 3]
    assert worker.at(64, NUMBERS, 3).tolist() == [1, 2, 3]
    worker.at(72, NUMBERS, 1)[:] = 7
    assert server.at(64, NUMBERS, 3).tolist() == [1, 7, 3]


def test_room_grows_and_does_not_shrink(server, worker):
    before = server.address.copy()
    server.make_room(10)
    assert server.address == before
    old = worker.at(0, NUMBERS, 1)
    server.make_room(5_000_000)
    worker.look_at(server.address)
    server.at(4_000_000, NUMBERS, 1)[:] = 9
    assert worker.at(4_000_000, NUMBERS, 1).tolist() == [9]
    old[:] = 3  # what somebody still holds stays in place
    assert server.at(0, NUMBERS, 1).tolist() == [0]


def test_memory_is_known_by_its_token(server):
    worker, token = HostMemory(owner=os.getpid()), server.put_token()
    assert worker.sees(server.address, token)
    assert not worker.sees(server.address, token[::-1])
    server.make_room(5_000_000)
    assert not worker.sees(server.address, token)


def test_another_file_is_not_taken_for_the_memory(server, tmp_path):
    with (tmp_path / "other").open("wb+") as other:
        address = server.address.copy()
        address["file"] = other.fileno()
        with pytest.raises(OSError, match="another file"):
            HostMemory(owner=os.getpid()).look_at(address)
    with pytest.raises(OSError, match=str(address[0]["file"])):
        HostMemory(owner=os.getpid()).look_at(address)


def test_parts_do_not_overlap_and_begin_at_cache_lines():
    assert lay_out((NUMBERS, 9), (RecordType(np.dtype("u1"), (3,)), 1), (NUMBERS, 0), (NUMBERS, 8)) == [
        0, 128, 192, 192, 256,
    ]  # fmt: skip


def test_numbers_that_another_process_holds_are_waited_for(server):
    (word,) = server.at(64, NUMBERS, 1)[None]
    if not (child := os.fork()):
        with server.alone(0, 1):
            word[:] = 1
            time.sleep(0.5)
            word[:] = 2
        os._exit(0)
    while not word[0]:
        time.sleep(0.01)
    with server.alone(1, 1):
        assert word[0] == 1
    with server.alone(0, 1):
        assert word[0] == 2
    os.waitpid(child, 0)


def test_no_term_is_lost_when_several_processes_add(server):
    workers, times, size = 3, 20, 150_000
    of = SumSize(num_sums=2, size=size, num_terms=workers * times)
    room = Room(server, workers)
    _, sums = room.furnish(Command(op=Op.TRAIN), NO_RECORD, [0] * workers, of)
    sums[...] = 0
    terms = Terms(coefficients=np.array([[1, 3]]), vectors=[np.ones(size, np.float32)], of=of)
    children = []
    for worker in range(workers):
        if not (child := os.fork()):
            for _ in range(times):
                room.add(worker, terms, terms.exponent)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    expected = np.array([[1.0], [3.0]]) * workers * times
    np.testing.assert_array_equal(of.floats(sums, terms.exponent), np.broadcast_to(expected, (2, size)))


def test_a_bell_ends_a_nap():
    bell = Bell()
    to_ring = bell_of(os.getpid(), bell.file, bell.number)
    threading.Timer(0.2, lambda: [ring(to_ring) for _ in range(5)]).start()
    began = time.monotonic()
    assert bell.nap(30)
    assert time.monotonic() - began < 10
    time.sleep(0.3)
    bell.nap(0.01)
    assert not bell.nap(0.01)  # however often it was rung


def test_a_bell_is_not_taken_for_another():
    bell = Bell()
    with pytest.raises(OSError, match="another file"):
        bell_of(os.getpid(), bell.file, bell.number + 1)


def test_nobody_hears_the_bell_of_a_process_that_is_gone():
    reading, writing = os.pipe()
    os.close(reading)
    ring(writing)
    os.close(writing)
