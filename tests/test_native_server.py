"""The page server's data path: what it gives out, and what it makes of clients that break the rules."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import hypothesis.strategies as st
import pytest
from hypothesis import given

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._uffd._native import lib
from criupy._uffd.image_linux import Image
from criupy._uffd.server_linux import Account, Ending, Server, punch_hole
from criupy.errors import RemoteProtocolError, UffdError
from criupy.page_server._images import load_tasks
from criupy.testing.images import STACK_BASE, WrittenImages, write_images
from criupy.testing.spec import WorkloadSpec
from criupy.wire.page_server import detect_frame_size
from criupy.wire.page_service import Close, ConnectionClosed, Get, PageService
from page_server_clients import (
    ADD_F_PRESENT,
    CLOSE,
    FORCE_CLOSE,
    GET,
    PAGE,
    Destination,
    frame,
    loopback,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")

STALL = 0.3
LONGER_STALL = 1.0


class Served:
    """A server over written images, with connections made directly."""

    def __init__(
        self,
        images: WrittenImages,
        *,
        stall: float = 30.0,
        first: float | None = None,
        idle: float | None = None,
    ) -> None:
        self.images = images
        self.server = Server(stall_timeout=stall, first_timeout=first, idle_timeout=idle)
        for task in load_tasks(images.directory):
            entries = task.entries
            fd = os.open(task.pages, os.O_RDONLY | os.O_CLOEXEC)
            self.server.add_image(Image(task.pid, entries.starts, entries.nr_pages, entries.page_indices), fd)

    def connect(self, frame_size: int = 32) -> Destination:
        ours, theirs = loopback()
        with theirs:
            self.server.serve(theirs.fileno())
            theirs.detach()
        return Destination(ours, frame_size)

    def ended(self, nr: int = 1) -> list[Account]:
        found: list[Account] = []
        while len(found) < nr:
            assert select.select([self.server.event_fd], [], [], 30)[0], "no connection ends"
            found += self.server.ended()
        return found

    def end(self) -> Account:
        (account,) = self.ended()
        return account

    def close(self) -> None:
        self.server.close()


Serve: TypeAlias = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def make(
            spec: WorkloadSpec | None = None,
            *,
            stall: float = 30.0,
            first: float | None = None,
            idle: float | None = None,
        ) -> Served:
            spec = spec or WorkloadSpec(size=256 * PAGE, areas=2, tree=2)
            images = write_images(tmp_path / "images", spec, style="full")
            served = Served(images, stall=stall, first=first, idle=idle)
            stack.callback(served.close)
            return served

        yield make


# ---- pages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_size", [24, 32])
@pytest.mark.parametrize("nr", [1, 3, 15, 16, 256, 1500])
def test_every_page(serve: Serve, frame_size: int, nr: int) -> None:
    served = serve(WorkloadSpec(size=3000 * PAGE, areas=2, tree=2))
    spec = served.images.spec
    with served.connect(frame_size) as destination:
        for task in served.images.tasks:
            for run in task.runs:
                for first in range(0, run.nr_pages, nr):
                    count = min(nr, run.nr_pages - first)
                    data = destination.get(task.pid, run.start + first * PAGE, count)
                    for n in range(count):
                        page = data[n * PAGE : (n + 1) * PAGE]
                        assert page == spec.page(task.task, run.first + first + n)
        assert destination.close() == 0
    account = served.end()
    assert account.ending is Ending.CLOSED
    assert account.frame_size == frame_size
    assert account.pages == 6000


@pytest.mark.parametrize("frame_size", [24, 32])
def test_answers_come_in_the_order_of_the_requests(serve: Serve, frame_size: int) -> None:
    """Short and long ones mixed, all asked for before the first is read."""
    served = serve()
    task = served.images.tasks[1]
    spec = served.images.spec
    wanted = [(run, first, nr) for run in task.runs for first in range(0, 100, 7) for nr in (1, 20, 2)]
    with served.connect(frame_size) as destination:
        for run, first, nr in wanted:
            destination.send(GET, nr, run.start + first * PAGE, task.pid)
        for run, first, nr in wanted:
            got, address, pid, data = destination.answer()
            assert (address, pid) == (run.start + first * PAGE, task.pid)
            assert got == nr
            assert data == b"".join(spec.page(task.task, run.first + first + n) for n in range(nr))
        assert destination.close(FORCE_CLOSE) == 0
    assert served.end().requests == len(wanted) + 1


def test_an_answer_ends_where_the_extent_does(serve: Serve) -> None:
    served = serve()
    task = served.images.tasks[0]
    run = task.runs[0]
    with served.connect() as destination:
        destination.send(GET, 60000, run.start + PAGE, task.pid)
        assert destination.answer()[0] == run.nr_pages - 1


def test_a_longest_answer(serve: Serve) -> None:
    served = serve(WorkloadSpec(size=4000 * PAGE))
    images = write_images(
        served.images.directory.with_name("long"), served.images.spec, style="full", entry_pages=4000
    )
    with contextlib.closing(Served(images)) as served:
        ours, theirs = loopback()
        with Destination(ours) as destination:
            served.server.serve(theirs.detach())
            destination.send(GET, 4000, images.tasks[0].runs[0].start, images.tasks[0].pid)
            assert destination.answer()[0] == 1024


def test_many_at_once(serve: Serve) -> None:
    served = serve()
    task = served.images.tasks[0]
    run = task.runs[0]
    with contextlib.ExitStack() as stack:
        several = [stack.enter_context(served.connect(24 if n % 2 else 32)) for n in range(8)]
        for n in range(20):
            for destination in several:
                destination.send(GET, 2, run.start + n * PAGE, task.pid)
        assert len(served.server.connections(20)) == 8
        assert len(served.server.connections(3)) == 3
        for n in range(20):
            for destination in several:
                expected = b"".join(served.images.spec.page(task.task, run.first + n + k) for k in range(2))
                assert destination.answer()[3] == expected
        for destination in several:
            assert destination.close() == 0
    assert {account.ending for account in served.ended(8)} == {Ending.CLOSED}
    assert served.server.connections(20) == []


# ---- the end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [CLOSE, FORCE_CLOSE])
@pytest.mark.parametrize("frame_size", [24, 32])
def test_a_leading_close(serve: Serve, frame_size: int, command: int) -> None:
    served = serve()
    with served.connect(frame_size) as destination:
        assert destination.close(command) == 0
    account = served.end()
    assert (account.ending, account.frame_size) == (Ending.CLOSED, 0)


def test_something_after_close(serve: Serve) -> None:
    served = serve()
    with served.connect() as destination:
        destination.send(CLOSE)
        assert destination.receive(4) == bytes(4)
        destination.sock.sendall(b"more")
        account = served.end()
    assert (account.ending, account.bytes_received) == (Ending.TRAILING, 36)


def test_no_end_after_close(serve: Serve) -> None:
    served = serve(stall=STALL)
    with served.connect() as destination:
        destination.send(CLOSE)
        assert destination.receive(4) == bytes(4)
        assert served.end().ending is Ending.CLOSED
        assert destination.is_over()


def test_the_peer_closes_without_close(serve: Serve) -> None:
    served = serve()
    with served.connect() as destination:
        destination.get(100, served.images.tasks[0].runs[0].start)
    assert served.end().ending is Ending.EOF


def test_the_peer_resets(serve: Serve) -> None:
    served = serve()
    with served.connect() as destination:
        destination.get(100, served.images.tasks[0].runs[0].start)
        destination.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert served.end().ending is Ending.RESET


def test_a_cut(serve: Serve) -> None:
    served = serve()
    with served.connect() as destination, served.connect() as other:
        start = served.images.tasks[0].runs[0].start
        for each in (destination, other):
            each.get(100, start)
        served.server.cut(0)
        served.server.cut(0)
        account = served.end()
        assert (account.serial, account.ending) == (0, Ending.CUT)
        assert destination.is_over()
        served.server.cut(0)
        assert len(other.get(100, start)) == PAGE
        with pytest.raises(UffdError):
            served.server.cut(2)


def test_a_server_that_ends_cuts_all(serve: Serve) -> None:
    served = serve()
    start = served.images.tasks[0].runs[0].start
    with served.connect() as reading, served.connect() as waiting:
        waiting.get(100, start)
        for _ in range(2000):  # more than sockets hold
            reading.send(GET, 128, start, 100)
        served.close()
        assert waiting.is_over()


# ---- what breaks the rules -------------------------------------------------------------------------------

A = 0x10_0000_0000
"""Where the first area of a workload begins."""

WRONG = {
    "an unknown command": ((0x77, 1, A, 100), Ending.COMMAND),
    "an upload": ((3, 0, 0, 100 << 8 | 1), Ending.COMMAND),
    "an answer": ((ADD_F_PRESENT, 1, A, 100 << 8 | 1), Ending.COMMAND),
    "no pages": ((GET, 0, A, 100), Ending.COUNT),
    "pages behind all addresses": ((GET, 2, (1 << 64) - PAGE, 100), Ending.COUNT),
    "an unaligned address": ((GET, 1, A + 8, 100), Ending.ADDRESS),
    "an address before all": ((GET, 1, A - PAGE, 100), Ending.PAGE),
    "an address behind all": ((GET, 1, (1 << 64) - PAGE, 100), Ending.PAGE),
    "an address between": ((GET, 1, A + 128 * PAGE, 100), Ending.PAGE),
    "a page that is not lazy": ((GET, 1, STACK_BASE, 100), Ending.PAGE),
    "an unknown process": ((GET, 1, A, 4), Ending.ID),
    "a huge process": ((GET, 1, A, 1 << 63), Ending.ID),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("frame_size", [24, 32])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_frame(serve: Serve, case: str, frame_size: int, first: bool) -> None:
    """It ends that connection, and no other."""
    served = serve()
    words, ending = WRONG[case]
    with served.connect() as other, served.connect(frame_size) as destination:
        if not first:
            destination.get(100, A, 2)
        destination.send(*words)
        account = served.end()
        assert account.ending is ending
        assert account.offset == (0 if first else frame_size)
        assert account.command == words[0] & 0xFFFF
        if not first or ending is not Ending.COMMAND:  # else not even the size is known
            assert (account.nr_pages, account.address, account.id) == words[1:]
        assert destination.is_over()
        assert len(other.get(100, A)) == PAGE


@pytest.mark.parametrize("frame_size", [24, 32])
def test_answers_before_a_wrong_frame_are_not_held_back_for_ever(serve: Serve, frame_size: int) -> None:
    served = serve()
    with served.connect(frame_size) as destination:
        good, wrong = frame(frame_size, GET, 1, A, 100), frame(frame_size, GET, 1, A, 5)
        destination.sock.sendall(10 * good + wrong)
        for _ in range(10):
            assert destination.answer()[0] == 1
        assert destination.is_over()
        account = served.end()
        assert (account.ending, account.pages, account.id) == (Ending.ID, 10, 5)


def test_a_peer_that_has_its_status_may_go_as_it_likes(serve: Serve) -> None:
    served = serve()
    with served.connect() as destination:
        destination.send(CLOSE)
        assert destination.receive(4) == bytes(4)
        destination.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert served.end().ending is Ending.CLOSED


@pytest.mark.parametrize("length", [1, 23, 24, 31])
def test_half_a_frame_and_the_end(serve: Serve, length: int) -> None:
    served = serve()
    with served.connect() as destination:
        destination.sock.sendall(frame(32, GET, 1, A, 100)[:length])
    assert served.end().ending is Ending.TRUNCATED


@pytest.mark.parametrize("before", [0, 1])
def test_half_a_frame_and_silence(serve: Serve, before: int) -> None:
    served = serve(stall=STALL)
    with served.connect() as destination:
        for _ in range(before):
            destination.get(100, A)
        destination.sock.sendall(frame(32, GET, 1, A, 100)[:20])
        assert served.end().ending is Ending.STALLED


def test_silence_from_the_start(serve: Serve) -> None:
    served = serve(first=STALL)
    with served.connect():
        assert served.end().ending is Ending.IDLE


def test_a_restore_may_take_its_time_before_the_first_page(serve: Serve) -> None:
    served = serve(stall=STALL, idle=STALL)
    with served.connect() as destination:
        time.sleep(3 * STALL)
        assert len(destination.get(100, A)) == PAGE
        assert served.end().ending is Ending.IDLE


def test_a_frame_in_drips_has_no_more_time(serve: Serve) -> None:
    served = serve(stall=STALL)
    with served.connect() as destination, contextlib.suppress(ConnectionError):
        for byte in frame(32, GET, 1, A, 100):
            destination.sock.sendall(bytes([byte]))
            time.sleep(STALL / 4)
        pytest.fail("it was listened to for ever")
    assert served.end().ending is Ending.STALLED


def test_byte_by_byte(serve: Serve) -> None:
    served = serve()
    with served.connect() as destination:
        for _ in range(3):
            for byte in frame(32, GET, 1, A, 100):
                destination.sock.sendall(bytes([byte]))
            assert destination.answer()[0] == 1
        assert destination.close() == 0


def test_frames_that_never_end_where_a_segment_does(serve: Serve) -> None:
    """Always one is incomplete, but never the same."""
    served = serve(stall=STALL)
    stream = frame(32, GET, 1, A, 100) * 34
    end = time.monotonic() + 3 * STALL
    with served.connect() as destination:
        while time.monotonic() < end:
            for start in range(0, len(stream), 17):
                destination.sock.sendall(stream[start : start + 17])
                time.sleep(STALL / 64)
            for _ in range(34):
                assert destination.answer()[0] == 1
        assert destination.close() == 0


def test_idleness(serve: Serve) -> None:
    served = serve(stall=30.0, idle=STALL)
    with served.connect() as destination:
        destination.get(100, A)
        assert served.end().ending is Ending.IDLE


@pytest.mark.slow
@pytest.mark.parametrize("nr", [1, 128])
def test_a_peer_that_never_reads(serve: Serve, nr: int) -> None:
    """It is given up; meanwhile others are served, and nothing piles up."""
    served = serve(stall=LONGER_STALL)
    with served.connect() as destination, served.connect() as other:
        other.get(100, A)
        with contextlib.suppress(OSError):
            while True:
                destination.send(GET, nr, A, 100)
        assert len(other.get(100, A, 100)) == 100 * PAGE
        account = served.end()
        assert account.ending is Ending.STALLED
        assert account.ended is not None
        assert (
            account.ended - account.started < 3 * LONGER_STALL
        )  # and not as long for each part of an answer


@pytest.mark.slow
@pytest.mark.parametrize("nr", [8, 256])
def test_a_peer_that_reads_slowly_is_served_on(serve: Serve, nr: int) -> None:
    """It takes much longer for an answer than one may take nothing."""
    served = serve(WorkloadSpec(size=8 << 20), stall=1.0)
    start = served.images.tasks[0].runs[0].start
    with served.connect() as destination:
        for _ in range(4096 // nr):
            destination.send(GET, nr, start, 100)
        got = 0
        for _ in range(60):
            got += len(destination.sock.recv(16 << 10))
            time.sleep(0.04)
        while got < 4096 // nr * (32 + nr * PAGE):
            piece = len(destination.sock.recv(1 << 20))
            assert piece, served.end()
            got += piece
        assert destination.close() == 0
        assert served.end().ending is Ending.CLOSED


def test_a_cut_does_not_undo_a_session_that_was_closed(serve: Serve) -> None:
    served = serve()
    with served.connect() as destination:
        destination.send(CLOSE)
        assert destination.receive(4) == bytes(4)
        served.server.cut(0)
        assert served.end().ending is Ending.CLOSED


def test_a_pages_file_that_is_shorter_than_its_image(serve: Serve) -> None:
    served = serve()
    task = served.images.tasks[0]
    short = os.open(task.pages, os.O_RDONLY | os.O_CLOEXEC)
    beyond = task.pages.stat().st_size // PAGE - 10
    served.server.add_image(Image(7, array("Q", [A]), array("Q", [100]), array("Q", [beyond])), short)
    for nr in (1, 50):
        with served.connect() as destination:
            destination.send(GET, nr, A, 7)
            destination.send(GET, nr, A + 20 * PAGE, 7)
            account = served.end()
        assert (account.ending, account.errno) == (Ending.DATA, 61)  # ENODATA


def write_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


def truncate(path: Path) -> None:
    os.truncate(path, 100 * PAGE)


def punch(path: Path) -> None:
    with path.open("r+b") as file:
        punch_hole(file.fileno(), 0, PAGE)


@pytest.mark.parametrize("change", [write_a_byte, truncate, punch])
@pytest.mark.parametrize("nr", [1, 50])
def test_images_that_somebody_writes_to(serve: Serve, change: Callable[[Path], None], nr: int) -> None:
    served = serve()
    task = served.images.tasks[0]
    with served.connect() as destination:
        assert len(destination.get(task.pid, task.runs[0].start, nr)) == nr * PAGE
        time.sleep(0.02)  # the clock of older file systems
        change(task.pages)
        destination.send(GET, nr, task.runs[0].start, task.pid)
        assert destination.sock.recv(1) == b""
        account = served.end()
    assert (account.ending, account.pages) == (Ending.CHANGED, nr)


@pytest.mark.parametrize("nr", [15, 64])  # copied, and from the page cache
def test_what_is_not_sent_yet_is_not_sent_when_it_changes(serve: Serve, nr: int) -> None:
    """Of one batch of requests, while the peer takes nothing."""
    served = serve(WorkloadSpec(size=16 << 20))
    task = served.images.tasks[0]
    good = task.pages.read_bytes()
    with served.connect() as destination:
        start = task.runs[0].start
        for n in range(512):
            destination.send(GET, nr, start + (n * nr % 2048) * PAGE, task.pid)
        for _ in range(10):
            destination.answer()
        time.sleep(0.1)
        with task.pages.open("r+b") as file:
            file.write(bytes(len(good)))
        with contextlib.suppress(struct.error, ConnectionResetError):
            for _ in range(502):
                destination.answer()
        account = served.end()
    assert account.ending is Ending.CHANGED
    assert account.pages < 512 * nr


@pytest.mark.parametrize("nr", [1, 64])
def test_the_first_page_is_told_when_it_has_gone(serve: Serve, nr: int) -> None:
    """And not when all that was asked for with it has."""
    served = serve(WorkloadSpec(size=16 << 20), stall=1)
    task = served.images.tasks[0]
    with served.connect() as destination:
        many = b"".join(
            frame(32, GET, 1024, task.runs[0].start + n % 2048 * PAGE, task.pid) for n in range(100)
        )
        destination.sock.sendall(frame(32, GET, nr, task.runs[0].start, task.pid) + many)
        assert select.select([served.server.event_fd], [], [], 10)[0]
        assert list(served.server.ended()) == []
        (account,) = served.server.connections(1)
        assert account.first_page is not None
        assert account.pages >= nr


def test_images_that_are_replaced_are_served_as_they_were(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    task = served.images.tasks[0]
    expected = task.pages.read_bytes()[:PAGE]
    (tmp_path / "new").write_bytes(bytes(PAGE))
    (tmp_path / "new").replace(task.pages)
    with served.connect() as destination:
        assert destination.get(task.pid, task.runs[0].start, 1) == expected


def test_images_in_the_wrong_order(serve: Serve) -> None:
    served = serve()
    (task, *_) = load_tasks(served.images.directory)
    entries = task.entries

    def image(id: int) -> Image:
        return Image(id, entries.starts, entries.nr_pages, entries.page_indices)

    with pytest.raises(UffdError, match="File exists"):
        served.server.add_image(image(task.pid), 0)
    with pytest.raises(UffdError, match="Invalid argument"):
        served.server.add_image(Image(7, entries.starts, entries.nr_pages), 0)
    with served.connect(), pytest.raises(UffdError, match="busy"):
        served.server.add_image(image(7), 0)


# ---- the model -------------------------------------------------------------------------------------------


@given(head=st.binary(min_size=24, max_size=24))
def test_any_first_bytes_are_read_as_the_model_reads_them(head: bytes) -> None:
    _detects_alike(head)


@given(
    command=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 0x1023, 0x1024]),
    flags=st.integers(0, 7),
    padding=st.integers(0, (1 << 32) - 1),
    second=st.one_of(st.integers(0, 1 << 17), st.integers(0, (1 << 64) - 1)),
    third=st.one_of(st.integers(0, 1 << 12), st.integers(0, (1 << 52) - 1).map(lambda page: page << 12)),
)
def test_first_frames_are_read_as_the_model_reads_them(
    command: int, flags: int, padding: int, second: int, third: int
) -> None:
    _detects_alike(struct.pack("<IIQQ", flags << 16 | command, padding, second, third))


def _detects_alike(head: bytes) -> None:
    expected: int
    try:
        expected = detect_frame_size(head) or 0
    except RemoteProtocolError:
        expected = -71  # EPROTO
    assert lib.criupy_frame_detect(head) == expected


class Model:
    """A server in Python: the sans-IO codec over the same images."""

    def __init__(self, images: WrittenImages) -> None:
        self.images = images
        self.service = PageService()
        self.sent = b""

    def run(self, data: bytes) -> str:
        """Take in a whole stream and its end; return how that ends."""
        if data:
            self.service.receive(data)
        self.service.receive(b"")
        try:
            while True:
                match self.service.next_event():
                    case Get(pid, address, nr_pages):
                        if not self.give(pid, address, nr_pages):
                            return "refused"
                    case Close():
                        self.sent += self.service.answer_close()
                    case ConnectionClosed(after_close):
                        return "closed" if after_close else "eof"
                    case _:
                        return "refused"
        except RemoteProtocolError:
            return "refused"

    def give(self, pid: int, address: int, nr_pages: int) -> bool:
        for task in self.images.tasks:
            for run in task.runs:
                first = (address - run.start) // PAGE
                if task.pid == pid and 0 <= first < run.nr_pages:
                    nr = min(nr_pages, run.nr_pages - first)
                    self.sent += self.service.answer_get(nr)
                    pages = (self.images.spec.page(task.task, run.first + first + n) for n in range(nr))
                    self.sent += b"".join(pages)
                    return True
        return False


gets = st.tuples(
    st.just(GET),
    st.integers(1, 40),
    st.integers(-1, 33).map(lambda page: A + page * PAGE),
    st.sampled_from([100, 101, 101, 102]),
)
others = st.sampled_from(
    [(CLOSE, 0, 0, 0), (FORCE_CLOSE, 0, 0, 0), (3, 0, 0, 100 << 8 | 1), (GET, 0, A, 100)]
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> WrittenImages:
    spec = WorkloadSpec(size=32 * PAGE, tree=2)
    return write_images(tmp_path_factory.mktemp("small"), spec, style="full")


@given(
    frame_size=st.sampled_from([24, 32]),
    frames=st.lists(gets, max_size=8),
    last=st.none() | others,
    trailing=st.binary(max_size=40),
    cuts=st.lists(st.integers(1, 60), max_size=12) | st.just([1] * 400),
)
def test_a_stream_in_any_pieces_is_answered_as_by_the_model(
    small: WrittenImages,
    frame_size: int,
    frames: list[tuple[int, int, int, int]],
    last: tuple[int, int, int, int] | None,
    trailing: bytes,
    cuts: list[int],
) -> None:
    stream = b"".join(frame(frame_size, *words) for words in [*frames, *([last] if last else [])]) + trailing
    model = Model(small)
    expected = model.run(stream)
    with contextlib.closing(Served(small)) as served:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            served.server.serve(theirs.fileno())
            theirs.detach()
            with contextlib.suppress(ConnectionError):
                for cut in cuts:
                    piece, stream = stream[:cut], stream[cut:]
                    ours.sendall(piece)
                ours.sendall(stream)
                ours.shutdown(socket.SHUT_WR)
            got = bytearray()
            with contextlib.suppress(ConnectionResetError):
                while piece := ours.recv(1 << 20):
                    got += piece
        ending = served.end().ending
    if last is not None and last[0] == FORCE_CLOSE and ending is Ending.CLOSED:
        # After it nothing is waited for: others hold the peer's socket.
        assert bytes(got) == model.sent
    elif expected == "refused":
        assert ending is not None
        assert ending >= Ending.COMMAND
        assert model.sent.startswith(bytes(got))
    else:
        assert ending is (Ending.CLOSED if expected == "closed" else Ending.EOF)
        assert bytes(got) == model.sent
