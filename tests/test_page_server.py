"""The page server on trio: whom it serves, what it says of them, and how it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import pydoc
import resource
import socket
from collections.abc import AsyncIterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

import trio.lowlevel

from criupy import page_server
from criupy.errors import ImageError, PageServerError
from criupy.page_server import Config, Ending, PageServer
from criupy.page_server._access import household
from criupy.page_server._images import load_tasks
from criupy.page_server._serving_linux import serve_tasks
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.spec import WorkloadSpec
from page_server_clients import GET, PAGE, Destination, frame, loopback

pytestmark = pytest.mark.usefixtures("nothing_is_left")

A = 0x10_0000_0000


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> WrittenImages:
    return write_images(tmp_path_factory.mktemp("images"), WorkloadSpec(size=64 * PAGE), style="full")


def connect(server: PageServer, frame_size: int = 32) -> Destination:
    return Destination(socket.create_connection((server.address, server.port)), frame_size)


async def get(destination: Destination, nr_pages: int = 1) -> bytes:
    return await trio.to_thread.run_sync(destination.get, 100, A, nr_pages)


async def close(destination: Destination) -> int:
    return await trio.to_thread.run_sync(destination.close)


async def is_over(destination: Destination) -> bool:
    return await trio.to_thread.run_sync(destination.is_over)


@contextlib.asynccontextmanager
async def serving(images: WrittenImages, **settings: object) -> AsyncIterator[PageServer]:
    config = Config(images.directory, **settings)  # type: ignore[arg-type]
    async with page_server.open_page_server(config) as server:
        yield server


async def until_connected(server: PageServer, nr: int) -> None:
    while len(server.connections()) != nr:  # noqa: ASYNC110
        await trio.sleep(0.01)


async def test_serving_and_stopping(images: WrittenImages, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "criupy.page_server")
    async with serving(images) as server:
        assert server.address == "127.0.0.1"
        with connect(server) as first, connect(server, 24) as second:
            assert await get(first, 64) == await get(second, 64)
            await until_connected(server, 2)
            assert [account.pages for account in server.connections()] == [64, 64]
            server.stop()
            with trio.move_on_after(0.1) as scope:
                await server.wait()
            assert scope.cancelled_caught  # for two are connected
            with pytest.raises(ConnectionRefusedError):
                connect(server)
            assert await close(first) == 0
            assert await close(second) == 0
            await server.wait()
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == f"{images.directory}: 64 lazy pages"
    assert sum(" has ended, 64 pages for 2 requests in " in line for line in told) == 2


async def test_leaving_the_block_cuts(images: WrittenImages) -> None:
    async with serving(images) as server:
        destination = connect(server)
        await get(destination)
    with destination:
        assert await is_over(destination)


async def test_once(images: WrittenImages) -> None:
    async with serving(images, once=True) as server:
        with connect(server) as destination:
            await get(destination)
            while server._accepts:  # noqa: ASYNC110
                await trio.sleep(0.01)
            with pytest.raises(ConnectionRefusedError):
                connect(server)
            assert await close(destination) == 0
        await server.wait()
        assert server.last is not None
        assert (server.last.ending, server.last.pages) == (Ending.CLOSED, 1)


async def test_once_is_not_for_those_who_ask_for_nothing(images: WrittenImages) -> None:
    async with serving(images, once=True) as server:
        connect(server).sock.close()
        with connect(server) as silent, connect(server) as lost, connect(server) as wrong:
            lost.sock.sendall(b"GET / HTTP/1.1\r\nHost: there\r\n\r\n")
            assert await is_over(lost)
            wrong.send(GET, 1, A - PAGE, 100)
            assert await is_over(wrong)
            with connect(server) as destination:
                await get(destination, 2)
                assert await is_over(silent)
                assert await close(destination) == 0
            await server.wait()
        assert server.last is not None
        assert (server.last.ending, server.last.pages) == (Ending.CLOSED, 2)
        assert dict(server.statistics.endings) == {"eof": 1, "command": 1, "page": 1, "cut": 1, "closed": 1}


async def test_once_among_many_that_connect(images: WrittenImages) -> None:
    """At the moment of the choice, too: nobody stays that would be waited for."""
    socks: list[socket.socket] = []

    async def probe(server: PageServer) -> None:
        with contextlib.suppress(OSError):
            while True:
                socks.append(sock := socket.socket())
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect((server.address, server.port))
                await trio.lowlevel.checkpoint()

    try:
        for _ in range(10):
            async with (
                serving(images, once=True, max_connections=10000) as server,
                trio.open_nursery() as nursery,
            ):
                with connect(server) as destination:
                    nursery.start_soon(probe, server)
                    await get(destination)
                    assert await close(destination) == 0
                with trio.fail_after(10):
                    await server.wait()
                nursery.cancel_scope.cancel()
            for sock in socks:
                sock.close()
    finally:
        for sock in socks:
            sock.close()


async def test_once_for_one_that_needs_no_page(images: WrittenImages) -> None:
    async with serving(images, once=True) as server:
        with connect(server) as destination:
            assert await close(destination) == 0
        await server.wait()
        assert server.last is not None
        assert server.last.ending is Ending.CLOSED


async def test_only_so_many(images: WrittenImages, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(images, max_connections=2) as server:
        with connect(server) as first, connect(server) as second:
            await get(first)
            await get(second)
            with connect(server) as third:
                assert await is_over(third)
            assert "refused, 2 are connected already" in caplog.text
            assert await close(first) == 0
            await until_connected(server, 1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            with connect(server) as fourth:
                await get(fourth)


async def test_one_address_does_not_take_all(images: WrittenImages, caplog: pytest.LogCaptureFixture) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(images, max_connections=10))
        for _ in range(5):
            await get(stack.enter_context(connect(server)))
        with connect(server) as sixth:
            assert await is_over(sixth)
        assert "refused, 5 from its address are connected already, which is what one may have" in caplog.text
        other = socket.create_connection((server.address, server.port), source_address=("127.0.0.2", 0))
        with Destination(other) as destination:
            await get(destination)


async def test_who_may(images: WrittenImages, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(images, allow=(ip_network("10.0.0.0/8"), ip_network("127.0.0.2/32"))) as server:
        with connect(server) as stranger:
            assert await is_over(stranger)
        assert ": refused, it is in no network that is allowed" in caplog.text
        friend = socket.create_connection((server.address, server.port), source_address=("127.0.0.2", 0))
        with Destination(friend) as destination:
            await get(destination)


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
async def test_a_warning_where_all_can_reach_it(
    images: WrittenImages, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    async with serving(images, address=address) as server:
        assert (
            "whoever reaches it is given the memory of these processes, in clear text; --allow" in caplog.text
        )
        with Destination(socket.create_connection(("127.0.0.1", server.port))) as destination:
            await get(destination)
    caplog.clear()
    async with serving(images, address=address, allow=(ip_network("127.0.0.0/8"),)) as server:
        assert not caplog.records
        with Destination(socket.create_connection(("127.0.0.1", server.port))) as destination:
            await get(destination)  # mapped into IPv6, for "::"


async def test_one_line_for_one_that_breaks_the_rules(
    images: WrittenImages, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(images) as server:
        with connect(server) as good, connect(server) as bad:
            await get(good)
            bad.send(GET, 3, A - PAGE, 100)
            assert await is_over(bad)
            while not caplog.records:  # noqa: ASYNC110
                await trio.sleep(0.01)
            await get(good)
            (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("connection 1: 127.0.0.1:")
    assert (
        ": GET of 3 pages at 0xffffff000 of process 100: that is no lazy page of it, byte 0; closed after "
        in (record.getMessage())
    )


async def test_descriptors_run_out(images: WrittenImages, caplog: pytest.LogCaptureFixture) -> None:
    """Who is connected notices nothing, and who is not waits."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving(images) as server:
        with connect(server) as first, socket.socket() as late:
            await get(first)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            try:
                late.connect((server.address, server.port))
                while "cannot be accepted: Too many open files" not in caplog.text:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                await get(first)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            await get(Destination(late))


async def test_what_cannot_be_served(images: WrittenImages, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"inventory\.img"):
        async with page_server.open_page_server(Config(tmp_path)):
            pass
    lazy = write_images(tmp_path / "lazy", WorkloadSpec(size=4 * PAGE))
    with pytest.raises(ImageError, match="this is a lazy dump, whose source serves them itself"):
        async with serving(lazy):
            pass
    with pytest.raises(PageServerError, match=r"^192\.0\.2\.1:0: .*; see --address and --port$"):
        async with serving(images, address="192.0.2.1"):
            pass
    with pytest.raises(PageServerError, match=r"^no-such\.invalid:0: no such address "):
        async with serving(images, address="no-such.invalid"):
            pass
    async with serving(images) as server:
        with pytest.raises(PageServerError, match="Address already in use"):
            async with serving(images, port=server.port):
                pass


async def test_cutting(images: WrittenImages) -> None:
    async with serving(images) as server:
        with connect(server) as first, connect(server) as second:
            await get(first, 2)
            await get(second)
            server.stop()
            server.cut()
            await server.wait()
            server.cut()  # of nothing
            assert await is_over(first)
            assert await is_over(second)
        told = server.statistics
        assert (told.ended, told.refused, told.requests, told.pages) == (2, 0, 2, 3)
        assert dict(told.endings) == {"cut": 2}


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
async def test_an_inherited_connection_and_nothing_else(images: WrittenImages, family: int) -> None:
    ours, theirs = loopback() if family == socket.AF_INET else socket.socketpair()
    with Destination(ours) as destination:
        async with serving(images, connection=theirs) as server:
            assert (server.address, server.port) == ("", 0)
            assert await get(destination)
            assert await close(destination) == 0
            await server.wait()
            assert server.last is not None
            assert server.last.ending is Ending.CLOSED


async def test_an_inherited_connection_that_is_none(images: WrittenImages) -> None:
    with socket.socket() as unconnected:
        async with serving(images, connection=unconnected) as server:
            await server.wait()
            assert server.last is not None
            assert server.last.ending is Ending.ERROR


@pytest.mark.parametrize("where", ["in the block", "around it"])
async def test_what_is_cancelled_is_counted(where: str, images: WrittenImages) -> None:
    with trio.CancelScope() as scope:
        async with serving(images) as server:
            destination = connect(server)
            await get(destination, 2)
            if where == "around it":
                scope.cancel()
            with trio.move_on_after(0.01):
                await server.wait()
    destination.sock.close()
    assert dict(server.statistics.endings) == {"cut": 1}
    assert server.statistics.pages == 2


async def test_an_error_in_a_block_that_is_cancelled_is_raised(images: WrittenImages) -> None:
    with pytest.raises(ValueError, match="mine"), trio.CancelScope() as scope:
        async with serving(images):
            scope.cancel()
            raise ValueError("mine")


def test_help_has_what_is_public() -> None:
    shown = pydoc.plain(pydoc.render_doc(page_server))
    for name in page_server.__all__:
        assert f"    class {name}(" in shown or f"    {name}(" in shown, name


async def test_a_server_that_has_ended(images: WrittenImages) -> None:
    async with serving(images) as server:
        with connect(server) as destination:
            await get(destination)
            server.stop()
        await server.wait()
    server.stop()
    server.cut()
    await server.wait()
    assert server.connections() == []


async def test_a_destination_of_images_that_change(
    images: WrittenImages, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(images) as server:
        with connect(server) as destination:
            await get(destination)
            os.utime(images.tasks[0].pages)
            destination.send(GET, 1, A, 100)
            assert await is_over(destination)
        while not server.statistics.ended:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert "the images have changed since they were read; start the server anew; closed after" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 65536}, r"^port: expected 0 to 65535, not 65536$"),
        ({"max_connections": 0}, r"^max_connections: expected 1 or more, not 0$"),
        ({"stall_timeout": 0.0}, r"^stall_timeout: expected more than 0 seconds, not 0\.0$"),
        ({"idle_timeout": -1.0}, r"^idle_timeout: expected more than 0 seconds, not -1\.0$"),
        ({"stall_timeout": float("inf")}, r"^stall_timeout: expected more than 0 seconds, not inf$"),
        (
            {"allow": ("10.0.0.0/8",)},
            r"^allow: expected networks such as ipaddress\..*, not '10\.0\.0\.0/8'$",
        ),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Config(tmp_path, **settings)


def test_one_peer_by_its_address() -> None:
    assert household("192.0.2.1") == household("::ffff:192.0.2.1") != household("192.0.2.2")
    assert household("2001:db8::1") == household("2001:db8::2:3:4:5") != household("2001:db8:0:1::1")


def test_a_listener_of_another_family(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX) as listener,
        pytest.raises(ValueError, match=r"^listener: expected a socket of AF_INET or AF_INET6$"),
    ):
        Config(tmp_path, listener=listener)


async def test_images_that_change_before_they_are_served(tmp_path: Path) -> None:
    written = write_images(tmp_path / "images", WorkloadSpec(size=4 * PAGE), style="full")
    tasks = list(load_tasks(written.directory))
    await trio.sleep(0.02)
    with written.tasks[0].pages.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(ImageError, match="it has changed since its pagemap was read"):
        async with serve_tasks(Config(written.directory), tasks):
            pass


async def test_the_first_that_has_a_page_is_the_one_that_counts(images: WrittenImages) -> None:
    """Though it takes its time, and another is quicker."""
    large = write_images(images.directory.parent / "large", WorkloadSpec(size=64 << 20), style="full")
    async with serving(large, once=True) as server:
        with connect(server) as slow:
            slow.sock.sendall(
                b"".join(frame(32, GET, 1024, A + n % 8 * 1024 * PAGE, 100) for n in range(200))
            )
            await trio.to_thread.run_sync(slow.answer)
            while server._accepts:  # noqa: ASYNC110
                await trio.sleep(0.01)
            for _ in range(199):
                await trio.to_thread.run_sync(slow.answer)
            assert await close(slow) == 0
        await server.wait()
        assert server.last is not None
        assert server.last.pages == 200 * 1024


def test_a_listener_beside_a_connection(tmp_path: Path) -> None:
    ours, theirs = loopback()
    with ours, theirs, pytest.raises(ValueError, match=r"^expected a listener or a connection, or neither$"):
        Config(tmp_path, listener=ours, connection=theirs)
