"""The server's side of the page-server protocol, sans IO.

    receives                        answers
    GET                             frame and pages
    OPEN2                           one byte, whether there is a parent image
    PARENT                          int32, the same
    OPEN, HOLE                      -
    ADD, ADD_F (PRESENT: pages)     -
    CLOSE, FORCE_CLOSE              int32 status

``TRANSITIONS`` is the table of states; what is not in it breaks the protocol. After
a CLOSE as the first frame, up to 8 bytes may follow that a long one has more.

Answers go out in the order of the requests; the codec holds the caller to
that. How large the client's frames are shows in the first one.

Rules of this file: ``receive`` only keeps what it is given, ``next_event``
decides, pages are handed on as views of what was received, and ``answer_*``
return what to send, before the pages themselves where there are any.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from criupy.errors import LocalProtocolError, RemoteProtocolError
from criupy.wire.page_server import (
    PAGE_SHIFT,
    STATUS,
    Command,
    Frame,
    FrameSize,
    ImageType,
    Incoming,
    PageFlags,
    check_run,
    decode_image_id,
    detect_frame_size,
)

_DETECTION_SIZE: Final = 24
_LONG_CLOSE_REST: Final = 8


@dataclass(frozen=True, slots=True)
class Get:
    """Pages are asked for, at a dump-time address of the process with this pid at dump time."""

    pid: int
    address: int
    nr_pages: int


@dataclass(frozen=True, slots=True)
class Open:
    """An upload of one pagemap begins; with ``wants_answer`` the client asks for a parent."""

    image_type: ImageType
    image_id: int
    wants_answer: bool


@dataclass(frozen=True, slots=True)
class Parent:
    """The client asks whether the parent images have this pagemap."""

    image_type: ImageType
    image_id: int


@dataclass(frozen=True, slots=True)
class Add:
    """A pagemap entry is uploaded; its pages follow where ``flags`` has PRESENT."""

    image_type: ImageType
    image_id: int
    address: int
    nr_pages: int
    flags: PageFlags


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes of the current upload, ``offset`` bytes after its start; ``last`` ends it."""

    offset: int
    data: memoryview
    last: bool


@dataclass(frozen=True, slots=True)
class Close:
    """The client ends the session and waits for the status."""

    force: bool


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The client closed the connection; a stock source takes it for success even without a Close before."""

    after_close: bool


class NeedData(enum.Enum):
    """No event yet: receive more."""

    NEED_DATA = enum.auto()


NEED_DATA: Final = NeedData.NEED_DATA

ServerEvent: TypeAlias = Get | Open | Parent | Add | Payload | Close | ConnectionClosed | NeedData


class State(enum.Enum):
    """Where a connection is; FAILED when the client broke the protocol."""

    OPEN = enum.auto()
    CLOSED = enum.auto()
    FAILED = enum.auto()


class Step(enum.Enum):
    """What a client sends."""

    ASK = "GET, OPEN2 or PARENT, which are answered"
    UPLOAD = "OPEN, HOLE, ADD or ADD_F, which are not"
    CLOSE = "CLOSE or FORCE_CLOSE, which are answered"
    END = "end of stream"


_STEPS: Final = {
    Command.GET: Step.ASK,
    Command.OPEN2: Step.ASK,
    Command.PARENT: Step.ASK,
    Command.OPEN: Step.UPLOAD,
    Command.HOLE: Step.UPLOAD,
    Command.ADD: Step.UPLOAD,
    Command.ADD_F: Step.UPLOAD,
    Command.CLOSE: Step.CLOSE,
    Command.FORCE_CLOSE: Step.CLOSE,
}

TRANSITIONS: Final[Mapping[State, Mapping[Step, State]]] = {
    State.OPEN: {
        Step.ASK: State.OPEN,
        Step.UPLOAD: State.OPEN,
        Step.CLOSE: State.CLOSED,
        Step.END: State.CLOSED,
    },
    State.CLOSED: {Step.END: State.CLOSED},
    State.FAILED: {},
}


class PageService:
    """One connection from a client; ``frame_size`` None means to find it out."""

    def __init__(self, frame_size: FrameSize | None = None) -> None:
        self._frame_size = frame_size
        self._state = State.OPEN
        self._incoming = Incoming()
        self._pending: deque[Get | Open | Parent | Close] = deque()
        self._done = 0  # bytes of the current upload's pages handed on
        self._length = 0  # bytes of the current upload's pages, 0 between uploads
        self._ignored = 0  # bytes that may still belong to a CLOSE of unknown size

    @property
    def state(self) -> State:
        """Where the connection is."""
        return self._state

    @property
    def frame_size(self) -> FrameSize | None:
        """The client's frame size in bytes, None until its first frame showed it."""
        return self._frame_size

    @property
    def unanswered(self) -> int:
        """Number of requests that wait for an answer."""
        return len(self._pending)

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take in what was received, by reference; no bytes are the end of the stream."""
        self._incoming.feed(data)

    def next_event(self) -> ServerEvent:
        """Return what happened next, or NEED_DATA; raise RemoteProtocolError for nonsense."""
        match self._state:
            case State.FAILED:
                raise LocalProtocolError("next_event: this connection has failed")
            case State.CLOSED:
                return self._next_end()
            case State.OPEN:
                return self._next_payload() if self._length else self._next_request()

    def answer_get(self, nr_pages: int) -> bytes:
        """Answer the oldest request, a Get, with 1 to as many pages as it asked for; they go out next."""
        size = self._frame_size
        request = self._pending[0] if self._pending else None
        if not isinstance(request, Get) or size is None:
            raise self._out_of_order("answer_get")
        if not 1 <= nr_pages <= request.nr_pages:
            raise LocalProtocolError(f"answer_get: expected 1 to {request.nr_pages} pages, got {nr_pages}")
        self._pending.popleft()
        return Frame(Command.ADD_F, nr_pages, request.address, request.pid, PageFlags.PRESENT).encode(size)

    def answer_open(self, *, has_parent: bool) -> bytes:
        """Answer the oldest request, an Open that wants one."""
        if not self._pending or not isinstance(self._pending[0], Open):
            raise self._out_of_order("answer_open")
        self._pending.popleft()
        return bytes((has_parent,))

    def answer_parent(self, *, has_parent: bool) -> bytes:
        """Answer the oldest request, a Parent."""
        if not self._pending or not isinstance(self._pending[0], Parent):
            raise self._out_of_order("answer_parent")
        self._pending.popleft()
        return STATUS.pack(has_parent)

    def answer_close(self, status: int = 0) -> bytes:
        """Answer the last request, a Close; the server then waits for the end of the stream."""
        if not self._pending or not isinstance(self._pending[0], Close):
            raise self._out_of_order("answer_close")
        self._pending.popleft()
        return STATUS.pack(status)

    def _out_of_order(self, what: str) -> LocalProtocolError:
        oldest = type(self._pending[0]).__name__ if self._pending else "nothing"
        return LocalProtocolError(f"{what}: out of order, {oldest} is to be answered")

    def _next_request(self) -> ServerEvent:
        size = self._frame_size
        if size is None:
            if self._incoming.length < _DETECTION_SIZE:
                return self._need_frame()
            head = self._incoming.peek(_DETECTION_SIZE)
            try:
                size = detect_frame_size(head)
            except RemoteProtocolError:
                self._state = State.FAILED
                raise
            if size is None:
                # The first 24 bytes of a CLOSE read the same in both sizes.
                size = 24
                self._ignored = _LONG_CLOSE_REST
            else:
                self._frame_size = size
        data = self._incoming.take(size)
        if data is None:
            return self._need_frame()
        frame = Frame.decode(data, size)
        step = _STEPS.get(frame.command)
        if step is None:
            raise self._fail(f"unknown command {frame.command.value}", data)
        event = self._dispatch(frame, data)
        self._advance(step)
        return event

    def _need_frame(self) -> ServerEvent:
        if not self._incoming.eof:
            return NEED_DATA
        if self._incoming.length:
            raise self._fail("the connection ended inside a frame")
        self._advance(Step.END)
        return ConnectionClosed(after_close=False)

    def _dispatch(self, frame: Frame, data: bytes) -> ServerEvent:
        match frame.command:
            case Command.GET:
                if problem := check_run(frame.address, frame.nr_pages):
                    raise self._fail(f"GET: {problem}", data)
                get = Get(frame.dst_id, frame.address, frame.nr_pages)
                self._pending.append(get)
                return get
            case Command.CLOSE | Command.FORCE_CLOSE:
                close = Close(frame.command is Command.FORCE_CLOSE)
                self._pending.append(close)
                return close
            case Command.OPEN | Command.OPEN2:
                opened = Open(*self._image_id(frame, data), frame.command is Command.OPEN2)
                if opened.wants_answer:
                    self._pending.append(opened)
                return opened
            case Command.PARENT:
                parent = Parent(*self._image_id(frame, data))
                self._pending.append(parent)
                return parent
            case _:
                return self._add(frame, data)

    def _add(self, frame: Frame, data: bytes) -> Add:
        flags = frame.flags
        if frame.command is not Command.ADD_F:
            # These two are older than flags.
            flags = PageFlags.PRESENT if frame.command is Command.ADD else PageFlags.PARENT
        image_type, image_id = self._image_id(frame, data)
        if problem := check_run(frame.address, frame.nr_pages):
            raise self._fail(f"{frame.command.name}: {problem}", data)
        if flags & PageFlags.PRESENT:
            self._length = frame.nr_pages << PAGE_SHIFT
            self._done = 0
        return Add(image_type, image_id, frame.address, frame.nr_pages, flags)

    def _image_id(self, frame: Frame, data: bytes) -> tuple[ImageType, int]:
        decoded = decode_image_id(frame.dst_id)
        if decoded is None:
            raise self._fail(f"{frame.command.name}: unknown image type in dst_id {frame.dst_id:#x}", data)
        return decoded

    def _next_payload(self) -> ServerEvent:
        if not self._incoming.length:
            if self._incoming.eof:
                raise self._fail("the connection ended inside the pages of an upload")
            return NEED_DATA
        offset = self._done
        data = self._incoming.take_piece(self._length - offset)
        self._done += len(data)
        last = self._done == self._length
        if last:
            self._length = 0
        return Payload(offset, data, last)

    def _next_end(self) -> ServerEvent:
        while self._incoming.length and self._ignored:
            self._ignored -= len(self._incoming.take_piece(self._ignored))
        if self._incoming.length or (self._incoming.eof and 0 < self._ignored < _LONG_CLOSE_REST):
            raise self._fail("something follows CLOSE")
        if not self._incoming.eof:
            return NEED_DATA
        self._advance(Step.END)
        return ConnectionClosed(after_close=True)

    def _advance(self, step: Step) -> None:
        self._state = TRANSITIONS[self._state][step]

    def _fail(self, message: str, data: bytes = b"") -> RemoteProtocolError:
        self._state = State.FAILED
        offset = self._incoming.offset - len(data)
        return RemoteProtocolError(message, offset=offset, data=data or self._incoming.peek(32))
