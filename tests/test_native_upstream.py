"""The fetcher of a relay: it asks a stock source for every page once, and gives them to a page server."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import select
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._uffd.image_linux import Image
from criupy._uffd.pager_linux import Link, ReplyFault
from criupy._uffd.server_linux import Account, Ending, Server
from criupy._uffd.upstream_linux import Upstream, UpstreamState
from criupy.errors import UffdError
from criupy.page_server._telling_linux import tell
from criupy.testing.certificates import Certificates
from criupy.wire.extension import Refusal, encode_getv
from criupy.wire.page_server import Command, Frame
from page_server_clients import ADD_F_PRESENT, GET, HANG, PAGE, Destination, frame, loopback
from test_native_server_sessions import HELLO, KEY, Extended
from upstream_source import BASE, Memory, Source

pytestmark = pytest.mark.usefixtures("nothing_is_left")

MEMORY = Memory()
TOTAL = MEMORY.pages_per_task * len(MEMORY.pids)
SILENCE = 0.3
READ_AHEAD = 3
"""So many requests are outstanding while nobody waits, of 32 pages each."""
FAR = BASE + 5100 * PAGE
"""A page of the last extent, which read-ahead comes to late."""


class Relay:
    """A source, an upstream that fetches from it, and a server that gives out what it fetches."""

    def __init__(
        self, memory: Memory = MEMORY, *, cache_pages: int | None = None, timeout: float = 30.0, **source: Any
    ) -> None:
        self.memory = memory
        self.source = Source(memory, **source)
        self.upstream = Upstream(link_timeout=timeout, cache_pages=cache_pages)
        self.server = Server(stall_timeout=30.0, idle_timeout=None)
        self.files = {
            pid: os.memfd_create(f"pages-{pid}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for pid in memory.pids
        }
        for pid, fd in self.files.items():
            self.upstream.add_image(memory.image(pid), os.dup(fd))
        self.server.add_upstream(self.upstream)

    def start(self) -> None:
        self.upstream.start(self.source.take_socket(), self.source.frame_size)

    def connect(self, frame_size: int = 32) -> Destination:
        ours, theirs = loopback()
        with theirs:
            self.server.serve(theirs.fileno())
            theirs.detach()
        return Destination(ours, frame_size)

    def until(self, is_so: Callable[[UpstreamState], bool]) -> UpstreamState:
        """Wait until the upstream tells of it."""
        end = time.monotonic() + HANG
        while not is_so(state := self.upstream.snapshot()):
            left = end - time.monotonic()
            assert left > 0, state
            select.select([self.upstream.event_fd], [], [], left)
        return state

    def polled(self, is_so: Callable[[UpstreamState], bool]) -> UpstreamState:
        """Wait for what no event tells of."""
        end = time.monotonic() + HANG
        while not is_so(state := self.upstream.snapshot()):
            assert time.monotonic() < end, state
            time.sleep(0.001)
        return state

    def ended(self, nr: int = 1) -> list[Account]:
        found: list[Account] = []
        while len(found) < nr:
            assert select.select([self.server.event_fd], [], [], HANG)[0], "no connection ends"
            found += self.server.ended()
        return found

    def check(self, destination: Destination, pid: int, page: int, nr: int = 1) -> None:
        """Fetch from the page server, and compare."""
        address = BASE + page * PAGE
        assert destination.get(pid, address, nr) == self.memory.pages(pid, address, nr)

    def kept_blocks(self) -> int:
        """Return how many pages the files have."""
        return sum(os.fstat(fd).st_blocks * 512 // PAGE for fd in self.files.values())

    def close(self) -> None:
        self.server.close()
        self.upstream.destroy()
        self.source.close()
        for fd in self.files.values():
            os.close(fd)
        assert self.source.violations == []


Make: TypeAlias = Callable[..., Relay]


@pytest.fixture
def relay() -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def make(*args: Any, **kwargs: Any) -> Relay:
            made = Relay(*args, **kwargs)
            stack.callback(made.close)
            return made

        yield make


def held_back(relay: Make, **kwargs: Any) -> Relay:
    """Start with a source that answers nothing yet; read-ahead is outstanding."""
    made = relay(**kwargs)
    made.source.gate.clear()
    made.start()
    made.source.wait_for_requests(READ_AHEAD)
    return made


# ---- pages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_pages", [None, 64])
@pytest.mark.parametrize(("up", "down"), [(24, 32), (32, 24)])
def test_what_a_client_gets_is_what_the_source_has(
    relay: Make, up: int, down: int, cache_pages: int | None
) -> None:
    made = relay(frame_size=up, cache_pages=cache_pages)
    made.start()
    runs = [(pid, first, nr) for pid in MEMORY.pids for first, nr in MEMORY.extents]
    shuffled = random.Random(1)
    with made.connect(down) as destination:
        for _ in range(200):
            pid, first, nr = shuffled.choice(runs)
            skip = shuffled.randrange(nr)
            made.check(destination, pid, first + skip, min(nr - skip, shuffled.choice([1, 3, 40, 300])))
        assert destination.close() == 0
    (account,) = made.ended()
    assert (account.ending, account.frame_size) == (Ending.CLOSED, down)


@pytest.mark.parametrize("max_pages", [1, 7, 1024])
@pytest.mark.parametrize("frame_size", [24, 32])
def test_read_ahead_completes_the_files(relay: Make, frame_size: int, max_pages: int) -> None:
    made = relay(frame_size=frame_size, max_pages=max_pages)
    made.start()
    state = made.until(lambda state: state.complete)
    assert (state.pages_kept, state.pages_fetched, state.pages_total) == (TOTAL, TOTAL, TOTAL)
    assert (state.pages_outstanding, state.urgent_requests, state.disk_errno) == (0, 0, 0)
    for pid, fd in made.files.items():
        assert os.pread(fd, 1 << 30, 0) == MEMORY.file(pid)


def test_what_is_asked_for_is_fetched_once(relay: Make) -> None:
    made = held_back(relay)
    with contextlib.ExitStack() as stack:
        several = [stack.enter_context(made.connect(24 if n % 2 else 32)) for n in range(6)]
        for destination in several:
            destination.send(GET, 3, FAR, 101)
        made.source.wait_for_requests(READ_AHEAD + 1)
        time.sleep(0.05)
        made.source.gate.set()
        for destination in several:
            nr, *_, data = destination.answer()
            assert (nr, data) == (3, MEMORY.pages(101, FAR, 3))
        made.until(lambda state: state.complete)
    seen: set[tuple[int, int]] = set()
    for nr, address, pid in made.source.requests:
        pages = {(pid, address + n * PAGE) for n in range(nr)}
        assert not seen & pages
        seen |= pages
    assert len(seen) == TOTAL


@pytest.mark.parametrize("cache_pages", [None, 100])
def test_vectored_requests(relay: Make, cache_pages: int | None) -> None:
    """Their answer has all pages, in however many pieces they come here."""
    made = relay(cache_pages=cache_pages, max_pages=20)
    made.start()
    shuffled = random.Random(3)
    ours, theirs = loopback()
    with Extended(ours) as destination:
        made.server.serve(theirs.detach())
        destination.say(HELLO.encode(KEY))
        for _ in range(20):
            pid = shuffled.choice(MEMORY.pids)
            runs = [(BASE + first * PAGE, min(nr, 60)) for first, nr in MEMORY.extents]
            runs += [(FAR + 2 * n * PAGE, 1) for n in range(50)]
            expected = b"".join(MEMORY.pages(pid, *run) for run in runs)
            assert destination.getv(pid, runs) == expected
        assert destination.close() == 0


@pytest.mark.parametrize("cache_pages", [None, 100])
def test_over_tls(relay: Make, certificates: Certificates, cache_pages: int | None) -> None:
    from criupy._tls.tls_linux import TlsContext
    from test_tls_serving import python_end, wrap

    made = relay(cache_pages=cache_pages)
    made.start()
    ours, theirs = loopback()
    theirs.setblocking(False)
    session = TlsContext(certificates.files("server"), server=True).session(theirs.fileno(), "127.0.0.1")
    sock = wrap(python_end(certificates, server=False), ours, session, theirs.fileno(), server=False)
    made.server.serve(theirs.detach(), transport=session.transport)
    session.given()
    with Destination(sock) as destination:
        for pid in MEMORY.pids:
            for first, nr in MEMORY.extents:
                for much in (1, nr):
                    made.check(destination, pid, first, much)
        assert destination.close() == 0


@pytest.mark.parametrize("cache_pages", [None, 4096])
def test_the_end_of_an_answer_waits_for_no_acknowledgement(relay: Make, cache_pages: int | None) -> None:
    """A receiver delays those by 40 ms, and over a network they take a round trip."""
    made = relay(cache_pages=cache_pages)
    made.start()
    made.until(lambda state: state.complete)
    took = []
    with made.connect() as destination:
        for n in range(20):
            destination.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            begun = time.monotonic()
            made.check(destination, 100, n, 17)
            took.append(time.monotonic() - begun)
    assert sorted(took)[10] < 0.02


def test_several_clients_at_once(relay: Make) -> None:
    made = relay(max_pages=50, cache_pages=400)
    made.start()
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        shuffled = random.Random(seed)
        try:
            with made.connect(shuffled.choice([24, 32])) as destination:
                for _ in range(100):
                    first, nr = shuffled.choice(MEMORY.extents)
                    skip = shuffled.randrange(nr)
                    much = min(nr - skip, shuffled.choice([1, 3, 40, 300]))
                    made.check(destination, shuffled.choice(MEMORY.pids), first + skip, much)
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


# ---- order ---------------------------------------------------------------------------------------------


def test_what_is_waited_for_goes_before_read_ahead(relay: Make) -> None:
    made = held_back(relay)
    with made.connect() as destination:
        destination.send(GET, 1, FAR, 101)
        made.source.wait_for_requests(READ_AHEAD + 1)
        made.source.gate.set()
        assert destination.answer()[3] == MEMORY.page(101, FAR)
        made.until(lambda state: state.complete)
    assert [nr for nr, *_ in made.source.requests[:READ_AHEAD]] == [32] * READ_AHEAD
    assert made.source.requests[READ_AHEAD] == (1, FAR, 101)
    # and read-ahead goes on behind it
    assert made.source.requests[READ_AHEAD + 1][1:] == (FAR + PAGE, 101)
    assert made.upstream.snapshot().urgent_requests == 1


def test_after_somebody_has_waited_nothing_stands_in_the_way_of_the_next(relay: Make) -> None:
    """But one request of read-ahead."""
    outstanding: list[int] = []

    def edit(number: int, get: tuple[int, int, int], answer: bytes) -> bytes:
        outstanding.append(len(made.source.requests) - number)
        return answer

    made = held_back(relay, edit=edit)
    with made.connect() as destination:
        destination.send(GET, 1, FAR, 101)
        made.source.wait_for_requests(READ_AHEAD + 1)
        made.source.gate.set()
        assert destination.answer()[0] == 1
        made.until(lambda state: state.complete)
    assert max(outstanding[READ_AHEAD + 1 : READ_AHEAD + 64]) == 1
    assert max(outstanding[READ_AHEAD + 64 :]) == READ_AHEAD  # for a while


def test_much_is_asked_for_at_once_but_behind_little(relay: Make) -> None:
    made = held_back(relay)
    with made.connect() as much, made.connect() as little:
        much.send(GET, 900, BASE + 1000 * PAGE, 101)
        time.sleep(0.05)
        little.send(GET, 2, FAR, 101)
        made.source.wait_for_requests(READ_AHEAD + 1)
        made.source.gate.set()
        assert much.answer()[0] == 256
        assert little.answer()[0] == 2
    assert made.source.requests[READ_AHEAD : READ_AHEAD + 2] == [
        (2, FAR, 101),
        (256, BASE + 1000 * PAGE, 101),
    ]


def test_a_kept_page_does_not_wait_for_another(relay: Make) -> None:
    """Of requests that were received together."""
    answered = threading.Event()

    def first_only(number: int, get: tuple[int, int, int], answer: bytes) -> bytes:
        if number:
            assert answered.wait(HANG)
        return answer

    made = relay(edit=first_only)
    made.start()
    made.polled(lambda state: state.pages_kept > 0)
    with made.connect() as destination:
        destination.sock.sendall(frame(32, GET, 1, BASE, 100) + frame(32, GET, 1, FAR, 100))
        assert destination.answer()[3] == MEMORY.page(100, BASE)
        answered.set()
        assert destination.answer()[3] == MEMORY.page(100, FAR)


# ---- the cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_pages", [1, 8, 100, 500])
def test_a_cache_is_never_larger_than_it_may_be(relay: Make, cache_pages: int) -> None:
    made = relay(cache_pages=cache_pages)
    made.start()
    most = 0
    with made.connect() as destination:
        for _ in range(2):  # the second time everything is asked for again
            for pid in MEMORY.pids:
                for first, nr in MEMORY.extents:
                    for page in range(first, first + nr, 32):
                        made.check(destination, pid, page, min(32, first + nr - page))
                        most = max(most, made.kept_blocks())
    state = made.upstream.snapshot()
    assert 0 < most <= cache_pages
    assert state.pages_fetched >= 2 * TOTAL - cache_pages
    assert state.pages_evicted > 0
    assert not state.complete


def test_what_is_being_sent_is_not_evicted(relay: Make) -> None:
    """Though its client takes nothing, and others take everything."""
    made = relay(cache_pages=800)
    made.start()
    expected = MEMORY.pages(101, BASE + 1000 * PAGE, 100)
    with contextlib.ExitStack() as stack:
        several = [stack.enter_context(made.connect()) for _ in range(4)]
        for destination in several:
            destination.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            for _ in range(40):
                destination.send(GET, 100, BASE + 1000 * PAGE, 101)
        time.sleep(0.2)
        with made.connect() as other:
            for first, nr in MEMORY.extents * 2:
                made.check(other, 100, first, nr)
        for destination in several:
            for _ in range(40):
                nr, *_, data = destination.answer()
                assert data == expected[: nr * PAGE]


def test_read_ahead_stops_when_all_that_is_kept_is_still_wanted(relay: Make) -> None:
    made = relay(cache_pages=200)
    made.start()
    made.polled(lambda state: state.pages_kept == 200)
    time.sleep(0.05)
    state = made.upstream.snapshot()
    assert (state.pages_fetched, state.pages_evicted, made.kept_blocks()) == (200, 0, 200)
    with made.connect() as destination:
        made.check(destination, 100, 0, 20)  # goes, and makes room
        made.polled(lambda state: state.pages_fetched == 220)
        made.check(destination, 101, 5000, 10)  # takes the place of what came first
        made.check(destination, 100, 100, 50)
    assert made.upstream.snapshot().pages_kept <= 200


def test_what_was_served_is_not_read_ahead_again(relay: Make) -> None:
    made = relay(cache_pages=100)
    made.start()
    with made.connect() as destination:
        for pid in MEMORY.pids:
            for first, nr in MEMORY.extents:
                made.check(destination, pid, first, nr)
        time.sleep(0.05)
    assert made.upstream.snapshot().pages_fetched <= TOTAL + 100


def test_a_cache_that_holds_everything_is_complete(relay: Make) -> None:
    made = relay(cache_pages=TOTAL)
    made.start()
    state = made.until(lambda state: state.complete)
    assert state.pages_evicted == 0


# ---- a source that fails -------------------------------------------------------------------------------


def stop_at(source_end: str, answer_number: int, length: int) -> Callable[[Source], None]:
    """Let a source end in the middle of an answer."""

    def prepare(source: Source) -> None:
        def edit(number: int, get: tuple[int, int, int], answer: bytes) -> bytes:
            if number < answer_number:
                return answer
            source.sock.sendall(answer[:length])
            if source_end == "fin":
                source.sock.shutdown(socket.SHUT_WR)
            elif source_end == "reset":
                time.sleep(0.05)  # else what was sent is lost with it
                source.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                with contextlib.suppress(OSError):
                    connect_to_nothing(source.sock)
            raise StopIteration

        source.edit = edit

    return prepare


def connect_to_nothing(sock: socket.socket) -> None:
    """Reset a connection at once: connect(AF_UNSPEC), which the socket module does not know."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.connect(sock.fileno(), struct.pack("H14x", 0), 16)


@pytest.mark.parametrize("length", [0, 5, 32, 32 + PAGE + 7])
@pytest.mark.parametrize(
    ("end", "error"),
    [("fin", errno.EPIPE), ("reset", errno.ECONNRESET), ("silence", errno.ETIMEDOUT)],
)
def test_a_source_that_dies(relay: Make, end: str, error: int, length: int) -> None:
    made = relay(timeout=SILENCE)
    stop_at(end, 2, length)(made.source)
    made.start()
    state = made.until(lambda state: state.link is not Link.OPEN)
    assert (state.link, state.errno, state.reply_fault) == (Link.LOST, error, ReplyFault.NONE)
    assert state.pages_outstanding == 0
    with made.connect() as destination:
        made.check(destination, 100, 0, 64)  # what is kept is given out
        destination.send(GET, 1, FAR, 101)
        assert destination.is_over()
    (account,) = made.ended()
    assert (account.ending, account.pages) == (Ending.GONE, 64)
    if end != "reset":
        assert made.source.ended() == "reset"


def test_who_waits_is_told_that_the_source_is_gone(relay: Make, caplog: pytest.LogCaptureFixture) -> None:
    made = held_back(relay)
    with made.connect() as destination, made.connect() as other:
        destination.send(GET, 1, FAR, 101)
        other.send(GET, 1, BASE, 100)  # in flight
        made.source.wait_for_requests(READ_AHEAD + 1)
        made.source.sock.shutdown(socket.SHUT_WR)
        assert destination.is_over()
        assert other.is_over()
    for account in made.ended(2):
        assert account.ending is Ending.GONE
        assert account.ending < Ending.COMMAND  # the client did nothing wrong
        tell(account, "a peer")
    assert "a peer: the source has ended before it gave the pages that were asked for; " in caplog.text


def test_silence_is_nothing_bad_when_nothing_is_asked_for(relay: Make) -> None:
    made = relay(timeout=SILENCE)
    made.start()
    made.until(lambda state: state.complete)
    time.sleep(2 * SILENCE)
    assert made.upstream.snapshot().link is Link.OPEN


WRONG = {
    "command": ((4 << 16 | 5, 0, 0, 0), ReplyFault.COMMAND),
    "flags": ((6, 0, 0, 0), ReplyFault.COMMAND),
    "address": ((ADD_F_PRESENT, 0, PAGE, 0), ReplyFault.ADDRESS),
    "id": ((ADD_F_PRESENT, 0, 0, 1), ReplyFault.ID),
    "more": ((ADD_F_PRESENT, 1, 0, 0), ReplyFault.COUNT),
    "none": ((ADD_F_PRESENT, None, 0, 0), ReplyFault.COUNT),
}


@pytest.mark.parametrize("frame_size", [24, 32])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer(relay: Make, case: str, at: int, frame_size: int) -> None:
    (command, more, further, other), fault = WRONG[case]

    def edit(number: int, get: tuple[int, int, int], answer: bytes) -> bytes:
        nr, address, pid = get
        if number != at:
            return answer
        nr = 0 if more is None else nr + more
        return frame(frame_size, command, nr, address + further, pid + other) + answer[frame_size:]

    made = relay(frame_size=frame_size, edit=edit)
    made.start()
    state = made.until(lambda state: state.link is not Link.OPEN)
    assert (state.link, state.errno, state.reply_fault) == (Link.LOST, errno.EPROTO, fault)
    assert state.command == command
    assert state.offset == at * frame_size + state.pages_fetched * PAGE
    assert made.source.ended() == "reset"


def test_an_answer_that_nobody_asked_for(relay: Make) -> None:
    made = relay()
    made.start()
    made.until(lambda state: state.complete)
    made.source.sock.sendall(b"x")
    state = made.until(lambda state: state.link is not Link.OPEN)
    assert (state.errno, state.reply_fault) == (errno.EPROTO, ReplyFault.UNASKED)
    with made.connect() as destination:
        made.check(destination, 100, 5000, 255)


def test_a_source_that_wants_tls(relay: Make) -> None:
    made = relay()
    stop_at("fin", 0, 0)(made.source)
    made.source.sock.sendall(b"\x15\x03\x03\0\2\2\x28")
    made.source.gate.clear()
    made.start()
    made.source.wait_for_requests(1)
    made.source.gate.set()
    state = made.until(lambda state: state.link is not Link.OPEN)
    assert (state.errno, state.reply_fault) == (errno.EPROTO, ReplyFault.TLS)


# ---- ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, -5])
@pytest.mark.parametrize("frame_size", [24, 32])
def test_close_reads_what_is_outstanding(relay: Make, frame_size: int, status: int) -> None:
    made = held_back(relay, frame_size=frame_size, status=status)
    asked = sum(nr for nr, *_ in made.source.requests)
    made.upstream.close()
    made.upstream.close()
    with made.connect() as destination:
        destination.send(GET, 1, FAR, 101)  # is not asked for any more
        assert destination.is_over()
    made.source.gate.set()
    state = made.until(lambda state: state.link is not Link.OPEN)
    assert (state.link, state.errno, state.close_status) == (Link.CLOSED, 0, status)
    assert state.pages_kept == asked
    assert made.source.ended() == "fin"
    assert made.ended()[0].ending is Ending.GONE
    with made.connect() as destination:
        made.check(destination, 100, 0, 64)


@pytest.mark.parametrize("how", ["close", "reset", "destroy"])
def test_an_end_reaches_the_source_whoever_holds_the_socket(relay: Make, how: str) -> None:
    made = relay()
    with socket.socket(fileno=os.dup(made.source.theirs.fileno())) as duplicate:
        made.start()
        assert struct.unpack("ii", duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == (1, 0)
        made.polled(lambda state: state.pages_kept > 0)
        getattr(made.upstream, how)()
        assert made.source.ended() == ("fin" if how == "close" else "reset")
    if how == "reset":
        assert made.until(lambda state: state.link is not Link.OPEN).link is Link.RESET


@pytest.mark.parametrize("cache_pages", [None, 4096])
def test_a_source_that_goes_on_is_given_to_nobody_any_more(relay: Make, cache_pages: int | None) -> None:
    """Not even what is here: whoever has it all would run, too."""
    made = relay(cache_pages=cache_pages)
    made.start()
    made.until(lambda state: state.complete)
    ours, theirs = loopback()
    with Extended(ours) as ended, made.connect() as stock, theirs:
        made.server.serve(theirs.fileno())
        theirs.detach()
        ended.say(HELLO.encode(KEY))
        assert ended.getv(100, [(BASE, 2)]) == MEMORY.pages(100, BASE, 2)
        made.check(stock, 100, 0, 2)
        made.upstream.reset()
        made.until(lambda state: state.link is Link.RESET)
        ended.say(encode_getv(100, [(BASE, 1), (BASE + 8 * PAGE, 1)]))
        assert Frame.decode(ended.receive(32), 32) == Frame(Command.REFUSED, Refusal.ENDED)
        stock.send(GET, 1, BASE, 100)
        assert stock.is_over()
    assert {(account.ending, account.errno) for account in made.ended(2)} == {(Ending.GONE, errno.ESHUTDOWN)}


def test_a_source_that_dies_before_it_answers_close(relay: Make) -> None:
    made = relay()
    made.start()
    made.until(lambda state: state.complete)
    made.source.gate.clear()
    made.upstream.close()
    time.sleep(0.05)
    made.source.sock.shutdown(socket.SHUT_WR)
    state = made.until(lambda state: state.link is not Link.OPEN)
    assert (state.link, state.errno, state.close_status) == (Link.LOST, errno.EPIPE, None)


def test_no_answer_to_close(relay: Make) -> None:
    made = relay(timeout=SILENCE)
    made.start()
    made.until(lambda state: state.complete)
    made.source.gate.clear()
    made.upstream.close()
    assert made.until(lambda state: state.link is not Link.OPEN).errno == errno.ETIMEDOUT


def test_a_connection_that_waits_can_be_cut(relay: Make) -> None:
    made = held_back(relay)
    with made.connect() as destination, made.connect() as other:
        destination.send(GET, 1, FAR, 101)
        other.send(GET, 1, FAR, 101)
        made.source.wait_for_requests(READ_AHEAD + 1)
        made.server.cut(0)
        (account,) = made.ended()
        assert (account.serial, account.ending) == (0, Ending.CUT)
        made.source.gate.set()
        assert other.answer()[0] == 1


def test_a_server_that_ends_while_a_client_waits(relay: Make) -> None:
    made = held_back(relay)
    with made.connect() as destination:
        destination.send(GET, 1, FAR, 101)
        made.source.wait_for_requests(READ_AHEAD + 1)
        made.server.close()
        assert destination.is_over()


@pytest.mark.parametrize("after", [0.0, 0.001, 0.01])
@pytest.mark.parametrize("cache_pages", [None, 100])
def test_it_can_be_destroyed_at_any_time(relay: Make, cache_pages: int | None, after: float) -> None:
    """The source goes on, and so the server gives nothing more of it."""
    made = relay(cache_pages=cache_pages)
    made.start()
    with made.connect() as destination:
        kept = destination.get(100, BASE, 5)
        for n in range(40):
            destination.send(GET, 30, BASE + (1000 + n) * PAGE, 101)
        time.sleep(after)
        made.upstream.destroy()
        made.upstream.destroy()
        with contextlib.suppress(struct.error, ConnectionResetError):
            for n in range(40):
                nr, *_, data = destination.answer()
                # Of the last one the end may be lost, as its connection ends with requests unread.
                assert data == MEMORY.pages(101, BASE + (1000 + n) * PAGE, nr)[: len(data)]
    assert made.ended()[0].ending in {Ending.GONE, Ending.EOF, Ending.RESET}
    assert kept == MEMORY.pages(100, BASE, 5)
    assert made.source.ended() == "reset"
    with made.connect() as destination:
        destination.send(GET, 1, BASE, 100)
        assert destination.is_over()
    with pytest.raises(ValueError, match="destroyed"):
        made.upstream.snapshot()


def test_without_a_start() -> None:
    with Upstream(link_timeout=1) as upstream, Server(stall_timeout=1, idle_timeout=None) as server:
        upstream.add_image(MEMORY.image(100), os.memfd_create("pages"))
        server.add_upstream(upstream)
        ours, theirs = loopback()
        with Destination(ours) as destination:
            server.serve(theirs.detach())
            destination.send(GET, 1, BASE, 100)
            time.sleep(0.02)
            with pytest.raises(UffdError, match="not connected"):
                upstream.close()
            upstream.destroy()
            assert destination.is_over()


# ---- what cannot be kept -------------------------------------------------------------------------------


def test_a_full_disk(relay: Make) -> None:
    """Here a file that may not grow."""
    made = relay()
    os.ftruncate(made.files[100], 100 * PAGE)
    fcntl.fcntl(made.files[100], fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    made.start()
    state = made.until(lambda state: state.disk_errno != 0)
    assert (state.disk_errno, state.link, state.complete) == (errno.EPERM, Link.OPEN, False)
    made.polled(lambda state: not state.pages_outstanding)
    with made.connect() as destination:
        made.check(destination, 100, 0, 64)
        destination.send(GET, 1, FAR, 100)
        assert destination.is_over()
    (account,) = made.ended()
    assert (account.ending, account.errno) == (Ending.DISK, errno.EPERM)
    requests = len(made.source.requests)
    made.upstream.close()
    assert made.until(lambda state: state.link is not Link.OPEN).link is Link.CLOSED
    assert len(made.source.requests) == requests


def test_who_waits_is_told_of_a_full_disk(relay: Make, caplog: pytest.LogCaptureFixture) -> None:
    made = relay()
    made.source.gate.clear()
    fcntl.fcntl(made.files[101], fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    made.start()
    made.source.wait_for_requests(READ_AHEAD)
    with made.connect() as destination:
        destination.send(GET, 1, FAR, 101)
        made.source.wait_for_requests(READ_AHEAD + 1)
        made.source.gate.set()
        assert destination.is_over()
    (account,) = made.ended()
    assert account.ending is Ending.DISK
    tell(account, "a peer")
    assert "a peer: what the source sends cannot be kept: Operation not permitted; " in caplog.text


# ---- misuse --------------------------------------------------------------------------------------------


def test_in_the_wrong_order() -> None:
    ours, theirs = loopback()
    with (
        ours,
        theirs,
        Upstream(link_timeout=1) as upstream,
        Server(stall_timeout=1, idle_timeout=None) as server,
        Server(stall_timeout=1, idle_timeout=None, receives=True) as receiver,
    ):
        upstream.add_image(MEMORY.image(100), os.memfd_create("pages"))
        with pytest.raises(UffdError, match="File exists"):
            upstream.add_image(MEMORY.image(100), 0)
        with pytest.raises(UffdError, match="Invalid argument"):
            upstream.add_image(Image(7, array("Q", [BASE]), array("Q", [1])), 0)
        with pytest.raises(UffdError, match="Invalid argument"):
            receiver.add_upstream(upstream)
        with pytest.raises(UffdError, match="Invalid argument"):
            upstream.start(ours.fileno(), 28)
        server.add_image(MEMORY.image(7), os.memfd_create("pages"))
        server.add_upstream(upstream)
        with pytest.raises(UffdError, match="busy"):
            server.add_upstream(upstream)
        upstream.start(ours.detach(), 32)
        with pytest.raises(UffdError, match="busy"):
            upstream.start(theirs.fileno(), 32)
        with pytest.raises(UffdError, match="busy"):
            upstream.add_image(MEMORY.image(101), 0)
    with pytest.raises(ValueError, match="cache_pages"):
        Upstream(link_timeout=1, cache_pages=0)
    with pytest.raises(UffdError, match="Invalid argument"):
        Upstream(link_timeout=0)


def test_an_id_that_the_server_has_already() -> None:
    with Upstream(link_timeout=1) as upstream, Server(stall_timeout=1, idle_timeout=None) as server:
        upstream.add_image(MEMORY.image(100), os.memfd_create("pages"))
        server.add_image(MEMORY.image(100), os.memfd_create("pages"))
        with pytest.raises(UffdError, match="File exists"):
            server.add_upstream(upstream)


def test_nothing_to_fetch(relay: Make) -> None:
    made = relay(Memory(pids=(), extents=()))
    made.start()
    time.sleep(0.02)
    made.upstream.close()
    state = made.until(lambda state: state.link is not Link.OPEN)
    assert (state.link, state.complete, state.close_status) == (Link.CLOSED, True, 0)
