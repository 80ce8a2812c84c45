"""The page server's data path, as Python drives it.

Each connection of a :class:`Server` is served on a thread of its own, without
the interpreter. Everything here happens once per task or connection.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from criupy._uffd.image_linux import Image, check, ffi, lib
from criupy._uffd.upstream_linux import Upstream

if TYPE_CHECKING:
    from criupy._uffd._native import Asked, Served

__all__ = ["Account", "Ending", "Question", "Server", "punch_hole"]


class Ending(enum.IntEnum):
    """Why a connection ended; from COMMAND on the client broke the protocol."""

    #: CLOSE was answered, and the peer has closed.
    CLOSED = lib.CRIUPY_SERVED_CLOSED
    #: The peer closed without CLOSE.
    EOF = lib.CRIUPY_SERVED_EOF
    #: By the peer, or the network has lost it.
    RESET = lib.CRIUPY_SERVED_RESET
    #: By the server itself.
    CUT = lib.CRIUPY_SERVED_CUT
    #: Nothing was asked for too long.
    IDLE = lib.CRIUPY_SERVED_IDLE
    #: In the middle of something nothing came or went for ``stall_timeout`` seconds.
    STALLED = lib.CRIUPY_SERVED_STALLED
    #: The images cannot be read; ``errno``.
    DATA = lib.CRIUPY_SERVED_DATA
    #: Something else failed here; ``errno``.
    ERROR = lib.CRIUPY_SERVED_ERROR
    #: What was uploaded, or fetched from an upstream, cannot be written; ``errno``.
    DISK = lib.CRIUPY_SERVED_DISK
    #: What was uploaded makes no images; ``errno``, and the log says why.
    REFUSED = lib.CRIUPY_SERVED_REFUSED
    #: The peer speaks TLS to a server that does not.
    SPEAKS_TLS = lib.CRIUPY_SERVED_SPEAKS_TLS
    #: TLS failed; ``fault``.
    TRANSPORT = lib.CRIUPY_SERVED_TRANSPORT
    #: Somebody has written to the images.
    CHANGED = lib.CRIUPY_SERVED_CHANGED
    #: The source behind this server has ended, and what was asked for was not fetched before.
    GONE = lib.CRIUPY_SERVED_GONE
    #: Nothing that is done here.
    COMMAND = lib.CRIUPY_SERVED_COMMAND
    #: No pages, or more than there can be.
    COUNT = lib.CRIUPY_SERVED_COUNT
    #: Not the address of a page.
    ADDRESS = lib.CRIUPY_SERVED_ADDRESS
    #: No such process in the images; of an upload: not the type of a pagemap.
    ID = lib.CRIUPY_SERVED_ID
    #: Not a lazy page of that process.
    PAGE = lib.CRIUPY_SERVED_PAGE
    #: The peer closed inside a frame or its pages.
    TRUNCATED = lib.CRIUPY_SERVED_TRUNCATED
    #: Something came after CLOSE.
    TRAILING = lib.CRIUPY_SERVED_TRAILING
    #: Flags of an entry that mean nothing.
    FLAGS = lib.CRIUPY_SERVED_FLAGS
    #: An entry that begins before the end of the one before.
    ORDER = lib.CRIUPY_SERVED_ORDER
    #: An entry of another image than was opened.
    UNOPENED = lib.CRIUPY_SERVED_UNOPENED


@dataclass(frozen=True, slots=True)
class Account:
    """What a connection did so far, or in all.

    ``ending`` is None while it goes on; ``errno`` belongs to DATA, ERROR, DISK
    and REFUSED. ``command`` (without flags), ``nr_pages``, ``address`` and ``id`` are of the
    last frame, which began ``offset`` bytes into the stream. ``frame_size`` is 0
    until the first frame showed it. ``fault`` is what TLS says of the end, as the
    rest of a sentence about the peer, or nothing. Times are seconds of CLOCK_MONOTONIC;
    ``first_page`` is when the first page had gone, ``ended`` when all was over.
    """

    serial: int
    ending: Ending | None
    errno: int
    command: int
    nr_pages: int
    address: int
    id: int
    offset: int
    frame_size: int
    started: float
    first_page: float | None
    ended: float | None
    requests: int
    pages: int
    bytes_received: int
    fault: str = ""


def _account(served: Served) -> Account:
    return Account(
        serial=served.serial,
        ending=Ending(served.reason) if served.ended else None,
        errno=served.error,
        command=served.frame.cmd & lib.CRIUPY_CMD_MASK,
        nr_pages=served.frame.nr_pages,
        address=served.frame.vaddr,
        id=served.frame.dst_id,
        offset=served.offset,
        frame_size=served.frame_size,
        started=served.started_ns / 1e9,
        first_page=served.first_ns / 1e9 if served.first_ns else None,
        ended=served.ended_ns / 1e9 if served.ended else None,
        requests=served.nr_requests,
        pages=served.nr_pages,
        bytes_received=served.bytes_received,
        fault=ffi.string(served.fault).decode(errors="replace"),
    )


@dataclass(frozen=True, slots=True)
class Question:
    """What the thread of a connection waits to be told.

    ``command`` and ``id`` are of the frame. Of an upload it is OPEN, OPEN2,
    PARENT, CLOSE or FORCE_CLOSE, and ``starts`` and ``nr_pages`` (array 'Q') and
    ``flags`` (array 'B') are the entries of the image that an OPEN or CLOSE ends,
    if one is open. Of a server that ``asks`` it is HELLO with its body and the first
    GET or GETV, or what a stock client begins with, FINISHED, ABORT, CLOSE or
    FORCE_CLOSE.
    """

    serial: int
    command: int
    id: int
    frame_size: int
    starts: array[int]
    nr_pages: array[int]
    flags: array[int]
    hello: bytes


def _copy(typecode: str, items: Any, nr: int) -> array[int]:
    copy = array(typecode)
    if nr:
        copy.frombytes(memoryview(ffi.buffer(items, nr * copy.itemsize)))
    return copy


def _question(asked: Asked) -> Question:
    return Question(
        serial=asked.serial,
        command=asked.frame.cmd & lib.CRIUPY_CMD_MASK,
        id=asked.frame.dst_id,
        frame_size=asked.frame_size,
        starts=_copy("Q", asked.starts, asked.nr_entries),
        nr_pages=_copy("Q", asked.nr_pages, asked.nr_entries),
        flags=_copy("B", asked.flags, asked.nr_entries),
        hello=bytes(memoryview(ffi.buffer(asked.hello, lib.CRIUPY_HELLO_LENGTH))),
    )


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the blocks of this range of a file back to the file system; it reads as zeros then."""
    result = lib.criupy_punch_hole(fd, offset, length)
    if result < 0:
        raise OSError(-result, os.strerror(-result))


class Server:
    """Gives out the lazy pages of dumped tasks from their images, or ``receives`` uploads.

    One that ``asks`` is to be told whose a connection is before it is served.

    A peer has ``stall_timeout`` seconds for the rest of a frame that it began,
    and to take something of what it asked for; ``idle_timeout`` is how long it
    may ask for nothing (None: for ever), ``first_timeout`` the same before its
    first frame.
    """

    def __init__(
        self,
        *,
        stall_timeout: float,
        idle_timeout: float | None,
        first_timeout: float | None = None,
        receives: bool = False,
        asks: bool = False,
    ) -> None:
        config = ffi.new(
            "struct criupy_server_config *",
            {
                "receives": receives,
                "asks": asks,
                "stall_timeout_ns": int(stall_timeout * 1e9),
                "first_timeout_ns": 0 if first_timeout is None else int(first_timeout * 1e9),
                "idle_timeout_ns": 0 if idle_timeout is None else int(idle_timeout * 1e9),
            },
        )
        out = ffi.new("struct criupy_server **")
        check("make a page server", lib.criupy_server_create(out, config))
        self._server: Any = out[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cut what is connected, and release everything."""
        server, self._server = self._server, None
        if server is not None:
            lib.criupy_server_destroy(server)

    def add_image(self, image: Image, fd: int) -> None:
        """Give out an image's extents, from the pages file ``fd``; both are the server's now.

        Only before the first connection.
        """
        check("serve an image", lib.criupy_server_add_image(self._server, image._to_give(), fd))
        image._given()

    def add_upstream(self, upstream: Upstream) -> None:
        """Give out the images of an upstream: what it has fetched, and what it fetches for who asks.

        Only one, after its images were added and before the first connection.
        """
        check("serve an upstream", lib.criupy_server_add_upstream(self._server, upstream._to_share()))

    def serve(self, fd: int, *, transport: int = 0) -> int:
        """Serve a connected socket, which is the server's now; return the connection's number.

        ``transport`` is the address of what carries its bytes, and the
        server's, too; 0 is the socket itself.
        """
        serial = ffi.new("uint64_t *")
        under = ffi.cast("struct criupy_transport *", transport)
        check("serve a connection", lib.criupy_server_serve(self._server, fd, under, serial))
        return int(serial[0])

    def cut(self, serial: int) -> None:
        """End a connection, unless it has ended."""
        if self._server is not None:
            check("cut a connection", lib.criupy_server_cut(self._server, serial))

    @property
    def event_fd(self) -> int:
        """Readable when a connection has ended, asks something or was given its first page.

        ``ended`` resets it.
        """
        return int(lib.criupy_server_event_fd(self._server))

    def ended(self) -> Iterator[Account]:
        """Take the accounts of connections that have ended, each once."""
        with contextlib.suppress(BlockingIOError):  # nothing new since the last call
            os.eventfd_read(self.event_fd)
        served = ffi.new("struct criupy_served *")
        while lib.criupy_server_next_ended(self._server, served):
            yield _account(served)

    def questions(self) -> Iterator[Question]:
        """Take what connections ask, each once. Call ``ended`` before."""
        asked = ffi.new("struct criupy_question *")
        while lib.criupy_server_next_question(self._server, asked):
            yield _question(asked)

    def answer(self, serial: int, answer: int, fd: int = -1) -> None:
        """Answer what a connection asked, unless it waits no more.

        An OPEN or PARENT is told 0 or 1 (there is a parent) or -errno, which
        ends the connection, a CLOSE or ABORT its status, 0 or -errno; HELLO and
        a first frame 0, or the negative reason why not. ``fd`` is where
        to write the pages of what was opened; it is the server's now.
        """
        result = lib.criupy_server_answer(self._server, serial, answer, fd)
        if result < 0 and fd >= 0:
            os.close(fd)
        if result != -errno.ESRCH:
            check("answer an upload", result)

    def connections(self, room: int) -> list[Account]:
        """Return the accounts of at most ``room`` connections that go on: none when it is closed."""
        if self._server is None:
            return []
        served = ffi.new("struct criupy_served[]", room)
        return [_account(served[i]) for i in range(lib.criupy_server_connections(self._server, served, room))]
