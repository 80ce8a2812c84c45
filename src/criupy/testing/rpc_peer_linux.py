"""A stand-in for `criu swrk FD` and `criu service` that follows a script and can misbehave.

For tests of RPC clients, in any language: what a client does when CRIU dies, hangs, lies, floods it, leaves
processes behind or talks out of turn is to be seen without CRIU and without root::

    script = [Expect(schema.DUMP), Notify("pre-dump"), Kill(signal.SIGKILL)]
    with scripted_criu(tmp_path, [script], version=(4, 2, 1)) as peer:
        with criupy.Criu(peer.path) as criu, pytest.raises(criupy.CriuDied):
            criu.dump(1234, images_dir=tmp_path)
        assert [request.opts.pid for request in peer.requests] == [1234]

Each connection of a client is a process that takes the next script. VERSION is asked by many clients before
anything else and on connections of its own: with a `version`, it is answered wherever it comes and takes no
script. On a client that departs from the script a peer hangs up, as CRIU does: its worker exits with status
255, and `Peer.problems` says why. Leaving the context raises ScriptError for that, or adds it to the error
that is on its way out. At the end of its script a worker waits for the client to hang up, and exits with 0;
CRIU's hangs up by itself after most answers: that is `Exit()`.

Nothing that a peer started survives the context, nor the death of the test itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import marshal
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from criupy.errors import CriupyError
from criupy.rpc import _schema_pb2 as schema
from criupy.testing import _rpc_peer_program_linux as program
from criupy.testing._rpc_peer_steps_linux import (
    Close,
    DoNotRead,
    Exit,
    Expect,
    Hang,
    Ignore,
    Kill,
    Notify,
    Print,
    Repeat,
    Reply,
    Script,
    Sleep,
    SpawnChild,
    Step,
    encoded_packet,
    encoded_script,
    version_answer,
)

__all__ = [
    "Close",
    "Connection",
    "DoNotRead",
    "Exit",
    "Expect",
    "Hang",
    "Ignore",
    "Kill",
    "Notify",
    "Peer",
    "Print",
    "Repeat",
    "Reply",
    "Script",
    "ScriptError",
    "Sleep",
    "SpawnChild",
    "Step",
    "scripted_criu",
    "scripted_service",
    "scripted_worker",
    "version_answer",
]

_GRACE = 10.0  # seconds for a process to be gone after SIGKILL


class ScriptError(CriupyError):
    """A client did not keep to the script, or a process of a peer did not end."""


def _type_name(number: object) -> str:
    if number is None:
        return "a packet without a type"
    assert isinstance(number, int)
    known = schema.RequestType.DESCRIPTOR.values_by_number.get(number)
    return known.name if known else f"type {number}"


def _problem(words: tuple[object, ...]) -> str:
    match words:
        case ("expected", expected, found):
            return f"expected {_type_name(expected)}, got {_type_name(found)}"
        case ("after the script", found):
            return f"got {_type_name(found)} after the end of the script"
        case ("keep_open", found):
            return f"got {_type_name(found)} with keep_open, to which CRIU gives no answer"
        case ("no script", number):
            return f"connection {number} has no script"
        case ("too large", size):
            return f"a packet of {size} bytes does not fit into any buffer here"
        case _:
            return ": ".join(map(str, words))


@dataclass(slots=True, kw_only=True)
class Connection:
    """What one process that talks to a client has done so far."""

    pid: int
    arguments: tuple[str, ...]
    """What the client gave behind the program's name."""
    descriptors: dict[int, str]
    """What was open besides standard input, output and error, and where it leads; empty under a service."""
    script: int | None = None
    """Which script it took."""
    packets: list[bytes] = field(default_factory=list)
    """The requests as they came, without VERSION where that is answered by itself."""
    answer_packets: list[bytes] = field(default_factory=list)
    """The answers to notifications as they came."""
    versions: int = 0
    """How many VERSION requests were answered by itself."""
    children: list[int] = field(default_factory=list)
    signals: list[tuple[int, int]] = field(default_factory=list)
    """(pid, signal) of those that were ignored, by the process and its children."""
    finished: bool = False
    """Whether every step was performed."""
    hung_up: bool = False
    """Whether it ended because the client closed the connection."""
    problems: list[str] = field(default_factory=list)

    @property
    def requests(self) -> list[schema.Request]:
        return [schema.Request.FromString(packet) for packet in self.packets]

    @property
    def answers(self) -> list[schema.Request]:
        return [schema.Request.FromString(packet) for packet in self.answer_packets]


@dataclass(slots=True, eq=False)
class Peer:
    """A scripted peer; what it has seen so far is read anew each time.

    `path` is the program to start in the place of `criu`, or the socket of the service.
    """

    path: Path
    _directory: Path
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def connections(self) -> list[Connection]:
        """One for each process that talked to a client, in the order of their start."""
        return [connection for connection, _ in self._read()]

    @property
    def requests(self) -> list[schema.Request]:
        """The requests of all connections, without VERSION where that is answered by itself."""
        return [request for connection in self.connections for request in connection.requests]

    @property
    def answers(self) -> list[schema.Request]:
        """The answers to notifications of all connections."""
        return [answer for connection in self.connections for answer in connection.answers]

    @property
    def children(self) -> list[int]:
        """The pids of all children that were left behind."""
        return [pid for connection in self.connections for pid in connection.children]

    @property
    def problems(self) -> list[str]:
        """Where a client did not keep to the script."""
        return [
            f"connection {number} (pid {connection.pid}): {problem}"
            for number, connection in enumerate(self.connections)
            for problem in connection.problems
        ]

    @property
    def running(self) -> list[int]:
        """The pids of connections and children that have not ended; a zombie has."""
        with self._alive() as alive:
            return list(alive.values())

    def wait_ended(self, timeout: float = _GRACE) -> None:
        """Wait until nothing is `running`; raise ScriptError when that takes over `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._alive() as alive:
            while alive:
                left = deadline - time.monotonic()
                ready, _, _ = select.select(list(alive), [], [], max(0.0, left))
                if left <= 0 and not ready:
                    pids = ", ".join(map(str, alive.values()))
                    raise ScriptError(f"still running after {timeout:g} s: {pids}")
                for descriptor in ready:
                    os.close(descriptor)
                    del alive[descriptor]

    def kill(self) -> None:
        """Kill everything with SIGKILL: the service, the connections, their children."""
        for process in self._processes:
            process.kill()
        with self._alive() as alive:
            for descriptor in alive:
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _read(self) -> Iterator[tuple[Connection, list[tuple[int, int]]]]:
        """Yield every connection with its processes, each as pid and start time."""
        number = 0
        while (path := self._directory / f"connection-{number}").exists():
            number += 1
            connection = None
            with path.open("rb") as file, contextlib.suppress(EOFError):
                _, pid, started, arguments, descriptors = marshal.load(file)  # noqa: S302
                connection = Connection(pid=pid, arguments=arguments, descriptors=dict(descriptors))
                processes = [(pid, started)]
                while True:
                    _add(connection, processes, marshal.load(file))  # noqa: S302
            if connection is not None:
                yield connection, processes

    @contextlib.contextmanager
    def _alive(self) -> Iterator[dict[int, int]]:
        """Hold a pidfd of every process that runs; the pid is that of the same process, not a later one's."""
        held: dict[int, int] = {}
        try:
            for _, processes in self._read():
                for pid, started in processes:
                    with contextlib.suppress(ProcessLookupError):
                        descriptor = os.pidfd_open(pid)
                        held[descriptor] = pid
                        ended, _, _ = select.select([descriptor], [], [], 0)
                        if ended or program.start_time(pid) != started:
                            os.close(descriptor)
                            del held[descriptor]
            yield held
        finally:
            for descriptor in held:
                os.close(descriptor)


def _add(connection: Connection, processes: list[tuple[int, int]], record: tuple[object, ...]) -> None:
    """Add what a process put on record; every kind is known."""
    match record:
        case ("script", int(number)):
            connection.script = number
        case ("request", bytes(packet)):
            connection.packets.append(packet)
        case ("answer", bytes(packet)):
            connection.answer_packets.append(packet)
        case ("version", _):
            connection.versions += 1
        case ("child", int(pid), int(started)):
            connection.children.append(pid)
            processes.append((pid, started))
        case ("signal", int(pid), int(number)):
            connection.signals.append((pid, number))
        case ("finished",):
            connection.finished = True
        case ("gone",):
            connection.hung_up = True
        case ("wrong", *words):
            connection.problems.append(_problem(tuple(words)))
        case _:
            raise AssertionError(record)


@functools.cache
def _compiled_program() -> bytes:
    """Return the program as Python keeps a module; what it is started with it would compile each time."""
    path = Path(program.__file__)
    code = compile(path.read_bytes(), path, "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def _check(scripts: Sequence[Script], version: Sequence[int] | None) -> None:
    for step in (step for script in scripts for step in script):
        if version is not None and isinstance(step, Expect) and step.type == schema.VERSION:
            raise ValueError("a script that expects VERSION needs version=None")


@contextlib.contextmanager
def _peer(
    directory: str | os.PathLike[str],
    scripts: Sequence[Script],
    version: Sequence[int] | None,
    *,
    repeat_last: bool,
) -> Iterator[Peer]:
    """Make the directory that the program needs; in the end, see everything end."""
    _check(scripts, version)
    # absolute: a client may have gone elsewhere
    room = Path(tempfile.mkdtemp(prefix="criu-", dir=Path(directory).absolute()))
    answer = None if version is None else encoded_packet(version_answer(version).packet)
    plan = (answer, tuple(map(encoded_script, scripts)), repeat_last and bool(scripts))
    (room / "plan").write_bytes(marshal.dumps(plan))
    (room / "program.pyc").write_bytes(_compiled_program())
    os.mkfifo(room / "lifeline")
    lifeline = os.open(room / "lifeline", os.O_RDWR)
    path = room / "criu"
    command = shlex.join([sys.executable, "-I", "-S", str(room / "program.pyc"), str(room)])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    peer = Peer(path, room)
    try:
        yield peer
    except BaseException as error:
        _end(peer, lifeline)
        for problem in peer.problems:
            error.add_note(f"scripted peer: {problem}")
        raise
    _end(peer, lifeline)
    if problems := peer.problems:
        raise ScriptError("; ".join(problems))


def _end(peer: Peer, lifeline: int) -> None:
    # in this order: who puts itself on record later than what kill() reads finds no plan and ends
    (peer._directory / "plan").unlink()
    os.close(lifeline)
    peer.kill()
    peer.wait_ended()


@contextlib.contextmanager
def scripted_criu(
    directory: str | os.PathLike[str],
    scripts: Sequence[Script],
    *,
    version: Sequence[int] | None = (4, 2, 1),
    repeat_last: bool = False,
) -> Iterator[Peer]:
    """Make a program that a client starts in the place of `criu`, as `PATH [OPTION...] swrk FD`.

    The first connection takes the first script, and so on; `repeat_last` gives the last one to all that
    follow. A new directory below `directory` holds everything. Without a `version`, a VERSION request is
    one like any other, and a script begins with the process.
    """
    with _peer(directory, scripts, version, repeat_last=repeat_last) as peer:
        yield peer


@contextlib.contextmanager
def scripted_service(
    directory: str | os.PathLike[str],
    scripts: Sequence[Script],
    *,
    version: Sequence[int] | None = (4, 2, 1),
    repeat_last: bool = False,
) -> Iterator[Peer]:
    """Listen like `criu service`; a worker process serves each connection. Arguments are scripted_criu's."""
    with _peer(directory, scripts, version, repeat_last=repeat_last) as peer:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            path = peer._directory / "criu.socket"
            listener.bind(str(path))
            listener.listen()
            _start(peer, "service", listener)
        peer.path = path
        yield peer


@contextlib.contextmanager
def scripted_worker(
    directory: str | os.PathLike[str], script: Script, *, version: Sequence[int] | None = (4, 2, 1)
) -> Iterator[tuple[Peer, socket.socket]]:
    """Start one worker on a socket pair; what is yielded besides the peer is the client's end, blocking."""
    with _peer(directory, [script], version, repeat_last=False) as peer:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                _start(peer, "swrk", theirs)
            yield peer, ours


def _start(peer: Peer, command: str, connection: socket.socket) -> None:
    number = connection.fileno()
    process = subprocess.Popen([peer.path, command, str(number)], pass_fds=[number])
    peer._processes.append(process)
