"""The host's side of the agent: commands and files in a guest."""

from __future__ import annotations

import json
import secrets
import signal
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from vm.agent import ENDED, ERRORS, GOODBYE, HEADER, INPUT, MAGIC, NONCE, OUTPUT, SIGNAL, START

__all__ = ["Done", "Guest", "GuestError", "GuestProcess"]

CHUNK = 1 << 18
SLOW = 30
"""Seconds after which a guest that takes no input counts as dead."""


class GuestError(Exception):
    """The machine died, or a command in it ended otherwise than it should."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command in the guest ended and what it said; a negative code is a signal."""

    code: int
    output: str
    errors: str


class GuestProcess:
    """A command that runs in the guest."""

    def __init__(self, guest: Guest, number: int, name: str) -> None:
        self._guest = guest
        self._number = number
        self._name = name
        self._ended = trio.Event()
        self._said = {OUTPUT: bytearray(), ERRORS: bytearray()}
        self._news = trio.Condition()
        self._code: int | None = None
        self._error: str | None = None

    @property
    def output(self) -> str:
        """What it wrote to standard output up to now."""
        return self._said[OUTPUT].decode(errors="replace")

    @property
    def errors(self) -> str:
        """What it wrote to standard error up to now."""
        return self._said[ERRORS].decode(errors="replace")

    @property
    def raw_output(self) -> bytes:
        """The same as `output`, as bytes."""
        return bytes(self._said[OUTPUT])

    async def feed(self, data: bytes) -> None:
        """Give it input; no bytes are the end of it."""
        for start in range(0, max(1, len(data)), CHUNK):
            await self._guest.send(INPUT, self._number, data[start : start + CHUNK])

    async def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to it and its process group."""
        await self._guest.send(SIGNAL, self._number, struct.pack("<I", number))

    async def wait(self) -> Done:
        """Wait until it has ended and closed its outputs."""
        await self._ended.wait()
        if self._error is not None:
            raise GuestError(f"{self._name}: {self._error}")
        assert self._code is not None
        return Done(self._code, self.output, self.errors)

    async def succeed(self) -> Done:
        """Wait for the end; raise GuestError unless it is exit status 0."""
        done = await self.wait()
        if done.code != 0:
            raise GuestError(f"{self._name} ended with {done.code}\n{done.output}{done.errors}")
        return done

    async def wait_for(self, text: str) -> str:
        """Wait until it has written a line with this to standard output, and return that line."""
        async with self._news:
            while True:
                for line in self.output.splitlines(keepends=True):
                    if text in line and line.endswith("\n"):
                        return line
                if self._ended.is_set():
                    raise GuestError(
                        f"{self._name} ended ({self._code}) without {text!r}\n{self.output}{self.errors}"
                    )
                await self._news.wait()

    async def _hear(self, kind: int, data: bytes) -> None:
        if kind == ENDED:
            news = json.loads(data)
            self._code, self._error = news.get("code"), news.get("error")
            self._ended.set()
        else:
            self._said[kind] += data
        async with self._news:
            self._news.notify_all()

    async def _lose(self, why: str) -> None:
        if not self._ended.is_set():
            self._error = why
            self._ended.set()
            async with self._news:
                self._news.notify_all()


class Guest:
    """A connection to the agent in a machine."""

    def __init__(self, stream: trio.SocketStream, death: Callable[[str], GuestError]) -> None:
        self._stream = stream
        self._death = death
        self._sending = trio.Lock()
        self._processes: dict[int, GuestProcess] = {}
        self._parted = trio.Event()
        self._received = bytearray()
        self._number = 0

    async def send(self, kind: int, number: int, data: bytes) -> None:
        """Send a frame of the agent's protocol."""
        async with self._sending:
            # A frame that was begun has to be ended, or the guest would take the next for a part of it.
            with trio.CancelScope(shield=True), trio.fail_after(SLOW):
                try:
                    await self._stream.send_all(HEADER.pack(kind, number, len(data)) + data)
                except trio.BrokenResourceError:
                    raise self._death("it is gone") from None

    async def part(self) -> None:
        """Have all that was started killed, and the agent ready for the next."""
        with trio.CancelScope(shield=True), trio.move_on_after(SLOW):
            if not self._parted.is_set():
                await self.send(GOODBYE, 0, b"")
            await self._parted.wait()

    async def start(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = "/root"
    ) -> GuestProcess:
        """Start a command; it is killed when the connection ends."""
        self._number += 1
        process = self._processes[self._number] = GuestProcess(self, self._number, argv[0])
        wanted = {"argv": list(argv), "env": dict(env or {}), "cwd": cwd}
        await self.send(START, self._number, json.dumps(wanted).encode())
        return process

    async def run(
        self,
        argv: Sequence[str],
        *,
        data: bytes = b"",
        check: bool = True,
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: str = "/root",
    ) -> Done:
        """Run a command to its end; raise GuestError for another exit status than 0, or after `timeout` s."""
        process = await self._run(argv, data, timeout, env, cwd)
        return await (process.succeed() if check else process.wait())

    async def _run(
        self,
        argv: Sequence[str],
        data: bytes = b"",
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: str = "/root",
    ) -> GuestProcess:
        process = await self.start(argv, env=env, cwd=cwd)
        with trio.move_on_after(timeout):
            if data:
                await process.feed(data)
            await process.feed(b"")
            await process.wait()
            return process
        await process.signal(signal.SIGKILL)
        raise GuestError(f"{' '.join(argv)}: took longer than {timeout} s\n{process.output}{process.errors}")

    async def put(self, path: str, data: bytes) -> None:
        """Write a file."""
        await self.run(["sh", "-c", 'mkdir -p "${1%/*}" && cat >"$1"', "put", path], data=data)

    async def get(self, path: str) -> bytes:
        """Read a file."""
        process = await self._run(["cat", path])
        await process.succeed()
        return process.raw_output

    async def get_folder(self, path: str) -> bytes:
        """Pack a folder as it is, links and all, for `put_folder`."""
        process = await self._run(["tar", "-C", path, "-S", "-c", "."])
        await process.succeed()
        return process.raw_output

    async def put_folder(self, path: str, packed: bytes) -> None:
        """Unpack what `get_folder` packed."""
        await self.run(["mkdir", "-p", path])
        await self.run(["tar", "-C", path, "-x"], data=packed)

    async def join_network(self, address: str, *, delay: str, rate: str | None = None) -> None:
        """Give eth0 an address, and what it sends a delay and a rate, as tc(8) writes them."""
        await self.run(["ip", "address", "replace", f"{address}/24", "dev", "eth0"])
        await self.run(["ip", "link", "set", "eth0", "up"])
        how = ["delay", delay, *(["rate", rate] if rate else [])]
        await self.run(["tc", "qdisc", "replace", "dev", "eth0", "root", "netem", *how])

    async def meet(self) -> None:
        """Wait until the agent answers; what it said before is another's."""
        word = MAGIC + secrets.token_bytes(NONCE)
        await self._stream.send_all(word)
        received = b""
        while word not in received:
            data = await self._stream.receive_some(CHUNK)
            if not data:
                raise self._death("it ended while it booted")
            received += data
        self._received = bytearray(received.partition(word)[2])

    async def listen(self) -> None:
        """Hand what the agent sends to its processes."""
        received = self._received
        try:
            while True:
                while len(received) >= HEADER.size:
                    kind, number, length = HEADER.unpack_from(received)
                    if len(received) < HEADER.size + length:
                        break
                    data = bytes(received[HEADER.size : HEADER.size + length])
                    del received[: HEADER.size + length]
                    if kind == GOODBYE:
                        self._parted.set()
                        return
                    await self._processes[number]._hear(kind, data)
                data = await self._stream.receive_some(CHUNK)
                if not data:
                    break
                received += data
        except trio.BrokenResourceError:
            pass
        why = str(self._death("it died"))
        self._parted.set()
        for process in self._processes.values():
            await process._lose(why)
