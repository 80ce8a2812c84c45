"""What criupy's daemon and criupy's page server say to each other beyond CRIU's protocol.

A connection is extended when its first frame is HELLO, and only a client that was
told so (by an option, or by a marker beside the images) begins like that: a stock
source dies of a command that it does not know. All frames of an extended connection
have 32 bytes; GET and its answer are CRIU's::

    HELLO     nr_pages = 64       then a body: which session, and proof of it; not answered
    GETV      nr_pages in all, address = number of runs, dst_id = pid
                                  then the runs (address, nr_pages), 16 bytes each; answered
                                  by one such frame with PRESENT, then by all their pages
    FINISHED                      restore-finished was read: tasks may run; not answered
    ABORT                         no task runs here and none will: let the source go on;
                                  answered by int32 status, like CLOSE
    REFUSED   nr_pages = reason   from the server, where an answer could begin; it closes then

Several connections make a session: lane 0 carries what can wait, CLOSE, FINISHED and
ABORT, lane 1 what a thread waits for. A lane that was lost is opened again with a higher
counter, so what was overheard is of no use a second time.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from criupy.errors import LocalProtocolError, RemoteProtocolError
from criupy.wire.page_server import Command, Frame, check_run

__all__ = [
    "HELLO_LENGTH",
    "KEY_LENGTH",
    "MAX_RUNS",
    "MAX_RUN_PAGES",
    "SESSION_LENGTH",
    "Hello",
    "Lane",
    "Refusal",
    "decode_runs",
    "encode_getv",
    "encode_plain",
    "encode_refused",
]

VERSION: Final = 1
KEY_LENGTH: Final = 32
SESSION_LENGTH: Final = 16
#: The most runs of a GETV, and the most pages of all of them.
MAX_RUNS: Final = 256
MAX_RUN_PAGES: Final = 1024

_PROVEN: Final = struct.Struct("<IIQ16s")
_PROOF_LENGTH: Final = 32
HELLO_LENGTH: Final = _PROVEN.size + _PROOF_LENGTH
_RUN: Final = struct.Struct("<QQ")


class Lane(enum.IntEnum):
    """Which of a session's connections."""

    BULK = 0
    URGENT = 1


class Refusal(enum.IntEnum):
    """Why a session was not let in, or cannot go on."""

    KEY = 1
    TAKEN = 2
    REPLAYED = 3
    GONE = 4
    VERSION = 5
    ENDED = 6


@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame of an extended connection.

    ``session`` are 16 random bytes that a daemon keeps for its life, ``counter``
    grows with every connection of a lane.
    """

    session: bytes
    lane: Lane
    counter: int

    def encode(self, key: bytes) -> bytes:
        """Encode frame and body; ``key`` are the 32 bytes of the marker."""
        proven = _PROVEN.pack(VERSION, self.lane, self.counter, self.session)
        return Frame(Command.HELLO, HELLO_LENGTH).encode(32) + proven + _prove(key, proven)

    @classmethod
    def decode(cls, body: bytes, key: bytes | None) -> Self | Refusal:
        """Decode what follows the frame; without a key whatever proof is there will do."""
        version, lane, counter, session = _PROVEN.unpack_from(body)
        proven, proof = body[: _PROVEN.size], body[_PROVEN.size :]
        if version != VERSION or lane not in tuple(Lane):
            return Refusal.VERSION
        import hmac  # see _prove

        if key is not None and not hmac.compare_digest(proof, _prove(key, proven)):
            return Refusal.KEY
        return cls(session, Lane(lane), counter)


def _prove(key: bytes, proven: bytes) -> bytes:
    import hmac  # with OpenSSL, which is loaded only when there is somebody to prove it to

    return hmac.digest(key, proven, "sha256")


def encode_getv(pid: int, runs: Sequence[tuple[int, int]]) -> bytes:
    """Ask for all pages of these runs (address, nr_pages) of one process at once."""
    total = sum(nr_pages for _, nr_pages in runs)
    if not 1 <= len(runs) <= MAX_RUNS or total > MAX_RUN_PAGES:
        raise LocalProtocolError(
            f"encode_getv: {len(runs)} runs of {total} pages, "
            f"expected 1 to {MAX_RUNS} of at most {MAX_RUN_PAGES}"
        )
    for address, nr_pages in runs:
        if problem := check_run(address, nr_pages):
            raise LocalProtocolError(f"encode_getv: {problem}")
    return Frame(Command.GETV, total, len(runs), pid).encode(32) + b"".join(_RUN.pack(*run) for run in runs)


def decode_runs(frame: Frame, body: bytes) -> list[tuple[int, int]]:
    """Decode what follows a GETV; raise RemoteProtocolError where it is not as the frame says."""
    runs = list(_RUN.iter_unpack(body))
    if len(runs) != frame.address or sum(nr_pages for _, nr_pages in runs) != frame.nr_pages:
        raise RemoteProtocolError("the runs of a GETV are not what its frame says", offset=0, data=body[:32])
    return runs


def encode_plain(command: Command) -> bytes:
    """Encode FINISHED, ABORT or CLOSE."""
    return Frame(command).encode(32)


def encode_refused(reason: Refusal) -> bytes:
    """Tell a client why there will be no more answers."""
    return Frame(Command.REFUSED, reason).encode(32)
