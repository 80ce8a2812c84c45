"""A network link that can be slow, stall, lose its connections, and deliver byte by byte.

It stands between two ends on one machine: connections to the link's address are
passed on to a target. What arrives is spliced into pipes, which lie in a queue
until they are due at the other side; bytes are never copied here unless they are
few, so one core passes gigabytes a second. A piece has two moments::

    departure   when what was sent before has left, at ``bandwidth``, which all
                connections share
    arrival     ``delay`` seconds later

The end that sends is acknowledged at once, so its TCP sees no delay and no loss:
it fills the link like a connection that has long found its window. *Down* is from
the target to whoever connected, the way of pages; *up* the other, that of requests.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import random
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Final

import trio

from criupy.testing._timer_linux import Timer

__all__ = ["Conditions", "Cut", "Event", "Link", "Loss", "Stall", "open_link", "random_cuts"]

_CHUNK: Final = 1 << 20
_SMALL: Final = 16 << 10
#: What lies in the queue beyond what the link itself holds, in seconds at its bandwidth.
_BUFFERED: Final = 0.02
_MOST_BUFFERED: Final = 128 << 20
#: No more is taken at once than passes in this time, so that little waits for much.
_GRAIN: Final = 0.002
_LEAST: Final = 1448


class Loss(enum.Enum):
    """What both ends see of a lost connection."""

    FIN = "both ends read the end of the stream"
    RST = "both ends are reset"
    SILENCE = "nothing comes any more, and nothing goes"


@dataclass(frozen=True, slots=True)
class Cut:
    """Every connection is lost, and for ``down`` seconds new ones meet the same."""

    how: Loss
    down: float = 0.0


@dataclass(frozen=True, slots=True)
class Stall:
    """Nothing is delivered for so many seconds; connections stay."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Event:
    """What happens when ``after`` bytes have been delivered down, by all connections together."""

    after: int
    what: Cut | Stall


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How a link is, each way: ``delay`` in seconds, ``bandwidth`` in bytes a second (None: no limit).

    All connections share the bandwidth.

    ``piece`` bytes are delivered at a time at most.
    """

    delay: float = 0.0
    bandwidth: float | None = None
    piece: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no link."""
        if self.delay < 0 or (self.bandwidth is not None and self.bandwidth <= 0):
            raise ValueError(f"no link is like this: {self}")
        if self.piece is not None and self.piece < 1:
            raise ValueError(f"piece: expected 1 or more, not {self.piece}")

    @property
    def grain(self) -> int:
        """How many bytes are taken at once."""
        if self.bandwidth is None:
            return _CHUNK
        return max(_LEAST, min(_CHUNK, int(self.bandwidth * _GRAIN)))

    @property
    def room(self) -> int:
        """How many bytes are under way at most, so that who sends more waits."""
        if self.bandwidth is None:
            return _MOST_BUFFERED
        return max(4 * self.grain, min(_MOST_BUFFERED, int(self.bandwidth * (self.delay + _BUFFERED))))


def random_cuts(
    seed: int, *, nr: int, within: int, down: float = 0.0, how: Iterable[Loss] = Loss
) -> tuple[Event, ...]:
    """Return ``nr`` cuts at random moments of the first ``within`` bytes, the same for the same seed.

    Each leaves the link down for a random time up to ``down`` seconds.
    """
    chance = random.Random(seed)
    kinds = tuple(how)
    moments = sorted(chance.sample(range(within), nr))
    return tuple(
        Event(after, Cut(chance.choice(kinds), chance.uniform(0, down) if down else 0.0)) for after in moments
    )


class _Pipes:
    """Pipes to be used again."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []
        self._all: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int]:
        if self._free:
            return self._free.pop()
        pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._all.append(pipe)
        with contextlib.suppress(OSError):  # beyond fs.pipe-max-size: smaller pieces
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, _CHUNK)
        return pipe

    def give(self, pipe: tuple[int, int]) -> None:
        self._free.append(pipe)

    def close(self) -> None:
        for pipe in self._all:
            for fd in pipe:
                os.close(fd)


class _End(enum.Enum):
    FIN = enum.auto()
    RST = enum.auto()


@dataclass(slots=True)
class _Parcel:
    due: float
    length: int
    data: bytes | tuple[int, int] | _End


def _reset(*socks: trio.socket.SocketType) -> None:
    for sock in socks:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


@dataclass(slots=True, eq=False)
class _Way:
    """One direction of a connection: what it takes from one end it delivers to the other."""

    link: Link
    near: trio.socket.SocketType
    far: trio.socket.SocketType
    is_down: bool
    timer: Timer
    queue: deque[_Parcel] = field(default_factory=deque)
    queued: int = 0
    changed: trio.Event = field(default_factory=trio.Event)

    def _notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def take(self) -> None:
        """Take what comes, until an end."""
        end = None
        while end is None:
            while self.queued >= self.link.conditions.room:
                await self.changed.wait()
            await trio.lowlevel.checkpoint_if_cancelled()  # after a cut the sockets may be closed
            await trio.lowlevel.wait_readable(self.near)
            try:
                end = self._take_some()
            except BlockingIOError:
                continue
            except OSError:
                end = _End.RST
        self._put(0, end)

    def _take_some(self) -> _End | None:
        pipe = self.link._pipes.take()
        try:
            length = os.splice(
                self.near.fileno(), pipe[1], self.link.conditions.grain, flags=os.SPLICE_F_NONBLOCK
            )
        except OSError:
            self.link._pipes.give(pipe)
            raise
        if length > _SMALL:
            self._put(length, pipe)
            return None
        data = os.read(pipe[0], length) if length else b""
        self.link._pipes.give(pipe)
        if not length:
            return _End.FIN
        self._put(length, data)
        return None

    def _put(self, length: int, data: bytes | tuple[int, int] | _End) -> None:
        conditions = self.link.conditions
        left = self.link.depart(length, is_down=self.is_down)
        self.queue.append(_Parcel(left + conditions.delay, length, data))
        self.queued += length
        self._notify()

    async def deliver(self) -> _End:
        """Deliver what was taken when it is due; return how it ended."""
        while True:
            while not self.queue:
                await self.changed.wait()
            parcel = self.queue[0]
            await self.timer.sleep_until(parcel.due)
            await self.link.flowing()
            if isinstance(parcel.data, _End):
                return parcel.data
            offset = 0
            while offset < parcel.length:
                some = self.link.until_event(parcel.length - offset, is_down=self.is_down)
                sent = await self._send(parcel.data, offset, some)
                offset += sent
                if self.link.passed(sent, is_down=self.is_down):
                    await self.link.flowing()
            self.queue.popleft()
            self.queued -= parcel.length
            if isinstance(parcel.data, tuple):
                self.link._pipes.give(parcel.data)
            self._notify()

    async def _send(self, data: bytes | tuple[int, int], offset: int, length: int) -> int:
        piece = self.link.conditions.piece
        length = length if piece is None else min(length, piece)
        while True:
            try:
                if isinstance(data, bytes):
                    sent = await self.far.send(data[offset : offset + length])
                else:
                    sent = os.splice(data[0], self.far.fileno(), length, flags=os.SPLICE_F_NONBLOCK)
                    await trio.lowlevel.checkpoint_if_cancelled()
            except BlockingIOError:
                await trio.lowlevel.checkpoint_if_cancelled()
                await trio.lowlevel.wait_writable(self.far)
                continue
            if piece is not None:
                await trio.lowlevel.checkpoint()
            return sent


class Link:
    """A link that is up; made by ``open_link``. ``conditions`` may be replaced at any time.

    ``address`` and ``port`` are where to connect. ``down`` and ``up`` count the
    bytes that were delivered, ``connected`` the connections, ``cuts`` how often all
    were lost.
    """

    def __init__(self, target: tuple[str, int], conditions: Conditions, script: Iterable[Event]) -> None:
        self.target = target
        self.conditions = conditions
        self.address: str = ""
        self.port: int = 0
        self.down: int = 0
        self.up: int = 0
        self.connected: int = 0
        self.cuts: int = 0
        self._pipes: _Pipes = _Pipes()
        self._script = deque(sorted(script, key=lambda event: event.after))
        self._scopes: dict[trio.CancelScope, tuple[trio.socket.SocketType, ...]] = {}
        self._silent: list[trio.socket.SocketType] = []
        self._flow = trio.Event()
        self._flow.set()
        self._flows_from = 0.0
        self._lost: Cut | None = None
        self._lost_until = 0.0
        self._changed = trio.Event()
        self._left = {True: 0.0, False: 0.0}  # when what goes each way has left

    # ---- for whoever tries something with it -------------------------------------

    def cut(self, how: Loss, *, down: float = 0.0) -> None:
        """Lose every connection."""
        self._lost = Cut(how, down)
        self._lost_until = trio.current_time() + down
        self.cuts += 1
        for scope, socks in self._scopes.items():
            scope.cancel()  # before: who waits for a socket would be told that it is closed
            self._lose(how, *socks)

    def stall(self) -> None:
        """Deliver nothing until ``flow``."""
        if self._flow.is_set():
            self._flow = trio.Event()

    def flow(self) -> None:
        """Deliver again."""
        self._flow.set()

    async def reached(self, down: int) -> None:
        """Wait until so many bytes have been delivered down."""
        while self.down < down:
            await self._changed.wait()

    # ---- for its ways --------------------------------------------------------------

    async def flowing(self) -> None:
        """Wait until something may be delivered."""
        await self._flow.wait()
        await trio.sleep_until(self._flows_from)

    def depart(self, length: int, *, is_down: bool) -> float:
        """Let so many bytes leave behind all that left before, of any connection; return when they have."""
        left = max(self._left[is_down], trio.current_time())
        if self.conditions.bandwidth is not None:
            left += length / self.conditions.bandwidth
        self._left[is_down] = left
        return left

    def until_event(self, length: int, *, is_down: bool) -> int:
        """Return how much of this may be delivered before the script has something to do."""
        if not is_down or not self._script:
            return length
        return max(1, min(length, self._script[0].after - self.down))

    def passed(self, length: int, *, is_down: bool) -> bool:
        """Count what was delivered and do what the script says; tell whether there was something."""
        if not is_down:
            self.up += length
            return False
        self.down += length
        self._changed.set()
        self._changed = trio.Event()
        if not self._script or self.down < self._script[0].after:
            return False
        what = self._script.popleft().what
        if isinstance(what, Cut):
            self.cut(what.how, down=what.down)
        else:
            self._flows_from = trio.current_time() + what.seconds
        return True

    def _lose(self, how: Loss, *socks: trio.socket.SocketType) -> None:
        match how:
            case Loss.RST:
                _reset(*socks)
            case Loss.SILENCE:
                self._silent += socks
            case Loss.FIN:
                for sock in socks:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_WR)
                # Closing now would reset them, where something of theirs is unread.
                self._silent += socks

    async def serve(self, listener: trio.socket.SocketType) -> None:
        """Pass on what connects."""
        async with trio.open_nursery() as nursery:
            while True:
                near, _ = await listener.accept()
                if self._lost is not None and trio.current_time() < self._lost_until:
                    self._lose(self._lost.how, near)
                else:
                    nursery.start_soon(self._connect, near)

    async def _connect(self, near: trio.socket.SocketType) -> None:
        far = trio.socket.socket(near.family, socket.SOCK_STREAM)
        scope = trio.CancelScope()
        self._scopes[scope] = (near, far)
        self.connected += 1
        with scope:
            try:
                await trio.sleep(self.conditions.delay)
                await far.connect(self.target)
            except OSError:
                _reset(near, far)
            else:
                await self._pass(near, far)
        del self._scopes[scope]

    async def _pass(self, near: trio.socket.SocketType, far: trio.socket.SocketType) -> None:
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.closing(Timer()) as down, contextlib.closing(Timer()) as up:
            await self._pass_both(
                _Way(self, far, near, is_down=True, timer=down),
                _Way(self, near, far, is_down=False, timer=up),
            )

    async def _pass_both(self, *ways: _Way) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for way in ways:
                    nursery.start_soon(way.take)
                    nursery.start_soon(self._pass_one_way, way, nursery)
            for way in ways:
                way.near.close()
        finally:
            for way in ways:
                for parcel in way.queue:
                    if isinstance(parcel.data, tuple):
                        self._empty(parcel.data)

    async def _pass_one_way(self, way: _Way, nursery: trio.Nursery) -> None:
        try:
            end = await way.deliver()
        except OSError:  # who was to have it is gone, and so is the connection
            end = _End.RST
        if end is _End.FIN:
            with contextlib.suppress(OSError):
                way.far.shutdown(socket.SHUT_WR)
        else:
            nursery.cancel_scope.cancel()
            _reset(way.near, way.far)

    def _empty(self, pipe: tuple[int, int]) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(pipe[0], _CHUNK):
                pass
        self._pipes.give(pipe)

    def close(self) -> None:
        """Let go of everything."""
        for sock in self._silent:
            _reset(sock)
        self._pipes.close()


@contextlib.asynccontextmanager
async def open_link(
    target: tuple[str, int], conditions: Conditions | None = None, script: Iterable[Event] = ()
) -> AsyncIterator[Link]:
    """Pass connections on to ``target``, an address and a port, while the block runs.

    ``script`` is what happens meanwhile. What is connected at the end of the
    block is reset.
    """
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    link = Link(target, conditions or Conditions(), script)
    with trio.socket.socket(family, socket.SOCK_STREAM) as listener, contextlib.closing(link):
        await listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        listener.listen(128)
        link.address, link.port = listener.getsockname()[:2]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.serve, listener)
            try:
                yield link
            finally:
                link.cut(Loss.RST)
                nursery.cancel_scope.cancel()
