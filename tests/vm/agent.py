"""The first process of the guest: runs what the host asks for over a virtio port.

A frame is {u8 kind, u32 command, u32 length} little-endian and `length` bytes. The host numbers its commands.

    host  -> guest  START json {argv, env, cwd} | INPUT bytes, none is the end | SIGNAL u32 | GOODBYE
    guest -> host   OUTPUT bytes | ERRORS bytes | ENDED json {code} or {error} | GOODBYE

A host begins with MAGIC and 16 bytes that nobody else knows, and the guest answers with the same: what came
before is left over from earlier. GOODBYE kills its commands. Whether the port is open at the host tells
nothing: the next one may come so soon that it is not seen to be closed, and be heard before it is open.
This file is run by the guest's Python alone, without criupy.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import selectors
import signal
import struct
import subprocess
import time
from pathlib import Path

PORT_NAME = "criupy"
MAGIC = b"criupy-agent\r\n\0\xff"
NONCE = 16
HEADER = struct.Struct("<BII")
START, INPUT, SIGNAL, OUTPUT, ERRORS, ENDED, GOODBYE = range(7)
CHUNK = 1 << 16
HELD = 4 << 20
"""Bytes that wait for the port before commands have to wait with what they say."""

ENVIRONMENT = {
    "PATH": "/opt/criupy/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH": "/opt/criupy/site:/opt/criupy",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


def mount(kind: str, target: str, flags: int = 0, data: str = "") -> None:
    """mount(2), which Python lacks."""
    Path(target).mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(kind.encode(), target.encode(), kind.encode(), flags, data.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def prepare() -> None:
    """Make a system of it: what systemd would mount, the loopback interface, enough of every resource."""
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    mount("tmpfs", "/run")
    mount("tmpfs", "/dev/shm")
    mount("devpts", "/dev/pts", data="ptmxmode=666")
    mount("cgroup2", "/sys/fs/cgroup")
    Path("/proc/sys/fs/pipe-max-size").write_text(str(8 << 20))
    os.environ.update(ENVIRONMENT)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def find_port() -> str:
    for path in Path("/sys/class/virtio-ports").glob("*/name"):
        if path.read_text().strip() == PORT_NAME:
            return f"/dev/{path.parent.name}"
    raise FileNotFoundError(f"no virtio port is called {PORT_NAME}")


class Command:
    """A command of the host's, which leads a process group."""

    def __init__(self, number: int, wanted: dict[str, object], agent: Agent) -> None:
        self.number = number
        self.agent = agent
        self.code: int | None = None
        self.input = bytearray()
        self.input_ends = False
        self.process = subprocess.Popen(
            wanted["argv"],  # type: ignore[call-overload]
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **wanted["env"]},  # type: ignore[dict-item]
            cwd=wanted["cwd"],
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.stdin: int | None = os.dup(self.process.stdin.fileno())
        self.process.stdin.close()
        os.set_blocking(self.stdin, False)
        self.outputs = {self.process.stdout.fileno(): OUTPUT, self.process.stderr.fileno(): ERRORS}
        for descriptor in self.outputs:
            agent.selector.register(descriptor, selectors.EVENT_READ, self.read)

    def read(self, descriptor: int) -> None:
        data = os.read(descriptor, CHUNK)
        if data:
            self.agent.send(self.outputs[descriptor], self.number, data)
        else:
            self.agent.selector.unregister(descriptor)
            del self.outputs[descriptor]
            self.agent.settle(self)

    def write(self, descriptor: int) -> None:
        """Give it some of its input."""
        try:
            while self.input:
                del self.input[: os.write(descriptor, self.input[:CHUNK])]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.input_ends = True
        self.agent.selector.unregister(descriptor)
        if self.input_ends:
            os.close(descriptor)
            self.stdin = None

    def feed(self, data: bytes) -> None:
        if self.stdin is None:
            return
        self.input += data
        self.input_ends |= not data
        if self.stdin not in self.agent.selector.get_map():
            self.agent.selector.register(self.stdin, selectors.EVENT_WRITE, self.write)

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        for descriptor in [*self.outputs, self.stdin]:
            if descriptor is not None and descriptor in self.agent.selector.get_map():
                self.agent.selector.unregister(descriptor)
        if self.stdin is not None:
            os.close(self.stdin)
            self.stdin = None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()


class Agent:
    """One host at a time, any number of commands."""

    def __init__(self) -> None:
        self.port = os.open(find_port(), os.O_RDWR | os.O_NONBLOCK)
        self.selector = selectors.DefaultSelector()
        self.commands: dict[int, Command] = {}
        self.received = bytearray()
        self.sending = bytearray()
        self.is_met = False

    def settle(self, command: Command) -> None:
        """Tell of a command that ended and has said everything."""
        if command.code is not None and not command.outputs:
            self.send(ENDED, command.number, json.dumps({"code": command.code}).encode())
            command.close()
            self.commands.pop(command.number, None)

    def send(self, kind: int, number: int, data: bytes) -> None:
        self.sending += HEADER.pack(kind, number, len(data)) + data

    def reap(self) -> None:
        """Collect who ended: commands and orphans."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for command in list(self.commands.values()):
                if command.process.pid == pid:
                    command.code = command.process.returncode = os.waitstatus_to_exitcode(status)
                    self.settle(command)

    def obey(self, kind: int, number: int, data: bytes) -> None:
        command = self.commands.get(number)
        if kind == GOODBYE:
            self.part()
            self.send(GOODBYE, 0, b"")
        elif kind == START:
            try:
                self.commands[number] = Command(number, json.loads(data), self)
            except OSError as error:
                self.send(ENDED, number, json.dumps({"error": str(error)}).encode())
        elif command is None:
            pass  # it ended while this was on its way
        elif kind == INPUT:
            command.feed(data)
        elif kind == SIGNAL:
            command.kill(int.from_bytes(data, "little"))

    def receive(self) -> bool:
        """Take what the host sent; tell whether the port is open there."""
        try:
            data = os.read(self.port, CHUNK)
        except BlockingIOError:
            return True
        self.received += data
        while self.take():
            pass
        return bool(data)

    def take(self) -> bool:
        """Take a frame, or the word with which a host begins."""
        if self.is_met and self.received[:1] == MAGIC[:1]:
            self.part()  # the last one went without a word
        if not self.is_met:
            end = self.received.rfind(MAGIC) + len(MAGIC) + NONCE
            if len(self.received) < end or MAGIC not in self.received:
                return False
            self.sending = self.received[end - len(MAGIC) - NONCE : end]
            del self.received[:end]
            self.is_met = True
        if len(self.received) < HEADER.size:
            return False
        kind, number, length = HEADER.unpack_from(self.received)
        end = HEADER.size + length
        if len(self.received) < end:
            return False
        data = bytes(self.received[HEADER.size : end])
        del self.received[:end]
        self.obey(kind, number, data)
        return True

    def flush(self) -> None:
        while self.sending:
            try:
                del self.sending[: os.write(self.port, self.sending[:CHUNK])]
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                return

    def part(self) -> None:
        """Let nothing go on of a host that went away."""
        for command in list(self.commands.values()):
            command.kill(signal.SIGKILL)
            command.close()
        self.commands.clear()
        self.sending.clear()
        self.is_met = False

    def run(self) -> None:
        waking, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        self.selector.register(waking, selectors.EVENT_READ)
        self.selector.register(self.port, selectors.EVENT_READ)
        while True:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.sending else 0)
            self.selector.modify(self.port, wanted)
            ready = self.selector.select()
            is_open = True
            for key, _ in ready:
                if key.fd == waking:
                    with contextlib.suppress(BlockingIOError):
                        os.read(waking, CHUNK)
                elif key.fd == self.port:
                    is_open = self.receive()
                elif key.fd in self.selector.get_map() and len(self.sending) < HELD:
                    key.data(key.fd)
            self.reap()
            self.flush()
            if not is_open:
                time.sleep(0.02)  # without a host the port is always ready


if __name__ == "__main__":
    prepare()
    Agent().run()
