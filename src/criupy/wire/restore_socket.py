"""The protocol between criu restore and the lazy-pages daemon, sans IO.

criu connects to ``lazy-pages.socket`` (AF_UNIX, SOCK_STREAM) and sends, for
every process of the tree in any order:

* an int32 pid in native byte order. A negative one is a zombie; nothing follows.
* else one byte, whose value means nothing, with the process's userfaultfd as
  SCM_RIGHTS.

When all tasks are restored it sends the u32 0x52535446, and some time later
it closes. (CRIU: criu/uffd.c, send_uffd and lazy_pages_finish_restore.)

``TRANSITIONS`` is the table of states, which both ends here follow; what is not
in it breaks the protocol.

Rules of this file: ``receive`` only takes in, ``next_event`` decides. A
descriptor travels with one particular byte, so nothing may be read beyond the
message at hand: ``bytes_wanted`` is the size of the next recvmsg, and feeding
more is the caller's error. Descriptors are whatever object the caller owns
them by; what was not returned in an event is still the caller's to close.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from criupy.errors import LocalProtocolError, RemoteProtocolError

D = TypeVar("D")

_PID: Final = struct.Struct("=i")

#: What ends the announcements; larger than any pid (LAZY_PAGES_RESTORE_FINISHED in criu/uffd.c).
RESTORE_FINISHED_WORD: Final = 0x52535446

#: The kernel's PID_MAX_LIMIT on 64-bit machines (include/linux/threads.h).
PID_MAX: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class Task(Generic[D]):
    """A process that now waits for its memory; the uffd passes to the caller."""

    pid: int
    uffd: D


@dataclass(frozen=True, slots=True)
class Zombie:
    """A process that was dead when it was dumped."""

    pid: int


@dataclass(frozen=True, slots=True)
class RestoreFinished:
    """Every task has been restored and runs, or is about to."""


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """criu closed the connection, after restore-finished."""


class NeedData(enum.Enum):
    """No event yet: receive ``bytes_wanted`` bytes."""

    NEED_DATA = enum.auto()


NEED_DATA: Final = NeedData.NEED_DATA

Event: TypeAlias = Task[D] | Zombie | RestoreFinished | ConnectionClosed | NeedData


class State(enum.Enum):
    """Where a connection is: what comes next, or FAILED when the peer broke the protocol."""

    PID = enum.auto()
    UFFD = enum.auto()
    FINISHED = enum.auto()
    CLOSED = enum.auto()
    FAILED = enum.auto()


class Step(enum.Enum):
    """What criu restore sends."""

    PID = "the pid of a process"
    ZOMBIE = "the pid of a zombie, negated"
    UFFD = "a byte with the userfaultfd"
    FINISHED = "restore-finished"
    END = "end of stream"


TRANSITIONS: Final[Mapping[State, Mapping[Step, State]]] = {
    State.PID: {Step.PID: State.UFFD, Step.ZOMBIE: State.PID, Step.FINISHED: State.FINISHED},
    State.UFFD: {Step.UFFD: State.PID},
    State.FINISHED: {Step.END: State.CLOSED},
    State.CLOSED: {},
    State.FAILED: {},
}


# One byte is wanted in FINISHED to notice the end, or what should not be there.
_BYTES: Final = {State.PID: 4, State.UFFD: 1, State.FINISHED: 1, State.CLOSED: 0}


class RestoreSocketDecoder(Generic[D]):
    """Decode the daemon's side of one connection."""

    def __init__(self) -> None:
        self._state = State.PID
        self._offset = 0  # of the message at hand
        self._buffer = b""
        self._descriptors: list[D] = []
        self._eof = False
        self._pid = 0
        self._seen: set[int] = set()

    @property
    def state(self) -> State:
        """Where the connection is."""
        return self._state

    @property
    def bytes_wanted(self) -> int:
        """Size in bytes of the next recvmsg; 0 when next_event is to be called first, or never again."""
        if self._eof or self._state is State.FAILED:
            return 0
        return _BYTES[self._state] - len(self._buffer)

    @property
    def descriptor_wanted(self) -> bool:
        """Whether the next byte should bring a descriptor."""
        return self._state is State.UFFD

    def receive(self, data: bytes, descriptors: Sequence[D] = ()) -> None:
        """Take in what one recvmsg returned; ``b""`` is the end of the stream."""
        if self._eof:
            raise LocalProtocolError("receive: the stream has already ended")
        if len(data) > self.bytes_wanted:
            raise LocalProtocolError(
                f"receive: {len(data)} bytes where {self.bytes_wanted} were wanted; "
                "call next_event, and never read ahead"
            )
        if not data:
            self._eof = True
        self._buffer += data
        self._descriptors.extend(descriptors)

    def next_event(self) -> Event[D]:
        """Return what happened next, or NEED_DATA.

        Raise RemoteProtocolError when the peer broke the protocol or left
        before restore-finished, which means that the restore failed.
        """
        match self._state:
            case State.PID:
                return self._next_pid()
            case State.UFFD:
                return self._next_uffd()
            case State.FINISHED:
                return self._next_end()
            case State.CLOSED:
                return ConnectionClosed()
            case State.FAILED:
                raise LocalProtocolError("next_event: this connection has failed")

    def _next_pid(self) -> Event[D]:
        if self._descriptors:
            raise self._fail("a descriptor came with a pid")
        if len(self._buffer) < _PID.size:
            if self._eof:
                raise self._fail(
                    "the stream ended inside a pid"
                    if self._buffer
                    else "criu closed the connection before restore-finished: the restore failed, see its log"
                )
            return NEED_DATA
        (value,) = _PID.unpack(self._buffer)
        if value == RESTORE_FINISHED_WORD:
            self._advance(Step.FINISHED)
            return RestoreFinished()
        pid = abs(value)
        if not 0 < pid <= PID_MAX:
            raise self._fail(f"expected a pid or restore-finished, received {value}")
        if pid in self._seen:
            raise self._fail(f"pid {pid} was announced twice")
        self._seen.add(pid)
        if value < 0:
            self._advance(Step.ZOMBIE)
            return Zombie(pid)
        self._pid = pid
        self._advance(Step.PID)
        return NEED_DATA

    def _next_uffd(self) -> Event[D]:
        if not self._buffer:
            if self._descriptors:
                raise self._fail("a descriptor came without its byte")
            if self._eof:
                raise self._fail(f"the stream ended where the userfaultfd of pid {self._pid} should be")
            return NEED_DATA
        if len(self._descriptors) != 1:
            raise self._fail(
                f"expected one userfaultfd for pid {self._pid}, received {len(self._descriptors)} descriptors"
            )
        uffd = self._descriptors.pop()
        self._advance(Step.UFFD)
        return Task(self._pid, uffd)

    def _next_end(self) -> Event[D]:
        if self._buffer or self._descriptors:
            raise self._fail("something follows restore-finished")
        if not self._eof:
            return NEED_DATA
        self._advance(Step.END)
        return ConnectionClosed()

    def _advance(self, step: Step) -> None:
        self._offset += len(self._buffer)
        self._buffer = b""
        self._state = TRANSITIONS[self._state][step]

    def _fail(self, message: str) -> RemoteProtocolError:
        self._state = State.FAILED
        return RemoteProtocolError(message, offset=self._offset, data=self._buffer)


class RestoreSocketEncoder:
    """Encode what a restorer sends, in its only order; for stand-ins of criu restore."""

    def __init__(self) -> None:
        self._state = State.PID

    def task(self, pid: int) -> bytes:
        """Announce a process; send ``descriptor_byte()`` with its uffd next."""
        return self._pid(pid, pid, Step.PID)

    def descriptor_byte(self) -> bytes:
        """Return the byte that carries the uffd as SCM_RIGHTS."""
        if Step.UFFD not in TRANSITIONS[self._state]:
            raise LocalProtocolError("descriptor_byte: announce a task first")
        self._advance("descriptor_byte", Step.UFFD)
        return b"\0"

    def zombie(self, pid: int) -> bytes:
        """Announce a dead process."""
        return self._pid(pid, -pid, Step.ZOMBIE)

    def finished(self) -> bytes:
        """Say that every task has been restored."""
        self._advance("finished", Step.FINISHED)
        return _PID.pack(RESTORE_FINISHED_WORD)

    def _pid(self, pid: int, value: int, step: Step) -> bytes:
        if self._state is State.PID and not 0 < pid <= PID_MAX:
            raise LocalProtocolError(f"pid {pid}: expected 1 to {PID_MAX}")
        self._advance(f"pid {pid}", step)
        return _PID.pack(value)

    def _advance(self, what: str, step: Step) -> None:
        if step not in TRANSITIONS[self._state]:
            why = "a userfaultfd is to be sent" if self._state is State.UFFD else "the restore has finished"
            raise LocalProtocolError(f"{what}: out of order, {why}")
        self._state = TRANSITIONS[self._state][step]
