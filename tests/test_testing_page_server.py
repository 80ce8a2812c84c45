"""The minimal page server: what it answers, and what it says a real source would have done."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Literal

import pytest
import trio
import trio.testing

from criupy.testing.images import STACK_BASE, WrittenImages, write_images
from criupy.testing.page_server import Behaviour, End, PageServer, Wrong
from criupy.testing.spec import AREA_BASE, PAGE, WorkloadSpec
from page_server_clients import ADD_F, CLOSE, FORCE_CLOSE, FRAMES, GET, frame

SPEC = WorkloadSpec(size=64 * PAGE, tree=2, areas=2)
PRESENT_ADD_F = 4 << 16 | ADD_F


class Client:
    def __init__(self, server: PageServer, stream: trio.SocketStream) -> None:
        self.frame_size = 24 if server.images.count == "old" else 32
        self.stream = stream
        self.buffer = b""

    async def exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            data = await self.stream.receive_some()
            assert data, f"the stream ended {count - len(self.buffer)} bytes early"
            self.buffer += data
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    async def say(self, command: int, nr: int = 0, address: int = 0, pid: int = 0) -> None:
        await self.stream.send_all(frame(self.frame_size, command, nr, address, pid))

    async def get(self, nr: int, address: int, pid: int = 100) -> None:
        await self.say(GET, nr, address, pid)

    async def header(self) -> tuple[int, ...]:
        command, *_, nr, address, pid = FRAMES[self.frame_size].unpack(await self.exactly(self.frame_size))
        return command, nr, address, pid

    async def answer(self) -> tuple[int, bytes]:
        _, nr, _, _ = await self.header()
        return nr, await self.exactly(nr * PAGE)

    async def reset(self) -> None:
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.stream.aclose()


@pytest.fixture(params=["lazy-new", "lazy-old", "full-new"])
def images(request: pytest.FixtureRequest, tmp_path: Path) -> WrittenImages:
    style: Literal["lazy", "full"] = "full" if "full" in request.param else "lazy"
    return write_images(
        tmp_path / "images",
        SPEC,
        style=style,
        count="old" if "old" in request.param else "new",
        entry_pages=24,
    )


@contextlib.asynccontextmanager
async def client_of(server: PageServer) -> AsyncIterator[Client]:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with stream:
            yield Client(server, stream)


def test_image_sizes(images: WrittenImages) -> None:
    for number in (1, 2):
        size = (images.directory / f"pages-{number}.img").stat().st_size
        assert size == (4 + (64 if images.style == "full" else 0)) * PAGE
    assert [run.nr_pages for run in images.tasks[0].runs] == [24, 8, 24, 8]


async def test_answers(images: WrittenImages) -> None:
    server = PageServer(images)
    second = SPEC.task_areas()[1].start
    async with client_of(server) as client:
        await client.get(5, AREA_BASE + 2 * PAGE)
        await client.get(64, AREA_BASE + 20 * PAGE, 101)  # up to the end of the pagemap entry
        await client.get(1, second)
        assert await client.header() == (PRESENT_ADD_F, 5, AREA_BASE + 2 * PAGE, 100)
        assert await client.exactly(5 * PAGE) == b"".join(SPEC.page(0, n) for n in range(2, 7))
        assert await client.header() == (PRESENT_ADD_F, 4, AREA_BASE + 20 * PAGE, 101)
        assert await client.exactly(4 * PAGE) == b"".join(SPEC.page(1, n) for n in range(20, 24))
        assert await client.answer() == (1, SPEC.page(0, 32))
        await client.say(CLOSE)
        assert await client.exactly(4) == bytes(4)
    assert server.end is End.CLOSED
    assert server.pages_sent == 10
    assert server.violations == []


async def finish_nothing(client: Client) -> None:
    await client.stream.send_eof()


async def finish_with_close(client: Client) -> None:
    await client.say(FORCE_CLOSE)
    await client.exactly(4)


async def finish_with_close_and_more(client: Client) -> None:
    await client.say(CLOSE)
    await client.get(1, AREA_BASE)


async def finish_with_close_and_reset(client: Client) -> None:
    await client.say(CLOSE)
    await client.exactly(4)
    await client.reset()


async def finish_with_reset(client: Client) -> None:
    await client.reset()


async def finish_unread(client: Client) -> None:
    await client.get(24, AREA_BASE)
    # into the pages, so that some are surely there unread
    assert len(await client.stream.socket.recv(client.frame_size)) == client.frame_size
    assert await client.stream.socket.recv(1)


async def finish_inside_a_header(client: Client) -> None:
    await client.stream.send_all(bytes(7))


async def finish_with_unknown_command(client: Client) -> None:
    await client.say(99)
    assert await client.stream.receive_some() == b""


async def finish_with_absent_page(client: Client) -> None:
    await client.get(1, 4096)
    assert await client.stream.receive_some() == b""


async def finish_with_unknown_pid(client: Client) -> None:
    await client.get(1, AREA_BASE, 7)
    assert await client.stream.receive_some() == b""


async def finish_with_page_that_is_not_lazy(client: Client) -> None:
    await client.get(1, STACK_BASE)
    with trio.move_on_after(0.02) as hangs:
        await client.stream.receive_some()
    assert hangs.cancelled_caught


@pytest.mark.parametrize(
    ("finish", "end", "goes_on", "violation"),
    [
        (finish_nothing, End.FIN, False, ""),
        (finish_with_close, End.CLOSED, False, ""),
        (finish_with_close_and_more, End.PROTOCOL, True, "command 7 after CLOSE"),
        (finish_with_close_and_reset, End.RESET, True, ""),
        (finish_with_reset, End.RESET, True, ""),
        (finish_unread, End.RESET, True, ""),
        (finish_inside_a_header, End.PROTOCOL, True, ""),
        (finish_with_unknown_command, End.PROTOCOL, True, "unknown command 99"),
        (finish_with_absent_page, End.PROTOCOL, True, "no such page"),
        (finish_with_unknown_pid, End.CRASHED, True, "no such task"),
        (finish_with_page_that_is_not_lazy, End.STUCK, False, "no such page"),
    ],
)
async def test_ends(
    finish: Callable[[Client], Awaitable[None]], end: End, goes_on: bool, violation: str, tmp_path: Path
) -> None:
    server = PageServer(write_images(tmp_path / "images", SPEC))
    async with client_of(server) as client:
        await finish(client)
    assert (server.end, end.source_goes_on) == (end, goes_on)
    assert any(violation in said for said in server.violations) if violation else not server.violations


async def test_short_answers_differ_and_never_exceed(tmp_path: Path) -> None:
    server = PageServer(write_images(tmp_path / "images", SPEC), Behaviour(short=3, max_pages=8))
    async with client_of(server) as client:
        found = set()
        for _ in range(50):
            await client.get(32, AREA_BASE)
            nr, pages = await client.answer()
            assert pages == b"".join(SPEC.page(0, n) for n in range(nr))
            found.add(nr)
    assert found == set(range(1, 9))


async def test_delay_is_latency_not_throughput(tmp_path: Path) -> None:
    server = PageServer(write_images(tmp_path / "images", SPEC), Behaviour(delay=0.05))
    async with client_of(server) as client:
        start = trio.current_time()
        for n in range(20):
            await client.get(1, AREA_BASE + n * PAGE)
        await client.answer()
        first = trio.current_time() - start
        for _ in range(19):
            await client.answer()
        assert first >= 0.05
        assert trio.current_time() - start < 20 * 0.05


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("after", [0, 10, 32, 32 + 100, 2 * (32 + PAGE)])
async def test_cut(how: Literal["fin", "reset"], after: int, tmp_path: Path) -> None:
    server = PageServer(write_images(tmp_path / "images", SPEC), Behaviour(cut_after=after, cut_with=how))
    async with client_of(server) as client:
        # all at once: the first answer may be the last
        gets = [frame(client.frame_size, GET, 1, AREA_BASE + n * PAGE, 100) for n in range(4)]
        await client.stream.send_all(b"".join(gets))
        got = b""
        with contextlib.ExitStack() as stack:
            if how == "reset":
                stack.enter_context(pytest.raises(trio.BrokenResourceError))
            while data := await client.stream.receive_some():
                got += data
        # a reset may overtake what was sent before it
        assert len(got) == after if how == "fin" else len(got) <= after
    assert server.end is End.CUT


async def test_silence(tmp_path: Path) -> None:
    server = PageServer(write_images(tmp_path / "images", SPEC), Behaviour(silent_after=32 + PAGE + 7))
    async with client_of(server) as client:
        await client.get(1, AREA_BASE)
        await client.get(1, AREA_BASE)
        await client.exactly(32 + PAGE + 7)
        with trio.move_on_after(0.02) as silent:
            await client.stream.receive_some()
        assert silent.cancelled_caught
        await client.reset()
    assert server.end is End.RESET


@pytest.mark.parametrize(
    ("wrong", "header"),
    [
        ("command", (4 << 16 | GET, 2, AREA_BASE, 100)),
        ("flags", (ADD_F, 2, AREA_BASE, 100)),
        ("count", (PRESENT_ADD_F, 3, AREA_BASE, 100)),
        ("zero", (PRESENT_ADD_F, 0, AREA_BASE, 100)),
        ("address", (PRESENT_ADD_F, 2, AREA_BASE + PAGE, 100)),
        ("id", (PRESENT_ADD_F, 2, AREA_BASE, 101)),
    ],
)
async def test_wrong_headers(wrong: Wrong, header: tuple[int, ...], tmp_path: Path) -> None:
    server = PageServer(write_images(tmp_path / "images", SPEC), Behaviour(wrong=wrong, wrong_at=1))
    async with client_of(server) as client:
        await client.get(2, AREA_BASE)
        await client.get(2, AREA_BASE)
        assert await client.header() == (PRESENT_ADD_F, 2, AREA_BASE, 100)
        await client.exactly(2 * PAGE)
        assert await client.header() == header
