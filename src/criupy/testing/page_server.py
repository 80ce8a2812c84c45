"""A minimal page server that can misbehave, and that tells what a real source would have done.

It stands for a live `criu dump --lazy-pages`: one connection, requests answered in order.
"""

from __future__ import annotations

import bisect
import enum
import mmap
import random
import socket as _socket
import struct
from dataclasses import dataclass, field
from typing import Literal

import trio

from criupy.testing.images import STACK_BASE, STACK_PAGES, WrittenImages, WrittenTask
from criupy.testing.spec import PAGE
from criupy.wire.page_server import NO_FLAGS, STATUS, Command, Frame, FrameSize, PageFlags

__all__ = ["Behaviour", "End", "PageServer", "Request"]

Wrong = Literal["command", "flags", "count", "zero", "address", "id"]


class End(enum.Enum):
    """How a connection ended, seen from the source, and what a real source does then.

    CLOSED and FIN make it succeed and kill its process; after all others the process goes on.
    """

    CLOSED = "CLOSE, answered, then the end of the stream"
    FIN = "the end of the stream without CLOSE"
    RESET = "a reset"
    PROTOCOL = "something a source refuses"
    CUT = "cut by the server itself"
    STUCK = "a request that hangs a real source"
    CRASHED = "a request that crashes a real source"

    @property
    def source_goes_on(self) -> bool:
        """Whether the source's process resumes; one that is stuck stays frozen until criu is killed."""
        return self not in (End.CLOSED, End.FIN, End.STUCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How the server differs from a good one; byte counts are of its answers, headers included.

    `delay` seconds pass between a request's arrival and its answer, however many are in flight.
    Answers have at most `max_pages`; with `short` a random number of them, from that seed. After
    `silent_after` bytes nothing more is sent, with `silent_at_close` nothing to CLOSE; after `cut_after`
    bytes the connection is `cut_with` a FIN or a reset. The answer with number `wrong_at` has a `wrong`
    header field.
    """

    delay: float = 0.0
    max_pages: int = 1024
    short: int | None = None
    silent_after: int | None = None
    silent_at_close: bool = False
    cut_after: int | None = None
    cut_with: Literal["fin", "reset"] = "fin"
    wrong: Wrong | None = None
    wrong_at: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One GET as it came."""

    pid: int
    address: int
    nr_pages: int


@dataclass(slots=True, eq=False)
class _Ended(Exception):
    end: End


@dataclass(slots=True, eq=False)
class PageServer:
    """Serve the lazy pages of written images to one client.

    Start it with `await nursery.start(server.run)`; it ends with the connection. `frame_size` is the
    images' own unless given.
    """

    images: WrittenImages
    behaviour: Behaviour = Behaviour()
    frame_size: FrameSize | None = None
    address: str = "127.0.0.1"
    port: int = 0
    end: End | None = None
    requests: list[Request] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    """Requests that a source must never get, in words."""
    pages_sent: int = 0
    closed_by: Literal["CLOSE", "FORCE_CLOSE"] | None = None
    accepted: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    _closed: bool = False
    _peer_end: End | None = None
    _peer_gone: trio.Event = field(default_factory=trio.Event)
    _sent: int = 0
    _answers: int = 0
    _starts: dict[int, list[int]] = field(default_factory=dict)
    _maps: dict[int, memoryview] = field(default_factory=dict)
    _tasks: dict[int, WrittenTask] = field(default_factory=dict)
    _random: random.Random = field(default_factory=random.Random)

    @property
    def _size(self) -> FrameSize:
        return self.frame_size or self.images.frame_size

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, tell the port, serve one connection."""
        self._random.seed(self.behaviour.short)
        self._map_pages()
        try:
            await self._accept(task_status)
        finally:
            self._maps.clear()
            self.ended.set()

    async def _accept(self, task_status: trio.TaskStatus[int]) -> None:
        family = _socket.AF_INET6 if ":" in self.address else _socket.AF_INET
        with trio.socket.socket(family) as listener:
            await listener.bind((self.address, self.port))
            listener.listen(1)
            self.port = listener.getsockname()[1]
            task_status.started(self.port)
            connection, _ = await listener.accept()
            listener.close()
            self.accepted.set()
            with connection:
                await self._serve(connection)

    def _map_pages(self) -> None:
        for task in self.images.tasks:
            with task.pages.open("rb") as file:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # never closed but dropped: a traceback may still hold a slice
            self._maps[task.pid] = memoryview(pages)
            self._tasks[task.pid] = task
            self._starts[task.pid] = [run.start for run in task.runs]

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        connection.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        sender, receiver = trio.open_memory_channel[tuple[float, Frame]](1 << 20)
        # the channel outlives the nursery: requests may still come while the end is decided
        async with receiver, trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, connection, sender)
            try:
                await self._answer_all(connection, receiver)
            except _Ended as ended:
                self.end = ended.end
            except (ConnectionResetError, BrokenPipeError):
                self.end = End.RESET
            else:
                self.end = End.CLOSED if self._closed and self._peer_end is End.FIN else self._peer_end
            nursery.cancel_scope.cancel()

    async def _receive(
        self, connection: trio.socket.SocketType, sender: trio.MemorySendChannel[tuple[float, Frame]]
    ) -> None:
        """Take requests off the socket, so that answers can be delayed without holding others up."""
        buffer = b""
        async with sender:
            while True:
                try:
                    data = await connection.recv(1 << 16)
                except ConnectionResetError:
                    self._peer_end = End.RESET
                    break
                if not data:
                    self._peer_end = End.PROTOCOL if buffer else End.FIN
                    break
                buffer += data
                while len(buffer) >= self._size:
                    frame = Frame.decode(buffer[: self._size], self._size)
                    buffer = buffer[self._size :]
                    await sender.send((trio.current_time(), frame))
        self._peer_gone.set()

    async def _answer_all(
        self, connection: trio.socket.SocketType, receiver: trio.MemoryReceiveChannel[tuple[float, Frame]]
    ) -> None:
        """Answer in order: what comes later is judged only then, as a real source does."""
        async for arrival, frame in receiver:
            await trio.sleep_until(arrival + self.behaviour.delay)
            await self._obey(connection, frame)
        await self._peer_gone.wait()

    async def _obey(self, connection: trio.socket.SocketType, frame: Frame) -> None:
        if self._closed:
            self.violations.append(f"command {frame.command} after CLOSE")
            raise _Ended(End.PROTOCOL)
        if frame.command is Command.GET:
            self.requests.append(Request(frame.dst_id, frame.address, frame.nr_pages))
            await self._answer(connection, frame.dst_id, frame.address, frame.nr_pages)
        elif frame.command in {Command.CLOSE, Command.FORCE_CLOSE}:
            self.closed_by = "CLOSE" if frame.command is Command.CLOSE else "FORCE_CLOSE"
            if self.behaviour.silent_at_close:
                await self._peer_gone.wait()
                raise _Ended(self._peer_end or End.FIN)
            await self._send(connection, STATUS.pack(0))
            self._closed = True
        else:
            self.violations.append(f"unknown command {frame.command}")
            raise _Ended(End.PROTOCOL)

    async def _answer(self, connection: trio.socket.SocketType, pid: int, address: int, asked: int) -> None:
        task = self._tasks.get(pid)
        where = f"GET of {asked} pages at {address:#x} of pid {pid}"
        if task is None:
            self.violations.append(f"{where}: no such task")
            raise _Ended(End.CRASHED)
        index = bisect.bisect_right(self._starts[pid], address) - 1
        run = task.runs[index] if index >= 0 else None
        offset = address - run.start if run else 0
        if run is None or offset >= run.nr_pages * PAGE or offset % PAGE or not asked:
            self.violations.append(f"{where}: no such page")
            if STACK_BASE <= address < STACK_BASE + STACK_PAGES * PAGE:
                await self._peer_gone.wait()
                raise _Ended(End.STUCK)
            raise _Ended(End.PROTOCOL)
        first = offset // PAGE
        nr = min(asked, run.nr_pages - first, self.behaviour.max_pages)
        if self.behaviour.short is not None:
            nr = self._random.randint(1, nr)
        start = task.offsets[index] + offset
        await self._send(connection, self._header(pid, address, nr, asked))
        await self._send(connection, self._maps[pid][start : start + nr * PAGE])
        self.pages_sent += nr

    def _header(self, pid: int, address: int, nr: int, asked: int) -> bytes:
        wrong = self.behaviour.wrong if self._answers == self.behaviour.wrong_at else None
        self._answers += 1
        command, flags = Command.ADD_F, PageFlags.PRESENT
        if wrong == "command":
            command = Command.GET
        elif wrong == "flags":
            flags = NO_FLAGS
        elif wrong == "count":
            nr = asked + 1
        elif wrong == "zero":
            nr = 0
        elif wrong == "address":
            address += PAGE
        elif wrong == "id":
            pid += 1
        return Frame(command, nr, address, pid, flags).encode(self._size)

    async def _send(self, connection: trio.socket.SocketType, data: bytes | memoryview) -> None:
        """Send all, unless the point is reached where this server falls silent or cuts."""
        left = memoryview(data)
        behaviour = self.behaviour
        limit = min((n for n in (behaviour.silent_after, behaviour.cut_after) if n is not None), default=None)
        stop = len(left) if limit is None else min(len(left), limit - self._sent)
        done = 0
        while done < stop:
            done += await connection.send(left[done:stop])
        self._sent += done
        if done == len(left):
            return
        if behaviour.cut_after is None or limit == behaviour.silent_after:
            await self._peer_gone.wait()
            raise _Ended(self._peer_end or End.FIN)
        await self._cut(connection)

    async def _cut(self, connection: trio.socket.SocketType) -> None:
        if self.behaviour.cut_with == "reset":
            linger = struct.pack("=ii", 1, 0)
            connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, linger)
        else:
            # closing with unread requests would be a reset: say the end, then wait for the peer's
            connection.shutdown(_socket.SHUT_WR)
            await self._peer_gone.wait()
        raise _Ended(End.CUT)
