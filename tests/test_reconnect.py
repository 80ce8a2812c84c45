"""A link that is lost again and again between our ends: no page is lost, none is wrong, no task is killed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy.page_server import Config as ServerConfig
from criupy.page_server import PageServer, open_page_server
from criupy.testing.certificates import Certificates
from criupy.testing.control_linux import Order
from criupy.testing.images import write_images
from criupy.testing.link_linux import Conditions, Cut, Event, Link, Loss, open_link, random_cuts
from criupy.testing.spec import WorkloadSpec
from page_server_command import command
from serving import MIB, Serving, all_good, needs_poison, serve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

SPEC = WorkloadSpec(size=16 * MIB, areas=2, tree=2)


@contextlib.asynccontextmanager
async def linked(
    room: Path,
    conditions: Conditions | None = None,
    script: tuple[Event, ...] = (),
    *,
    certificates: Certificates | None = None,
    spec: WorkloadSpec = SPEC,
    **config: Any,
) -> AsyncIterator[tuple[PageServer, Link, Serving]]:
    """Serve full images by a page server of ours, to a daemon of ours, with a link between."""
    images = write_images(room / "images", spec, style="full")
    tls = {} if certificates is None else {"tls": certificates.files("client")}
    theirs = None if certificates is None else certificates.files("server")
    async with (
        open_page_server(ServerConfig(images.directory, tls=theirs)) as server,
        open_link((server.address, server.port), conditions, script) as link,
        serve(
            room,
            spec,
            images=images,
            style="full",
            page_server=(link.address, link.port),
            **{"reconnect": 20.0, "link_timeout": 0.25, **tls, **config},
        ) as serving,
    ):
        yield server, link, serving


@pytest.mark.parametrize(("seed", "secure"), [(0, False), (1, True)], ids=["plain", "tls"])
async def test_twenty_cuts(seed: int, secure: bool, room: Path, certificates: Certificates) -> None:
    script = random_cuts(seed, nr=20, within=SPEC.tree * SPEC.size, down=0.02)
    async with (
        linked(room, script=script, certificates=certificates if secure else None) as (server, link, s),
        s.restore(early=4) as standin,
    ):
        for task in range(SPEC.tree):
            standin.worker(task).start_touching(Order.RANDOM, count=500)
        await standin.finish()
        assert standin.early_result_is_good
        for task in range(SPEC.tree):
            assert (await standin.worker(task).wait()).is_good
        await all_good(standin)
        done = await s.daemon.wait()
        assert done.pages_missing == 0
        # Silence may come so near the end that the close is all that it costs.
        assert link.cuts == 20
        assert server.statistics.endings["closed"] <= 1


async def test_tls_is_resumed(
    room: Path, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    script = random_cuts(2, nr=3, within=SPEC.tree * SPEC.size, how=[Loss.RST], down=0.02)
    async with linked(room, script=script, certificates=certificates) as (_, link, s), s.restore() as standin:
        await standin.finish()
        await all_good(standin)
        assert (await s.daemon.wait()).pages_missing == 0
        assert link.cuts == 3
    kinds = [line for line in caplog.messages if "TLSv1.3" in line and "criupy demo server" in line]
    assert [line.startswith("bulk lane: connected") for line in kinds] == [False, True, True, True]
    assert ["CN = criupy demo server, resumed" in line for line in kinds] == [False, True, True, True]
    accepted = [line for line in caplog.messages if "CN = criupy demo client" in line]
    assert [line.endswith(", resumed") for line in accepted] == [False, True, True, True]


async def test_a_page_server_that_wants_tls_is_not_tried_again(
    room: Path, certificates: Certificates
) -> None:
    images = write_images(room / "images", SPEC, style="full")
    config = ServerConfig(images.directory, tls=certificates.files("server"))
    async with (
        open_page_server(config) as server,
        serve(
            room,
            SPEC,
            images=images,
            style="full",
            page_server=(server.address, server.port),
            extended=True,
            reconnect=20.0,
        ) as s,
        s.restore(early=1),
    ):
        assert "the page server wants TLS: see --tls" in await s.failure()


async def test_a_stock_page_server_is_none_of_ours(room: Path) -> None:
    """It ends at a command that it does not know."""
    images = write_images(room / "images", SPEC, style="full")

    async def end(stream: trio.SocketStream) -> None:
        await stream.receive_some()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, end, [listener])
        address = listener.socket.getsockname()
        async with (
            serve(room, SPEC, images=images, style="full", page_server=address, extended=True) as s,
            s.restore(early=1),
        ):
            assert "is it a criupy-page-server, as --extended says?" in await s.failure()
        nursery.cancel_scope.cancel()


async def test_one_that_brings_nothing_is_not_asked_all_the_time(room: Path) -> None:
    """A proxy before a server that has died takes connections, and loses them."""
    async with linked(room, reconnect=1.0) as (_, link, s), s.restore(early=1):
        await s.handed_over()
        link.cut(Loss.RST, down=1000.0)
        before = link.connected
        assert "could not be reached again" in await s.failure()
        assert link.connected - before < 10


@pytest.mark.parametrize("how", Loss)
async def test_cuts_of_each_kind(how: Loss, room: Path) -> None:
    script = random_cuts(1, nr=5, within=SPEC.tree * SPEC.size, how=[how])
    async with linked(room, script=script) as (_, link, s), s.restore() as standin:
        await standin.finish()
        await all_good(standin)
        assert (await s.daemon.wait()).pages_missing == 0
        assert link.cuts == 5


async def test_byte_by_byte(room: Path) -> None:
    spec = WorkloadSpec(size=32 << 10)
    async with linked(room, Conditions(piece=1), spec=spec) as (_, _, s), s.restore() as standin:
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()


@pytest.mark.parametrize("extended", [None, True], ids=["one lane", "two lanes"])
async def test_a_page_server_that_is_killed_and_started_again(room: Path, extended: bool | None) -> None:
    images = write_images(room / "images", SPEC, style="full")
    (room / "first").mkdir()
    (room / "second").mkdir()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(command(images.directory, room / "first"))
        async with (
            open_link((first.address, first.port), Conditions(bandwidth=10e6)) as link,
            serve(
                room,
                SPEC,
                images=images,
                style="full",
                page_server=(link.address, link.port),
                reconnect=20.0,
                extended=extended,
            ) as s,
            s.restore() as standin,
        ):
            await standin.finish()
            await link.reached(4 * MIB)
            first.process.kill()
            await trio.to_thread.run_sync(first.process.wait)
            await trio.sleep(0.3)
            stack.enter_context(command(images.directory, room / "second", "--port", str(link.target[1])))
            link.conditions = Conditions()
            await all_good(standin)
            assert (await s.daemon.wait()).pages_missing == 0
            assert link.connected > 2  # it tried while nobody was there


@needs_poison
async def test_one_that_does_not_come_back(room: Path) -> None:
    async with (
        linked(room, Conditions(bandwidth=10e6), reconnect=0.5) as (server, link, s),
        s.restore() as standin,
    ):
        await standin.finish()
        await link.reached(4 * MIB)
        link.cut(Loss.RST, down=100)
        assert "could not be reached again within 0.5 s" in (told := await s.failure())
        assert "missing pages were poisoned" in told
        server.stop()


async def test_a_loss_before_the_restore_has_finished(room: Path) -> None:
    script = (Event(64 << 10, Cut(Loss.RST)),)
    async with linked(room, script=script) as (_, link, s), s.restore(early=64) as standin:
        await standin.wait_registered()
        with trio.fail_after(10):
            while not link.cuts:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()


@pytest.mark.parametrize("stops", [1, 2])
async def test_a_stop_while_it_is_lost(stops: int, room: Path) -> None:
    async with (
        linked(room, Conditions(bandwidth=10e6), stop_timeout=30.0) as (_, link, s),
        s.restore() as standin,
    ):
        await standin.finish()
        await link.reached(4 * MIB)
        link.cut(Loss.RST, down=0.5)
        link.conditions = Conditions()
        await trio.sleep(0.1)
        for _ in range(stops):
            s.daemon.stop()
        if stops == 2:
            assert "stopped at the second request" in await s.failure()
        else:
            await all_good(standin)
            await s.daemon.wait()


async def test_a_source_that_cannot_be_reached_again(room: Path) -> None:
    async with serve(room, reconnect=5.0) as s:
        told = await s.failure()
        assert "these images are of a lazy dump, whose source serves one connection" in told


async def test_images_that_have_changed_are_no_reason_to_wait_for_ever(room: Path) -> None:
    async with (
        linked(room, Conditions(bandwidth=10e6), reconnect=0.5) as (server, link, s),
        s.restore() as standin,
    ):
        await standin.finish()
        await link.reached(4 * MIB)
        pages = s.images.tasks[0].pages
        await trio.to_thread.run_sync(partial(pages.touch))
        assert "could not be reached again" in await s.failure()
        assert server.statistics.endings["changed"] > 1
