"""The process of a scripted peer: what runs in the place of `criu swrk FD`, or under `criu service`.

rpc_peer_linux.py starts it, or has a client start it, as `python -I -S DIRECTORY/program.pyc DIRECTORY ...`,
and makes and reads what is in the directory:

    program.pyc     this file, compiled
    plan            the scripts and the answer to VERSION; gone once the test is over
    lifeline        a FIFO that the test holds open for writing: when it closes, everything here ends
    connection-N    one for each process that talks to a client: what it was told, step by step
    script-N        empty: script N has been taken

It starts anew for every connection of a client under test, and clients have deadlines. So it imports only
what is compiled into the interpreter, and neither knows protobuf nor enum: messages come encoded in the plan,
and of those that arrive it reads no more than the integers at their top.
"""

from __future__ import annotations

import _socket
import errno
import itertools
import marshal
import os
import select
import sys

TYPE_CHECKING = False  # typing's own would take longer to import than all the rest
if TYPE_CHECKING:
    from typing import NoReturn, TypeAlias

# what marshal can write
Value: TypeAlias = "bool | int | float | str | bytes | tuple[Value, ...] | None"
Step: TypeAlias = tuple[Value, ...]
Script: TypeAlias = tuple[Value, ...]

# fields of criu_req and values of criu_req_type (images/rpc.proto)
TYPE = 1
NOTIFY_SUCCESS = 3
KEEP_OPEN = 4
NOTIFY = 6
VERSION = 10

MAY_KEEP_OPEN = frozenset({5, 7, 8, 9, 10, 12})
"""To any other type with keep_open CRIU gives no answer (chk_keepopen_req in criu/cr-service.c)."""

FAILED = 255
"""The exit status of CRIU's worker whenever it hangs up, and when the client does."""

PAUSE = 5
"""Milliseconds between attempts to send to a client that does not read."""


class _Gone(Exception):
    """The client closed its end."""


class _Wrong(Exception):
    """What happened is not what the script says; the arguments tell."""


class _Instead(Exception):
    """Another script takes the place of all steps that were left."""

    def __init__(self, script: Script) -> None:
        self.script = script


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot: with its pid a name that nobody else gets."""
    try:
        # pathlib would take as long as all the rest of this program
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text[text.rindex(b")") :].split()[20])


def _varint(packet: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (packet[at] & 0x7F) << shift
        shift += 7
        at += 1
        if packet[at - 1] < 0x80:
            return value, at


def integers(packet: bytes) -> dict[int, int]:
    """Return the integers at the top of a protobuf message by field number; nothing when it is none."""
    found = {}
    at = 0
    try:
        while at < len(packet):
            key, at = _varint(packet, at)
            number, kind = key >> 3, key & 7
            if kind == 0:
                found[number], at = _varint(packet, at)
            elif kind == 2:
                size, at = _varint(packet, at)
                at += size
            elif kind in {1, 5}:
                at += 8 if kind == 1 else 4
            else:
                return {}
    except IndexError:
        return {}
    return found if at == len(packet) else {}


def inherited() -> tuple[tuple[int, str], ...]:
    """Return the open descriptors above standard error, and what they lead to."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
        except FileNotFoundError:  # the one of the listing
            continue
        if int(name) > 2:
            found.append((int(name), target))
    return tuple(found)


class _Room:
    """The directory: everything that is shared with the test."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.lifeline = os.open(f"{directory}/lifeline", os.O_RDONLY | os.O_NONBLOCK)
        self.records = -1

    def take(self, name: str) -> int:
        """Create the first file NAME-N that is not there yet, and return N."""
        number = 0
        while True:
            try:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
                descriptor = os.open(f"{self.directory}/{name}-{number}", flags, 0o600)
            except FileExistsError:
                number += 1
                continue
            if name == "connection":
                self.records = descriptor
            else:
                os.close(descriptor)
            return number

    def record(self, *what: Value) -> None:
        os.write(self.records, marshal.dumps(what))

    def plan(self) -> tuple[bytes | None, tuple[Script, ...], bool]:
        """Return the answer to VERSION, the scripts, and whether the last one repeats."""
        try:
            with open(f"{self.directory}/plan", "rb") as file:  # noqa: PTH123
                version, scripts, repeat = marshal.load(file)  # noqa: S302
        except FileNotFoundError:
            self.end()
        return version, scripts, repeat

    def end(self) -> NoReturn:
        """End as the test ends everything, whichever of the two comes first."""
        os.kill(os.getpid(), 9)
        raise AssertionError

    def wait(self, descriptor: int = -1, events: int = 0, timeout: float | None = None) -> None:
        """Wait for events of a descriptor (its end is always one), for a time in milliseconds, or for ever.

        The end of the test is the end of this process.
        """
        poll = select.poll()
        poll.register(self.lifeline, 0)
        if descriptor >= 0:
            poll.register(descriptor, events)
        if any(ready == self.lifeline for ready, _ in poll.poll(timeout)):
            self.end()


class _Worker:
    """One connection and its script."""

    def __init__(self, room: _Room, connection: _socket.socket) -> None:
        self.room = room
        self.socket = connection
        self.version, self.scripts, self.repeat = room.plan()
        self.finished = False

    def peek(self) -> bytes:
        """Return the next packet, and leave it where it is; CRIU, too, looks for its size first."""
        self.room.wait(self.socket.fileno(), select.POLLIN)
        size = self.socket.recv_into(bytearray(1), 1, _socket.MSG_PEEK | _socket.MSG_TRUNC)
        if size == 0:
            raise _Gone
        return self.socket.recv(size, _socket.MSG_PEEK)

    def next_request(self) -> bytes:
        """Answer VERSION as often as it is asked, where that is wanted; return what is next, unread."""
        while True:
            packet = self.peek()
            fields = integers(packet)
            if self.version is None or fields.get(TYPE) != VERSION:
                return packet
            self.receive("version")
            self.send(self.version)
            if not fields.get(KEEP_OPEN):
                sys.exit(0)

    def receive(self, kind: str) -> dict[int, int]:
        packet = self.socket.recv(len(self.peek()))
        self.room.record(kind, packet)
        return integers(packet)

    def send(self, packet: bytes, paths: tuple[Value, ...] = ()) -> None:
        descriptors = [os.open(str(path), os.O_RDWR | os.O_NOCTTY) for path in paths]
        try:
            words = b"".join(descriptor.to_bytes(4, sys.byteorder) for descriptor in descriptors)
            ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, words)] if words else []
            while not self._sent(packet, ancillary):
                self.room.wait(timeout=PAUSE)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _sent(self, packet: bytes, ancillary: list[tuple[int, int, bytes]]) -> bool:
        # a client's reader is to be tested with larger packets than CRIU's buffer lets out
        if len(packet) > self.socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF) // 2:
            self.socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, 2 * len(packet))
        try:
            # without waiting in the kernel: the test may end meanwhile
            self.socket.sendmsg([packet], ancillary, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in {errno.EMSGSIZE, errno.ENOBUFS}:
                raise _Wrong("too large", len(packet)) from error
            raise
        return True

    def look_at_socket(self) -> None:
        """Refuse what CRIU cannot work with; a wrong number has ended this process before."""
        if self.socket.type != _socket.SOCK_SEQPACKET:
            raise _Wrong("not a SOCK_SEQPACKET socket")
        if not os.get_blocking(self.socket.fileno()):
            raise _Wrong("not a blocking socket, on which CRIU fails with EAGAIN")

    def run(self) -> None:
        """Talk until the client is gone."""
        if self.version is not None:
            self.next_request()
        number = self.room.take("script")
        if number >= len(self.scripts):
            if not self.repeat:
                raise _Wrong("no script", number)
            number = len(self.scripts) - 1
        self.room.record("script", number)
        script = self.scripts[number]
        while True:
            try:
                self.perform_all(script)
            except _Instead as instead:
                script = instead.script
            else:
                break
        self.finish()
        if self.socket.fileno() >= 0:
            self.next_request()
            raise _Wrong("after the script", self.receive("request").get(TYPE))

    def finish(self) -> None:
        self.finished = True
        self.room.record("finished")

    def perform_all(self, script: Script) -> None:
        for step in script:
            self.perform(step)

    def perform(self, step: Value) -> None:
        match step:
            case ("expect", expected):
                self.next_request()
                fields = self.receive("request")
                found = fields.get(TYPE)
                if expected not in {None, found}:
                    raise _Wrong("expected", expected, found)
                if fields.get(KEEP_OPEN) and found not in MAY_KEEP_OPEN:
                    raise _Wrong("keep_open", found)
            case ("send", bytes(packet), tuple(paths)):
                self.send(packet, paths)
            case ("notify", bytes(packet), tuple(paths), refused):
                self.send(packet, paths)
                fields = self.receive("answer")
                if fields.get(TYPE) != NOTIFY:
                    raise _Wrong("expected", NOTIFY, fields.get(TYPE))
                if isinstance(refused, tuple) and not fields.get(NOTIFY_SUCCESS):
                    raise _Instead(refused)
            case ("unread",):
                self.room.wait(self.socket.fileno())
                self.finish()
                raise _Gone
            case ("close",):
                self.socket.close()
            case _:
                self.perform_alone(step)

    def perform_alone(self, step: Value) -> None:
        """Perform a step that is not about the socket."""
        match step:
            case ("print", int(descriptor), bytes(text)):
                while text:
                    text = text[os.write(descriptor, text) :]
            case ("wait", float() | None as timeout):
                self.room.wait(timeout=timeout)
            case ("exit", int(status)):
                self.finish()
                sys.exit(status)
            case ("kill", int(number)):
                self.finish()
                os.kill(os.getpid(), number)
            case ("ignore", int(number)):
                # not at the top: it brings enum with it
                import signal

                signal.signal(number, lambda number, _: self.room.record("signal", os.getpid(), number))
            case ("spawn", bool(keep_socket), bool(keep_output)):
                self.spawn(keep_socket=keep_socket, keep_output=keep_output)
            case ("repeat", tuple(script), int() | None as times):
                for _ in itertools.repeat(None) if times is None else range(times):
                    self.perform_all(script)
            case _:
                raise _Wrong("unknown step", repr(step))

    def spawn(self, *, keep_socket: bool, keep_output: bool) -> None:
        """Leave a child process behind; it is on record when this returns."""
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(reading)
            if not keep_socket:
                self.socket.close()
            if not keep_output:
                null = os.open("/dev/null", os.O_RDWR)
                for descriptor in range(3):
                    os.dup2(null, descriptor)
            self.room.record("child", os.getpid(), start_time(os.getpid()))
            os.close(writing)
            while True:
                self.room.wait()
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)


def work(room: _Room, connection: _socket.socket, arguments: list[str], given: Value) -> int:
    """Serve one connection, put all of it on record, and return the exit status."""
    room.take("connection")
    room.record("started", os.getpid(), start_time(os.getpid()), tuple(arguments), given)
    worker = _Worker(room, connection)
    try:
        worker.look_at_socket()
        worker.run()
    except (_Gone, BrokenPipeError, ConnectionResetError):
        room.record("gone")
        return 0 if worker.finished else FAILED
    except _Wrong as wrong:
        room.record("wrong", *wrong.args)
        return FAILED
    except Exception as error:
        room.record("wrong", "broken", repr(error))
        raise
    return 0


def serve(room: _Room, descriptor: int, arguments: list[str]) -> NoReturn:
    """Accept connections, and serve each in a process of its own as `criu service` does."""
    import signal
    import socket

    listener = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    while True:
        room.wait(listener.fileno(), select.POLLIN)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            sys.exit(work(room, connection, arguments, ()))
        connection.close()


def main() -> int:
    """Be `criu [OPTION...] swrk FD`, or a service on a listening descriptor."""
    given = inherited()
    # a client may have closed some of the first three, and nothing of ours shall take their place
    while (spare := os.open("/dev/null", os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    _, directory, *arguments = sys.argv
    room = _Room(directory)
    match arguments:
        case ["service", number]:
            serve(room, int(number), arguments)
        case [*_, "swrk", number]:
            return work(room, _socket.socket(fileno=int(number)), arguments, given)
    room.take("connection")
    room.record("started", os.getpid(), start_time(os.getpid()), tuple(arguments), given)
    room.record("wrong", "not `swrk FD`")
    print("this stand-in for criu knows `swrk FD` only", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
