"""The client of a page server, sans IO: the daemon that fetches pages.

``TRANSITIONS`` is the table of states; what is not in it is an error, ours or the
server's. Each GET has one answer, in order, and the status comes after the last of them.

An answer is a frame ``ADD_F`` with PRESENT, the address and pid of the GET,
and 1 to as many pages as were asked for, followed by their bytes. A shorter
answer is normal (a server stops at its own buffer's end); the rest has to be
asked for again. There is no empty or negative answer.

What ending the connection means lies outside the bytes: to a live source a
plain close means success and it kills its process. Read every outstanding
answer, CLOSE and read the status when all is well, and reset the connection
when it is not.

Rules of this file: ``receive`` only keeps what it is given, ``next_event``
decides, and pages are handed on as views of what was received.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from criupy.errors import LocalProtocolError, RemoteProtocolError
from criupy.wire.page_server import (
    MAX_GET_PAGES,
    PAGE_SHIFT,
    STATUS,
    Command,
    Frame,
    FrameSize,
    Incoming,
    PageFlags,
    check_run,
)


@dataclass(frozen=True, slots=True)
class Request:
    """A GET: pages at a dump-time address of the process with this pid at dump time."""

    pid: int
    address: int
    nr_pages: int


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the oldest request begins; ``nr_pages`` may be less than was asked for."""

    request: Request
    nr_pages: int


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes of the current answer, ``offset`` bytes after its start; ``last`` ends it."""

    request: Request
    offset: int
    data: memoryview
    last: bool


@dataclass(frozen=True, slots=True)
class Status:
    """The server's answer to CLOSE; 0 is success."""

    status: int


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The server closed the connection, after its status."""


class NeedData(enum.Enum):
    """No event yet: receive more."""

    NEED_DATA = enum.auto()


NEED_DATA: Final = NeedData.NEED_DATA

ClientEvent: TypeAlias = Reply | Payload | Status | ConnectionClosed | NeedData


class State(enum.Enum):
    """Where a connection is; FAILED when the server broke the protocol, or left."""

    OPEN = enum.auto()
    CLOSING = enum.auto()
    CLOSED = enum.auto()
    FAILED = enum.auto()


class Step(enum.Enum):
    """What is sent or received."""

    GET = "we send GET"
    CLOSE = "we send CLOSE or FORCE_CLOSE"
    ANSWER = "the answer to a GET"
    STATUS = "the status"
    END = "end of stream"


TRANSITIONS: Final[Mapping[State, Mapping[Step, State]]] = {
    State.OPEN: {Step.GET: State.OPEN, Step.CLOSE: State.CLOSING, Step.ANSWER: State.OPEN},
    State.CLOSING: {Step.ANSWER: State.CLOSING, Step.STATUS: State.CLOSED},
    State.CLOSED: {Step.END: State.CLOSED},
    State.FAILED: {},
}


class PageClient:
    """One connection to a page server; ``frame_size`` is what the server speaks."""

    def __init__(self, frame_size: FrameSize) -> None:
        self._frame_size = frame_size
        self._state = State.OPEN
        self._incoming = Incoming()
        self._requests: deque[Request] = deque()
        self._done = 0  # bytes of the current answer's pages handed on
        self._length = 0  # bytes of the current answer's pages, 0 between answers

    @property
    def state(self) -> State:
        """Where the connection is."""
        return self._state

    @property
    def outstanding(self) -> int:
        """Number of requests whose answer is not complete."""
        return len(self._requests)

    @property
    def bytes_wanted(self) -> int:
        """Bytes that are missing to the end of the frame, pages or status being received."""
        if self._length:
            goal = self._length - self._done
        elif self._requests:
            goal = self._frame_size
        else:
            goal = STATUS.size if self._state is State.CLOSING else 0
        return max(0, goal - self._incoming.length)

    def get(self, pid: int, address: int, nr_pages: int) -> bytes:
        """Ask for pages; return the bytes to send.

        Only lazy pages of a known task may be asked for: a stock source hangs
        or crashes on others. This codec cannot know which those are.
        """
        self._expect("get", Step.GET)
        if not 0 < pid < 1 << 31:
            raise LocalProtocolError(f"get: pid {pid} is none")
        if problem := check_run(address, nr_pages):
            raise LocalProtocolError(f"get: {problem}")
        if nr_pages > MAX_GET_PAGES:
            raise LocalProtocolError(f"get: {nr_pages} pages, expected at most {MAX_GET_PAGES}")
        data = Frame(Command.GET, nr_pages, address, pid).encode(self._frame_size)
        self._requests.append(Request(pid, address, nr_pages))
        self._advance(Step.GET)
        return data

    def close(self, *, force: bool = False) -> bytes:
        """End the session well; return the bytes to send, the status comes as an event.

        ``force`` is for a socket that someone else holds too, whose end the
        server would never see.
        """
        self._expect("close", Step.CLOSE)
        self._advance(Step.CLOSE)
        return Frame(Command.FORCE_CLOSE if force else Command.CLOSE).encode(self._frame_size)

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take in what was received, by reference; no bytes are the end of the stream."""
        self._incoming.feed(data)

    def next_event(self) -> ClientEvent:
        """Return what happened next, or NEED_DATA; raise RemoteProtocolError for nonsense or a lost peer."""
        if self._state is State.FAILED:
            raise LocalProtocolError("next_event: this connection has failed")
        if self._length:
            return self._next_payload()
        if self._requests:
            return self._next_reply()
        match self._state:
            case State.CLOSING:
                return self._next_status()
            case State.CLOSED:
                if self._incoming.length:
                    raise self._fail("something follows the status")
                if not self._incoming.eof:
                    return NEED_DATA
                self._advance(Step.END)
                return ConnectionClosed()
            case _:
                if self._incoming.length:
                    raise self._fail("received something that was not asked for")
                return self._need_data("while nothing was outstanding, without CLOSE")

    def _next_reply(self) -> ClientEvent:
        data = self._incoming.take(self._frame_size)
        request = self._requests[0]
        if data is None:
            return self._need_data(f"before the answer for {request.address:#x} of pid {request.pid}")
        frame = Frame.decode(data, self._frame_size)
        problem = None
        if frame.command is not Command.ADD_F or frame.flags != PageFlags.PRESENT:
            problem = (
                f"expected ADD_F with PRESENT, received {frame.command.name} with flags {int(frame.flags):#x}"
            )
        elif frame.address != request.address or frame.dst_id != request.pid:
            problem = (
                f"expected the answer for {request.address:#x} of pid {request.pid}, "
                f"received {frame.address:#x} of {frame.dst_id}"
            )
        elif not 1 <= frame.nr_pages <= request.nr_pages:
            problem = f"expected 1 to {request.nr_pages} pages, received {frame.nr_pages}"
        if problem:
            raise self._fail(f"{problem} (is the frame size of {self._frame_size} bytes right?)", data)
        self._length = frame.nr_pages << PAGE_SHIFT
        self._done = 0
        return Reply(request, frame.nr_pages)

    def _next_payload(self) -> ClientEvent:
        request = self._requests[0]
        if not self._incoming.length:
            return self._need_data(f"inside the pages at {request.address:#x} of pid {request.pid}")
        offset = self._done
        data = self._incoming.take_piece(self._length - offset)
        self._done += len(data)
        last = self._done == self._length
        if last:
            self._requests.popleft()
            self._length = 0
            self._advance(Step.ANSWER)
        return Payload(request, offset, data, last)

    def _next_status(self) -> ClientEvent:
        data = self._incoming.take(STATUS.size)
        if data is None:
            return self._need_data("before its status")
        self._advance(Step.STATUS)
        (status,) = STATUS.unpack(data)
        return Status(status)

    def _need_data(self, when: str) -> NeedData:
        if self._incoming.eof:
            raise self._fail(f"the page server closed the connection {when}")
        return NEED_DATA

    def _advance(self, step: Step) -> None:
        self._state = TRANSITIONS[self._state][step]

    def _expect(self, what: str, step: Step) -> None:
        if step not in TRANSITIONS[self._state]:
            raise LocalProtocolError(f"{what}: the connection is {self._state.name.lower()}")

    def _fail(self, message: str, data: bytes = b"") -> RemoteProtocolError:
        self._state = State.FAILED
        offset = self._incoming.offset - len(data)
        return RemoteProtocolError(message, offset=offset, data=data or self._incoming.peek(32))
