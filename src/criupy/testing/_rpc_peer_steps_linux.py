"""The steps of which the scripts of a scripted peer are made; rpc_peer_linux.py says how to use them."""

from __future__ import annotations

import abc
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from criupy.rpc import _schema_pb2 as schema
from criupy.testing import _rpc_peer_program_linux as program

__all__ = [
    "Close",
    "DoNotRead",
    "Exit",
    "Expect",
    "Hang",
    "Ignore",
    "Kill",
    "Notify",
    "Packet",
    "Print",
    "Repeat",
    "Reply",
    "Script",
    "Sleep",
    "SpawnChild",
    "Step",
    "encoded_packet",
    "encoded_script",
    "version_answer",
]


class _Message(Protocol):
    """A protobuf message, of any schema."""

    def SerializeToString(self) -> bytes: ...  # noqa: N802


Packet: TypeAlias = bytes | _Message


def encoded_packet(packet: Packet) -> bytes:
    return packet if isinstance(packet, bytes) else packet.SerializeToString()


def _paths(descriptors: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    return tuple(os.fspath(path) for path in descriptors)


class Step(abc.ABC):
    """One thing that a peer does."""

    __slots__ = ()

    @abc.abstractmethod
    def encoded(self) -> program.Step:
        """Return it as the program reads it."""


Script: TypeAlias = Sequence[Step]


@dataclass(frozen=True, slots=True)
class Expect(Step):
    """Read one request; of any type when `type` is None.

    One with keep_open where CRIU gives no answer to that departs from the script.
    """

    type: schema.RequestType.ValueType | None = None

    def encoded(self) -> program.Step:
        return ("expect", self.type)


@dataclass(frozen=True, slots=True, eq=False)
class Reply(Step):
    """Send one packet: a message, or bytes that are none.

    It may have twice the size that CRIU can send, about 400 kB. Of each path in `descriptors`, opened for
    reading and writing, a descriptor goes with it.
    """

    packet: Packet
    descriptors: Sequence[str | os.PathLike[str]] = ()

    def encoded(self) -> program.Step:
        return ("send", encoded_packet(self.packet), _paths(self.descriptors))


@dataclass(frozen=True, slots=True)
class Notify(Step):
    """Send a notification and read the answer to it.

    A client that answers with notify_success false goes on with the script `refused` in place of all that
    follows, and with the script as it is when that is None. `descriptors` are as in Reply; CRIU sends one
    with orphan-pts-master, and /dev/ptmx makes such a one.
    """

    script: str
    pid: int | None = None
    descriptors: Sequence[str | os.PathLike[str]] = ()
    refused: Script | None = None

    def encoded(self) -> program.Step:
        notify = schema.Notify(script=self.script, pid=self.pid)
        packet = schema.Response(type=schema.NOTIFY, success=True, notify=notify).SerializeToString()
        refused = None if self.refused is None else encoded_script(self.refused)
        return ("notify", packet, _paths(self.descriptors), refused)


@dataclass(frozen=True, slots=True)
class Print(Step):
    """Write text to standard output or error, which are what the client gave."""

    text: str
    to: Literal["stdout", "stderr"] = "stdout"

    def encoded(self) -> program.Step:
        return ("print", 1 if self.to == "stdout" else 2, self.text.encode())


@dataclass(frozen=True, slots=True)
class Sleep(Step):
    """Do nothing for some seconds."""

    seconds: float

    def encoded(self) -> program.Step:
        return ("wait", self.seconds * 1000.0)


@dataclass(frozen=True, slots=True)
class Hang(Step):
    """Do nothing for ever, even when the client is gone."""

    def encoded(self) -> program.Step:
        return ("wait", None)


@dataclass(frozen=True, slots=True)
class DoNotRead(Step):
    """Leave unread what the client sends, until it hangs up; that ends the script."""

    def encoded(self) -> program.Step:
        return ("unread",)


@dataclass(frozen=True, slots=True)
class Close(Step):
    """Close the socket and live on."""

    def encoded(self) -> program.Step:
        return ("close",)


@dataclass(frozen=True, slots=True)
class Exit(Step):
    """End with an exit status."""

    status: int = 0

    def encoded(self) -> program.Step:
        return ("exit", self.status)


@dataclass(frozen=True, slots=True)
class Kill(Step):
    """Send a signal to itself; after SIGSTOP, SIGCONT brings it to the next step."""

    number: int = signal.SIGKILL

    def encoded(self) -> program.Step:
        return ("kill", int(self.number))


@dataclass(frozen=True, slots=True)
class Ignore(Step):
    """From here on live through a signal; Connection.signals counts how often it came."""

    number: int = signal.SIGTERM

    def encoded(self) -> program.Step:
        return ("ignore", int(self.number))


@dataclass(frozen=True, slots=True)
class SpawnChild(Step):
    """Leave a child process behind, which stays whatever becomes of its parent.

    With the socket in its hands a client sees no end of the connection, with the output none of the output.
    """

    keep_socket: bool = False
    keep_output: bool = False

    def encoded(self) -> program.Step:
        return ("spawn", self.keep_socket, self.keep_output)


@dataclass(frozen=True, slots=True)
class Repeat(Step):
    """Perform steps several times, or for ever."""

    script: Script
    times: int | None = None

    def encoded(self) -> program.Step:
        return ("repeat", encoded_script(self.script), self.times)


def encoded_script(script: Script) -> program.Script:
    return tuple(step.encoded() for step in script)


def version_answer(version: Sequence[int]) -> Reply:
    """Return the answer to VERSION of a CRIU with this (major, minor[, sublevel])."""
    major, minor, *sublevel = version
    answer = schema.VersionAnswer(major_number=major, minor_number=minor)
    if sublevel:
        answer.sublevel = sublevel[0]
    return Reply(schema.Response(type=schema.VERSION, success=True, version=answer))
