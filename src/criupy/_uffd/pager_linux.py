"""The pager, as Python drives it.

The thread behind :class:`Pager` serves page faults without the interpreter.
Everything here happens once per task or per second.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from criupy._uffd.image_linux import Image, check, ffi, lib

if TYPE_CHECKING:
    from criupy._uffd._native import Stats

__all__ = ["BULK", "URGENT", "Link", "Notice", "NoticeKind", "Outcome", "Pager", "Phase", "ReplyFault"]

#: The lanes, as :class:`criupy.wire.extension.Lane` counts them.
BULK: Final = int(lib.CRIUPY_LANE_BULK)
URGENT: Final = int(lib.CRIUPY_LANE_URGENT)


class Phase(enum.IntEnum):
    """The life of a pager; it only moves down this list."""

    RESTORING = lib.CRIUPY_PHASE_RESTORING
    RUNNING = lib.CRIUPY_PHASE_RUNNING
    CLOSING = lib.CRIUPY_PHASE_CLOSING
    ENDED = lib.CRIUPY_PHASE_ENDED


class Outcome(enum.IntEnum):
    """How a pager ended."""

    NONE = lib.CRIUPY_OUTCOME_NONE
    COMPLETE = lib.CRIUPY_OUTCOME_COMPLETE
    VETOED = lib.CRIUPY_OUTCOME_VETOED
    RESTORE_FAILED = lib.CRIUPY_OUTCOME_RESTORE_FAILED
    GIVEN_UP = lib.CRIUPY_OUTCOME_GIVEN_UP


class Link(enum.IntEnum):
    """The state of the connection to the source."""

    NONE = lib.CRIUPY_LINK_NONE
    OPEN = lib.CRIUPY_LINK_OPEN
    CLOSED = lib.CRIUPY_LINK_CLOSED
    RESET = lib.CRIUPY_LINK_RESET
    LOST = lib.CRIUPY_LINK_LOST


class ReplyFault(enum.IntEnum):
    """What a reply of the source violated."""

    NONE = 0
    COMMAND = lib.CRIUPY_REPLY_COMMAND
    ADDRESS = lib.CRIUPY_REPLY_ADDRESS
    ID = lib.CRIUPY_REPLY_ID
    COUNT = lib.CRIUPY_REPLY_COUNT
    UNASKED = lib.CRIUPY_REPLY_UNASKED
    TLS = lib.CRIUPY_REPLY_TLS


class NoticeKind(enum.IntEnum):
    """What the pager has to tell beside its counters."""

    TASK_DONE = lib.CRIUPY_NOTICE_TASK_DONE
    TASK_GONE = lib.CRIUPY_NOTICE_TASK_GONE
    NO_MEMORY = lib.CRIUPY_NOTICE_NO_MEMORY
    NO_DESCRIPTOR = lib.CRIUPY_NOTICE_NO_DESCRIPTOR
    NOT_LOCKED = lib.CRIUPY_NOTICE_NOT_LOCKED
    FEW_COPIERS = lib.CRIUPY_NOTICE_FEW_COPIERS


@dataclass(frozen=True, slots=True)
class Notice:
    """One notice; ``a`` and ``b`` mean what ``criupy.h`` says beside the kind."""

    kind: NoticeKind
    errno: int
    a: int
    b: int


class Pager:
    """The thread that serves every task of one restore.

    ``link_timeout`` (seconds): how long the source may be silent while a request is
    outstanding. ``nr_buffers`` staging buffers of 256 KiB each are kept locked in memory.
    ``request_pages`` is the longest request, ``fault_around_pages`` what a fault asks for at
    most once the tasks run, its own page first. ``window_pages`` fixes the background
    window; 0 lets it follow the link. ``nr_copiers`` threads copy beside the pager's. While
    a thread waits for a page, or has just got one, the pager looks for more for
    ``busy_poll`` seconds before it sleeps.
    """

    def __init__(
        self,
        *,
        link_timeout: float,
        nr_buffers: int = 16,
        request_pages: int = 128,
        fault_around_pages: int = 16,
        window_pages: int = 0,
        nr_copiers: int = 0,
        busy_poll: float = 0.0,
    ) -> None:
        config = ffi.new(
            "struct criupy_pager_config *",
            {
                "link_timeout_ns": int(link_timeout * 1e9),
                "nr_buffers": nr_buffers,
                "request_pages": request_pages,
                "fault_around_pages": fault_around_pages,
                "window_pages": window_pages,
                "nr_copiers": nr_copiers,
                "busy_poll_ns": int(busy_poll * 1e9),
            },
        )
        out = ffi.new("struct criupy_pager **")
        check("start the pager", lib.criupy_pager_create(out, config))
        self._pager: Any = out[0]
        self._told = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and release everything it owns.

        Tasks that run and miss pages have those poisoned first.
        """
        pager, self._pager = self._pager, None
        if pager is not None:
            lib.criupy_pager_destroy(pager)

    @property
    def event_fd(self) -> int:
        """Readable when a notice or a new phase is there; read it to reset it."""
        return int(lib.criupy_pager_event_fd(self._pager))

    def snapshot(self) -> Stats:
        """Return a copy of all counters."""
        stats: Stats = ffi.new("struct criupy_stats *")
        lib.criupy_pager_snapshot(self._pager, stats)
        return stats

    def notices(self) -> Iterator[Notice]:
        """Take the notices that are there."""
        with contextlib.suppress(BlockingIOError):  # nothing new since the last call
            os.eventfd_read(self.event_fd)
        notice = ffi.new("struct criupy_notice *")
        while lib.criupy_pager_next_notice(self._pager, notice):
            yield Notice(NoticeKind(notice.kind), notice.error, notice.a, notice.b)

    def obeyed(self, stats: Stats) -> bool:
        """Tell whether everything said so far had been carried out at a snapshot."""
        return stats.nr_obeyed >= self._told

    def set_link(
        self,
        fd: int,
        *,
        frame_size: int,
        shared: bool = False,
        transport: int = 0,
        extended: bool = False,
        lane: int = BULK,
        preamble: bytes = b"",
    ) -> None:
        """Hand over a connection to the source; the descriptor is the pager's now.

        ``transport`` is the address of what carries its bytes, and the
        pager's, too; 0 is the socket itself. ``extended`` is a source that
        knows :mod:`criupy.wire.extension`, with frames of 32 bytes, and
        ``lane`` one of its lanes: any other source has ``BULK`` alone.
        ``preamble``, at most 128 bytes, is sent before anything else.
        """
        under = ffi.cast("struct criupy_transport *", transport)
        flags = shared * lib.CRIUPY_LINK_SHARED | extended * lib.CRIUPY_LINK_EXTENDED
        told = lib.criupy_pager_set_link(
            self._pager, fd, frame_size, flags, lane, under, preamble, len(preamble)
        )
        self._tell("set_link", told)

    def drop_link(self, lane: int = BULK) -> None:
        """Let go of a lane that is lost, so that another connection can be set."""
        self._tell("drop_link", lib.criupy_pager_drop_link(self._pager, lane))

    def add_task(self, pid: int, uffd: int, image: Image) -> None:
        """Hand over a restored task's userfaultfd and its image; both are the pager's now."""
        self._tell("add_task", lib.criupy_pager_add_task(self._pager, pid, uffd, image._to_give()))
        image._given()

    def watch_restore(self, fd: int) -> None:
        """Hand over the restore socket: all tasks are announced, restore-finished is next."""
        self._tell("watch_restore", lib.criupy_pager_watch_restore(self._pager, fd))

    def abort(self) -> None:
        """Veto the restore and reset the source, unless restore-finished is already there."""
        self._tell("abort", lib.criupy_pager_abort(self._pager))

    def give_up(self) -> None:
        """Fetch nothing more; what touches a missing page waits."""
        self._tell("give_up", lib.criupy_pager_give_up(self._pager))

    def poison(self) -> None:
        """Give up and make every missing page raise SIGBUS; let go of the tasks."""
        self._tell("poison", lib.criupy_pager_poison(self._pager))

    def probe(self) -> None:
        """Let go of address spaces that no longer exist."""
        self._tell("probe", lib.criupy_pager_probe(self._pager))

    def end(self, *, reset: bool) -> None:
        """End the link after giving up: by a reset (the source goes on) or by CLOSE."""
        self._tell("end", lib.criupy_pager_end(self._pager, reset))

    def _tell(self, what: str, result: int) -> None:
        check(f"tell the pager: {what}", result)
        self._told += 1
