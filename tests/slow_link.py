"""A TCP forwarder with a speed limit, so that pages are still in flight when a test acts."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import trio

from criupy.testing.wait import until

CHUNK = 16 << 10
TCP_CLOSE = 7  # include/net/tcp_states.h


def was_reset(stream: trio.SocketStream) -> bool:
    """Whether a stream that reads as ended was reset: a send that came first is told, the read is not."""
    return stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE


def reset(*streams: trio.SocketStream) -> None:
    """Pass a reset on."""
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()


class SlowLink:
    """One connection, forwarded to `target`; what the source sends passes at `rate` bytes per second."""

    def __init__(self, target: tuple[str, int], rate: float) -> None:
        self.target = target
        self.rate = rate
        self.address = ("127.0.0.1", 0)
        self.blocked = False

    async def forward(self, near: trio.SocketStream, far: trio.SocketStream, rate: float) -> None:
        due = trio.current_time()
        try:
            async for data in near:
                for start in range(0, len(data), CHUNK):
                    part = data[start : start + CHUNK]
                    if rate:
                        # A sleep that took too long is made up for, a pause of the source is not.
                        due = max(due, trio.current_time() - 0.05) + len(part) / self.rate
                        await trio.sleep_until(due)
                        await until(lambda: not self.blocked)
                    await far.send_all(part)
            if was_reset(near):
                reset(near, far)
            else:
                await far.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            reset(near, far)

    async def serve(self, near: trio.SocketStream) -> None:
        try:
            far = await trio.open_tcp_stream(*self.target)
        except OSError:  # the source is gone, and so is this
            reset(near)
            return
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self.forward, near, far, 0)
            nursery.start_soon(self.forward, far, near, self.rate)


@contextlib.asynccontextmanager
async def slow_link(target: tuple[str, int], rate: float) -> AsyncIterator[SlowLink]:
    link = SlowLink(target, rate)
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        link.address = listener.socket.getsockname()[:2]
        nursery.start_soon(trio.serve_listeners, link.serve, [listener])
        yield link
        nursery.cancel_scope.cancel()
