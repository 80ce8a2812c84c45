"""The link between two ends: every byte passes, when and how it is told to."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from functools import partial

import pytest
import trio

from criupy.testing._timer_linux import Timer
from criupy.testing.link_linux import Conditions, Cut, Event, Link, Loss, Stall, open_link, random_cuts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

DATA = random.Random(1).randbytes(3 << 20)


async def give(stream: trio.SocketStream, data: bytes, asked: bytearray) -> None:
    """Read until the peer has said enough, and send it this; what a source does."""
    try:
        async with stream:
            while len(asked) < 4 and (some := await stream.receive_some()):
                asked += some
            await stream.send_all(data)
            await stream.send_eof()
            while some := await stream.receive_some():
                asked += some
    except trio.BrokenResourceError:
        asked += b"broken"


@contextlib.asynccontextmanager
async def linked(
    conditions: Conditions | None = None,
    script: Iterable[Event] = (),
    *,
    data: bytes = DATA,
    host: str = "127.0.0.1",
) -> AsyncIterator[tuple[Link, bytearray]]:
    asked = bytearray()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, lambda stream: give(stream, data, asked), 0, host=host)
        )
        async with open_link(listeners[0].socket.getsockname()[:2], conditions, script) as link:
            yield link, asked
        nursery.cancel_scope.cancel()


async def fetch(link: Link) -> tuple[bytes, str]:
    """Connect and ask; return what comes, and how it ends."""
    got = bytearray()
    try:
        stream = await trio.open_tcp_stream(link.address, link.port)
    except OSError:  # so soon
        return b"", "RST"
    async with stream:
        try:
            await stream.send_all(b"get.")
            while some := await stream.receive_some():
                got += some
        except trio.BrokenResourceError:
            return bytes(got), "RST"
        # TCP_INFO begins with the state: TCP_CLOSE (7) after a reset that a read saw as an end.
        state = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return bytes(got), "RST" if state == 7 else "FIN"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("length", [0, 1, 16 << 10, (16 << 10) + 1, len(DATA)])
async def test_all_passes(length: int, host: str) -> None:
    async with linked(data=DATA[:length], host=host) as (link, asked):
        assert await fetch(link) == (DATA[:length], "FIN")
        assert (link.down, link.up, link.connected) == (length, 4, 1)
        assert bytes(asked) == b"get."


async def test_many_connections_at_once() -> None:
    results = []

    async def one(link: Link) -> None:
        results.append(await fetch(link))

    async with linked(Conditions(delay=0.01)) as (link, _):
        async with trio.open_nursery() as nursery:
            for _n in range(20):
                nursery.start_soon(one, link)
        assert results == [(DATA, "FIN")] * 20
        assert link.down == 20 * len(DATA)


async def test_a_short_delay_is_exact() -> None:
    timer = Timer()
    with contextlib.closing(timer):
        late = []
        for _ in range(50):
            due = trio.current_time() + 0.0003
            await timer.sleep_until(due)
            late.append(trio.current_time() - due)
        assert min(late) > -1e-6
        assert sorted(late)[5] < 0.0005  # trio's own clock would be late by that at least
        await timer.sleep_until(0)  # long past
        with trio.move_on_after(0.01):
            await timer.sleep_until(trio.current_time() + 60)
        due = trio.current_time() + 0.02
        await timer.sleep_until(due)  # what was cancelled rings no more
        assert trio.current_time() >= due


async def test_a_delay_is_there_each_way() -> None:
    async with linked(Conditions(delay=0.1), data=b"x") as (link, _):
        begin = trio.current_time()
        assert await fetch(link) == (b"x", "FIN")
        assert trio.current_time() - begin >= 0.2


async def test_bandwidth() -> None:
    async with linked(Conditions(bandwidth=10e6)) as (link, _):
        begin = trio.current_time()
        assert await fetch(link) == (DATA, "FIN")
        assert trio.current_time() - begin >= len(DATA) / 10e6


async def test_conditions_that_change() -> None:
    async with linked(Conditions(bandwidth=1e6)) as (link, _), trio.open_nursery() as nursery:
        nursery.start_soon(fetch, link)
        await link.reached(100_000)
        link.conditions = Conditions(piece=1 << 18)
        await link.reached(len(DATA))


@pytest.mark.parametrize("piece", [1, 7])
async def test_byte_by_byte(piece: int) -> None:
    data = DATA[:50_000]
    async with linked(Conditions(piece=piece), data=data) as (link, asked):
        assert await fetch(link) == (data, "FIN")
        assert bytes(asked) == b"get."


@pytest.mark.parametrize("after", [1, 1000, 100_000, len(DATA) - 1])
@pytest.mark.parametrize("how", [Loss.FIN, Loss.RST])
async def test_a_cut_by_the_script(how: Loss, after: int) -> None:
    async with linked(script=[Event(after, Cut(how))]) as (link, asked):
        got, ending = await fetch(link)
        assert DATA.startswith(got)
        assert ending == how.name
        if how is Loss.FIN:
            assert len(got) == after
        assert (link.down, link.cuts) == (after, 1)
        assert await fetch(link) == (DATA, "FIN")
        with trio.fail_after(5):
            while b"broken" not in asked and how is Loss.RST:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_silence() -> None:
    async with linked(script=[Event(1000, Cut(Loss.SILENCE))]) as (link, _):
        with trio.move_on_after(0.3) as patience:
            await fetch(link)
        assert patience.cancelled_caught
        assert link.down == 1000


@pytest.mark.parametrize("how", [Loss.FIN, Loss.RST])
async def test_down_for_a_while(how: Loss) -> None:
    async with linked() as (link, _):
        link.cut(how, down=0.2)
        assert await fetch(link) == (b"", how.name)
        await trio.sleep(0.2)
        assert await fetch(link) == (DATA, "FIN")


async def test_stalls() -> None:
    async with linked(script=[Event(1000, Stall(0.2))]) as (link, _), trio.open_nursery() as nursery:
        begin = trio.current_time()
        assert await fetch(link) == (DATA, "FIN")
        assert trio.current_time() - begin >= 0.2
        link.stall()
        nursery.start_soon(fetch, link)
        await trio.sleep(0.1)
        assert link.down == len(DATA)
        link.flow()
        await link.reached(2 * len(DATA))


async def test_a_reset_is_passed_on() -> None:
    async with linked(Conditions(bandwidth=1e6)) as (link, asked):
        async with await trio.open_tcp_stream(link.address, link.port) as stream:
            await stream.send_all(b"get.")
            await stream.receive_some()
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with trio.fail_after(5):
            while b"broken" not in asked:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_nobody_at_the_other_side() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        where = closed.getsockname()
    async with open_link(where) as link:
        assert await fetch(link) == (b"", "RST")


def test_the_same_seed_makes_the_same_cuts() -> None:
    cuts = random_cuts(7, nr=20, within=1 << 20, down=0.1)
    assert cuts == random_cuts(7, nr=20, within=1 << 20, down=0.1) != random_cuts(8, nr=20, within=1 << 20)
    assert [event.after for event in cuts] == sorted({event.after for event in cuts})
    assert {event.what.how for event in cuts if isinstance(event.what, Cut)} == set(Loss)


@pytest.mark.parametrize("wrong", [{"delay": -1.0}, {"bandwidth": 0.0}, {"piece": 0}])
def test_no_link_is_like_this(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"no link is like this|piece: expected 1 or more"):
        Conditions(**wrong)  # type: ignore[arg-type]
