"""Fetching from sources that tear, repeat, skip and damage; the files that objects arrive in."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kleash.rpc.errors import (
    Cancelled,
    NotFound,
    Overloaded,
    PreconditionFailed,
    ServiceError,
    Unavailable,
)
from kleash.weights.fetch import ATTEMPTS_WITHOUT_PROGRESS, chunk, fetch_object
from kleash.weights.spool import Spool, SpoolObject
from kleash.weights.v1 import weights_pb2

pytestmark = pytest.mark.unit

ID = b"the object's manifest hash"
DATA = bytes(np.random.default_rng(0).integers(0, 256, 10_000, np.uint8))
CHUNK = 1000

Chunks = Iterator[weights_pb2.FetchResponse]


def sound(offset: int, end: int = len(DATA)) -> Chunks:
    """Chunks as a store sends them."""
    for start in range(offset, end, CHUNK):
        yield chunk(start, DATA[start : min(start + CHUNK, end)])


class Network:
    """A store behind a network: one behaviour for each call, the last one for all further calls."""

    def __init__(self, *behaviours: Callable[[int], Chunks], address: str = "store:1") -> None:
        self.address = address
        self.offsets: list[int] = []
        self._behaviours = list(behaviours)

    def fetch(self, object_id: bytes, offset: int) -> Chunks:
        assert object_id == ID
        self.offsets.append(offset)
        behaviour = self._behaviours[0]
        if len(self._behaviours) > 1:
            self._behaviours.pop(0)
        return behaviour(offset)

    def plan_update(
        self, have_digest: str, schema_digest: str, want_digest: str = ""
    ) -> weights_pb2.PlanUpdateResponse:
        raise AssertionError("a fetch does not plan")


def torn_at(end: int, error: ServiceError | None = None) -> Callable[[int], Chunks]:
    """A stream that ends, or fails, after the chunks before ``end``."""

    def behaviour(offset: int) -> Chunks:
        yield from sound(offset, max(end, offset))
        if error is not None:
            raise error

    return behaviour


def flipped_at(place: int) -> Callable[[int], Chunks]:
    """The chunk that holds byte ``place`` has one bit flipped, after its checksum was made."""

    def behaviour(offset: int) -> Chunks:
        for part in sound(offset):
            if part.offset <= place < part.offset + len(part.data):
                data = bytearray(part.data)
                data[place - part.offset] ^= 4
                part.data = bytes(data)
            yield part

    return behaviour


def repeated(offset: int) -> Chunks:
    """Every chunk twice, the stream from its beginning whatever was asked for, and overlaps."""
    for part in sound(0):
        yield part
        yield part
        start = max(part.offset - 300, 0)
        yield chunk(start, DATA[start : part.offset + 700])


def with_a_gap(offset: int) -> Chunks:
    for number, part in enumerate(sound(offset)):
        if number != 2:
            yield part


def too_long(offset: int) -> Chunks:
    yield from sound(offset)
    yield chunk(len(DATA), b"more")


def lost(offset: int) -> Chunks:
    raise Unavailable("the connection was reset.", reason="UNREACHABLE")
    yield


def not_here(offset: int) -> Chunks:
    raise NotFound("the peer has dropped it.", reason="UNKNOWN_OBJECT")
    yield


@pytest.fixture
def target(tmp_path: Path) -> SpoolObject:
    return Spool(tmp_path).create(ID, len(DATA))


def content(target: SpoolObject) -> bytes:
    assert target.is_complete
    assert target.path.read_bytes() == target.view().tobytes()
    return target.view().tobytes()


def test_an_object_is_fetched_and_its_bytes_are_counted(target: SpoolObject) -> None:
    counts: list[int] = []
    source = Network(sound)
    fetch_object(ID, target, [source], on_progress=counts.append)
    assert content(target) == DATA
    assert counts == [CHUNK] * 10
    fetch_object(ID, target, [source])  # it is here
    assert source.offsets == [0]


@pytest.mark.parametrize("error", [None, Unavailable("the connection was reset.")])
def test_a_torn_stream_is_resumed_where_it_was_torn(
    target: SpoolObject, error: ServiceError | None
) -> None:
    """As often as it takes: each attempt that brings a byte is followed by another."""
    ends = (2500, 2500, 2500, 3100, 7000, 9999)
    source = Network(*(torn_at(end, error) for end in ends), sound)
    counts: list[int] = []
    fetch_object(ID, target, [source], on_progress=counts.append)
    assert content(target) == DATA
    assert source.offsets == [0, 2500, 2500, 2500, 3100, 7000, 9999]
    assert sum(counts) == len(DATA)


def test_repeated_and_overlapping_chunks_are_ignored(target: SpoolObject) -> None:
    counts: list[int] = []
    fetch_object(ID, target, [Network(torn_at(3456), repeated)], on_progress=counts.append)
    assert content(target) == DATA
    assert sum(counts) == len(DATA)
    assert 0 not in counts


def test_a_gap_opens_the_stream_again(target: SpoolObject) -> None:
    source = Network(with_a_gap, with_a_gap, sound)
    fetch_object(ID, target, [source])
    assert content(target) == DATA
    assert source.offsets == [0, 2000, 4000]


def test_bytes_after_the_end_are_not_taken(target: SpoolObject) -> None:
    fetch_object(ID, target, [Network(torn_at(9000), too_long)])
    assert content(target) == DATA
    small = Spool(None).create(ID, 1500)
    with pytest.raises(Unavailable) as caught:
        fetch_object(ID, small, [Network(sound)])
    assert caught.value.reason == "OUT_OF_ORDER"
    assert small.available == 1000


def test_a_flipped_bit_is_never_stored(target: SpoolObject) -> None:
    source = Network(flipped_at(4321), flipped_at(4000), sound)
    fetch_object(ID, target, [source])
    assert content(target) == DATA
    assert source.offsets == [0, 4000, 4000]


def test_a_source_that_always_damages_is_given_up(tmp_path: Path) -> None:
    target = Spool(tmp_path).create(ID, len(DATA))
    source = Network(flipped_at(0))
    with pytest.raises(PreconditionFailed) as caught:
        fetch_object(ID, target, [source])
    assert caught.value.reason == "DIGEST_MISMATCH"
    assert caught.value.metadata == {"layer": "chunk", "offset": "0"}
    assert source.offsets == [0] * ATTEMPTS_WITHOUT_PROGRESS
    assert target.available == 0


@pytest.mark.parametrize("behaviour", [lost, flipped_at(6500), with_a_gap])
def test_the_next_source_goes_on_with_the_bytes_that_are_here(
    target: SpoolObject, behaviour: Callable[[int], Chunks]
) -> None:
    peer = Network(torn_at(6500), torn_at(6500), behaviour, lost, address="peer:1")
    publisher = Network(sound)
    fetch_object(ID, target, [peer, publisher])
    assert content(target) == DATA
    assert publisher.offsets == [peer.offsets[-1]]
    assert publisher.offsets[0] >= 6500


def test_a_peer_that_does_not_have_it_is_passed_over(target: SpoolObject) -> None:
    peer, publisher = Network(not_here, address="peer:1"), Network(sound)
    fetch_object(ID, target, [peer, publisher])
    assert content(target) == DATA
    assert publisher.offsets == [0]


def test_when_all_sources_fail_the_last_error_is_raised(target: SpoolObject) -> None:
    publisher = Network(torn_at(2500), lost)
    with pytest.raises(Unavailable) as caught:
        fetch_object(ID, target, [Network(not_here), publisher])
    assert caught.value.reason == "UNREACHABLE"
    assert publisher.offsets == [0] + [2500] * ATTEMPTS_WITHOUT_PROGRESS
    # What waits for more bytes is told; what is here is kept for another attempt.
    with pytest.raises(Unavailable, match="reset"):
        target.read(2500, CHUNK, timeout_s=60)
    assert target.read(0, CHUNK, timeout_s=0) == DATA[:CHUNK]
    again = Network(sound)
    fetch_object(ID, target, [again])
    assert again.offsets == [2500]
    assert content(target) == DATA


def test_without_sources_that_is_said(target: SpoolObject) -> None:
    with pytest.raises(Unavailable) as caught:
        fetch_object(ID, target, [])
    assert caught.value.reason == "NO_SOURCE"


def test_a_stream_that_ends_early_is_said(target: SpoolObject) -> None:
    with pytest.raises(
        Unavailable, match="store:1 ended its stream at byte 2500 of 10000"
    ) as caught:
        fetch_object(ID, target, [Network(torn_at(2500))])
    assert caught.value.reason == "STREAM_TORN"


def test_a_fetch_that_is_given_up_asks_nobody_else(target: SpoolObject) -> None:
    publisher = Network(sound)
    counts: list[int] = []
    with pytest.raises(Cancelled):
        fetch_object(
            ID,
            target,
            [Network(sound), publisher],
            on_progress=counts.append,
            is_cancelled=lambda: len(counts) == 3,
        )
    assert target.available == 3 * CHUNK
    assert publisher.offsets == []
    with pytest.raises(Cancelled):
        target.read(target.available, CHUNK, timeout_s=60)


# ----------------------------------------------------------------------------------------- objects


def test_a_reader_follows_the_writer(target: SpoolObject) -> None:
    """A peer's fetch of an object that is still arriving: it waits, and gets every byte."""
    read: list[bytes] = []

    def follow() -> None:
        while data := target.read(sum(map(len, read)), 700, timeout_s=60):
            read.append(data)

    reader = threading.Thread(target=follow)
    reader.start()
    for start in range(0, len(DATA), CHUNK):
        target.append(DATA[start : start + CHUNK])
    reader.join(60)
    assert b"".join(read) == DATA
    assert target.read(len(DATA), 700, timeout_s=0) == b""


def test_a_reader_is_told_when_the_writer_fails(target: SpoolObject) -> None:
    target.append(DATA[:CHUNK])
    errors: list[ServiceError] = []

    def wait() -> None:
        try:
            target.read(CHUNK, 700, timeout_s=60)
        except ServiceError as error:
            errors.append(error)

    reader = threading.Thread(target=wait)
    reader.start()
    target.fail(Unavailable("the source is gone."))
    reader.join(60)
    assert [error.message for error in errors] == ["the source is gone."]
    target.revive()
    with pytest.raises(Unavailable, match=r"no byte after 1000 of 10000 came within 0 s") as caught:
        target.read(CHUNK, 700, timeout_s=0)
    assert caught.value.reason == "SOURCE_STALLED"


def test_a_view_outlives_the_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    target = spool.create(ID, 100)
    target.append(DATA[:100])
    view = target.view()
    assert not view.flags.writeable
    spool.close()
    del target, spool
    gc.collect()
    assert view.tobytes() == DATA[:100]
    assert not list(tmp_path.iterdir())


def test_an_object_of_no_bytes_is_complete(tmp_path: Path) -> None:
    empty = Spool(tmp_path).create(ID, 0)
    assert empty.is_complete
    assert empty.view().shape == (0,)
    assert empty.read(0, 10, timeout_s=0) == b""


def test_a_spool_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    one, two, three = (spool.create(name, 10) for name in (b"1", b"2", b"3"))
    one.release()
    assert spool.create(b"1", 10) is one is spool.get(b"1")  # claimed again: one thread fills it
    other = spool.create(b"1", 10)
    assert other is not one
    assert not one.path.exists()
    one = other
    scratch = spool.scratch(10)
    assert len(list(tmp_path.iterdir())) == 4
    spool.keep_only({b"1", b"2", b"9"})
    assert not three.path.exists()
    assert one.path.exists()
    assert scratch.path.exists()
    spool.drop(b"2")
    spool.drop(b"never here")
    for gone in (b"2", b"3"):
        with pytest.raises(NotFound) as caught:
            spool.get(gone)
        assert caught.value.reason == "UNKNOWN_OBJECT"
    with pytest.raises(NotFound, match="not kept"):
        two.read(0, 1, timeout_s=60)
    other = spool.create(b"1", 20)  # another size: what came cannot be of it
    assert other is not one
    assert not one.path.exists()
    scratch.close()
    spool.close()
    assert not list(tmp_path.iterdir())


def test_a_spool_begins_empty_and_a_temporary_one_goes(tmp_path: Path) -> None:
    (tmp_path / "00000001.object").write_bytes(b"of a process that was killed")
    (tmp_path / "notes.txt").write_text("not the spool's")
    spool = Spool(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    spool.create(ID, 10)
    temporary = Spool(None)
    folder = temporary.folder
    temporary.create(ID, 10)
    assert folder.is_dir()
    del temporary
    gc.collect()
    assert not folder.exists()


def test_a_disk_that_is_too_small_tells_before_a_byte_comes(tmp_path: Path) -> None:
    """And is not filled in the attempt."""
    disk = os.statvfs(tmp_path)
    with pytest.raises(Overloaded) as caught:
        Spool(tmp_path).create(ID, disk.f_blocks * disk.f_frsize * 2)
    assert caught.value.reason == "SPOOL_FULL"
    assert "set policy.weights.spool to another" in caught.value.message
    assert caught.value.retry_after_s is None
    assert not list(tmp_path.iterdir())


LIMITED = """
import pathlib, resource, sys
from kleash.rpc.errors import Overloaded
from kleash.weights.spool import Spool
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
spool = Spool(pathlib.Path(sys.argv[1]))
spool.create(b"small", 5000).append(bytes(5000))
try:
    spool.create(b"large", 5001)
except Overloaded as error:
    print(error.reason)
print(len(list(spool.folder.iterdir())))
"""


def test_a_limit_on_files_is_a_full_spool_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["SPOOL_FULL", "1"]
