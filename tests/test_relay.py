"""A relay between a source that behaves as a live one does and our daemon: who decides what becomes of it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._uffd.pager_linux import Link
from criupy.errors import PageServerError
from criupy.images import RelayMarker, read_marker, write_marker
from criupy.page_server import Config as ServerConfig
from criupy.page_server import Fate, PageServer, Relay, RelayConfig, open_relay
from criupy.page_server._control_linux import ABORT, SOCKET_NAME, ask
from criupy.testing.certificates import Certificates
from criupy.testing.control_linux import Order
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.link_linux import Conditions, Event, Loss, open_link, random_cuts
from criupy.testing.link_linux import Link as TheLink
from criupy.testing.page_server import Behaviour
from criupy.testing.page_server import PageServer as Source
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.wire.extension import Hello, Lane, Refusal
from criupy.wire.page_server import Command, Frame
from page_server_clients import CLOSE, GET, Destination
from parents import give_to_parents, lazily, nr_dirty
from serving import MIB, Serving, all_good, serve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

SPEC = WorkloadSpec(size=16 * MIB, areas=2, tree=2)
SMALL = WorkloadSpec(size=1 * MIB)


@dataclass(slots=True, eq=False)
class Relayed:
    images: WrittenImages
    source: Source
    server: PageServer
    relay: Relay
    link: TheLink
    room: Path

    @property
    def goes_on(self) -> bool:
        """Whether the source has been told to go on; it must have been told something."""
        assert self.source.end is not None
        return self.source.end.source_goes_on

    def daemon(self, **config: Any) -> contextlib.AbstractAsyncContextManager[Serving]:
        return serve(
            self.room,
            self.images.spec,
            images=self.images,
            style="full",
            page_server=(self.link.address, self.link.port),
            **config,
        )

    def connect(self) -> Destination:
        return Destination(socket.create_connection((self.server.address, self.server.port)))

    async def abort(self) -> str:
        return await trio.to_thread.run_sync(ask, self.room / "relay" / SOCKET_NAME, ABORT, 30.0)


@contextlib.asynccontextmanager
async def relayed(
    room: Path,
    *,
    spec: WorkloadSpec = SPEC,
    conditions: Conditions | None = None,
    script: tuple[Event, ...] = (),
    behaviour: Behaviour | None = None,
    certificates: Certificates | None = None,
    count: Any = "new",
    pre_dumped: bool = False,
    **relay: Any,
) -> AsyncIterator[Relayed]:
    """Run source, relay and link; `pre_dumped`: the source has a quarter, and parents the rest."""
    images = write_images(room / "images", spec, style="lazy", count=count)
    if pre_dumped:
        images = give_to_parents(images)
    (room / "relay").mkdir()
    source = Source(images, behaviour or Behaviour())
    tls = None if certificates is None else certificates.files("server")
    async with trio.open_nursery() as nursery:
        await nursery.start(source.run)
        config = RelayConfig((source.address, source.port), work_dir=room / "relay", **relay)
        async with (
            open_relay(ServerConfig(images.directory, tls=tls), config) as (server, kept),
            open_link((server.address, server.port), conditions, script) as link,
        ):
            yield Relayed(lazily(images) if pre_dumped else images, source, server, kept, link, room)
            server.stop()
        await source.ended.wait()
    assert source.violations == []


# ---- all goes well ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["old", "new"])
@pytest.mark.parametrize("config", [{}, {"lanes": 1}, {"extended": False}], ids=["two", "one", "stock"])
async def test_every_page_comes_through(room: Path, count: str, config: dict[str, Any]) -> None:
    async with relayed(room, count=count) as r, r.daemon(**config) as s, s.restore(early=4) as standin:
        for task in range(SPEC.tree):
            standin.worker(task).start_touching(Order.RANDOM, count=500)
        await standin.finish()
        assert standin.early_result_is_good
        for task in range(SPEC.tree):
            assert (await standin.worker(task).wait()).is_good
        await all_good(standin)
        await s.daemon.wait()
        assert await r.relay.wait() is Fate.CLOSED
        assert not r.goes_on
        assert r.link.connected == 2 - bool(config)


async def test_a_cache_that_is_smaller_than_the_memory(room: Path) -> None:
    async with relayed(room, cache=1 * MIB) as r, r.daemon() as s, s.restore() as standin:
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()
        assert await r.relay.wait() is Fate.CLOSED
        assert r.relay.last.pages_kept <= MIB // 4096


@pytest.mark.parametrize("lanes", [1, 2])
async def test_over_pre_dumps_and_ten_cuts(lanes: int, room: Path) -> None:
    """The relay is asked for what its source has, and nothing else."""
    script = random_cuts(5, nr=10, within=SPEC.tree * SPEC.size * 3 // 16, down=0.02)
    async with (
        relayed(room, script=script, pre_dumped=True) as r,
        r.daemon(reconnect=20.0, link_timeout=0.25, lanes=lanes) as s,
        s.restore(early=4) as standin,
    ):
        for task in range(SPEC.tree):
            standin.worker(task).start_touching(Order.RANDOM, count=500)
        await standin.finish()
        for task in range(SPEC.tree):
            assert (await standin.worker(task).wait()).is_good
        await all_good(standin)
        done = await s.daemon.wait()
        assert await r.relay.wait() is Fate.CLOSED
        assert not r.goes_on
        assert r.link.cuts == 10
    assert done.local_received == done.local_total == done.pages_total - nr_dirty(r.images)
    assert r.relay.last.pages_total == nr_dirty(r.images)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_twenty_cuts(secure: bool, room: Path, certificates: Certificates) -> None:
    script = random_cuts(3, nr=20, within=SPEC.tree * SPEC.size * 3 // 4, down=0.02)
    tls = {"tls": certificates.files("client")} if secure else {}
    async with (
        relayed(room, script=script, certificates=certificates if secure else None) as r,
        r.daemon(reconnect=20.0, link_timeout=0.25, **tls) as s,
        s.restore() as standin,
    ):
        standin.worker().start_touching(Order.RANDOM, count=500)
        await standin.finish()
        assert (await standin.worker().wait()).is_good
        await all_good(standin)
        assert (await s.daemon.wait()).pages_missing == 0
        assert await r.relay.wait() is Fate.CLOSED
        assert not r.goes_on
        assert r.link.cuts == 20


async def test_the_end_is_told_again_when_it_was_lost(room: Path) -> None:
    """The link is lost when every page is there, and CLOSE is on its way."""
    async with (
        relayed(room, spec=SMALL, conditions=Conditions(delay=0.1)) as r,
        r.daemon(reconnect=20.0) as s,
        s.restore() as d,
    ):
        await d.finish()
        await until(lambda: s.daemon.statistics().drain is not None)
        r.link.conditions = Conditions()
        r.link.cut(Loss.RST)
        await all_good(d)
        await s.daemon.wait()
        assert await r.relay.wait() is Fate.CLOSED
        assert not r.goes_on


# ---- it does not -----------------------------------------------------------------------------------------


async def test_a_stop_before_restore_finished_lets_the_source_go_on(room: Path) -> None:
    async with relayed(room) as r, r.daemon() as s, s.restore(early=4):
        await s.handed_over()
        s.daemon.stop()
        assert "a live source goes on" in await s.failure()
        assert await r.relay.wait() is Fate.RESUMED
        assert r.goes_on


async def test_so_does_one_while_the_link_is_lost(room: Path) -> None:
    async with relayed(room) as r, r.daemon(reconnect=20.0) as s, s.restore(early=4):
        await s.handed_over()
        r.link.cut(Loss.RST, down=0.3)
        s.daemon.stop()
        assert "a live source goes on" in await s.failure()
        assert await r.relay.wait() is Fate.RESUMED
        assert r.goes_on


async def test_a_relay_that_cannot_be_told_keeps_the_source(room: Path) -> None:
    async with relayed(room) as r:
        async with r.daemon(connect_timeout=0.3) as s, s.restore(early=4):
            await s.handed_over()
            r.link.cut(Loss.RST, down=1000.0)
            s.daemon.stop()
            story = await s.failure()
            assert "the relay could not be told" in story
            assert "--abort" in story
        assert r.relay.fate is Fate.HELD
        assert r.source.end is None
        assert await r.abort() == "the source goes on"
        assert await r.relay.wait() is Fate.RESUMED
        assert r.goes_on
        with pytest.raises(PageServerError, match="no relay is there"):
            await r.abort()


async def test_a_relay_that_has_decided_is_understood(room: Path) -> None:
    """What it answers then is a refusal, and no status; the source goes on, whoever wanted it first."""
    async with relayed(room) as r, r.daemon(reconnect=20.0) as s, s.restore(early=4):
        await s.handed_over()
        await r.abort()
        s.daemon.stop()
        story = await s.failure()
        assert "has ended, or goes on, by somebody's decision" in story
        assert "frozen" not in story


async def test_killed_tasks_let_it_go_on(room: Path) -> None:
    async with (
        relayed(room, conditions=Conditions(bandwidth=1e6)) as r,
        r.daemon(on_failure="kill") as s,
        s.restore() as standin,
    ):
        await standin.finish()
        await s.transferring()
        s.daemon.stop()
        s.daemon.stop()
        assert "a live source goes on" in await s.failure()
        assert await r.relay.wait() is Fate.RESUMED
        assert r.goes_on


async def test_an_operator_s_abort_ends_tasks_that_run(room: Path) -> None:
    """They are killed and not poisoned, since the source goes on."""
    async with (
        relayed(room, conditions=Conditions(bandwidth=1e6)) as r,
        r.daemon(reconnect=5.0) as s,
        s.restore() as standin,
    ):
        await standin.finish()
        await s.transferring()
        assert await r.abort() == "the source goes on"
        assert r.goes_on
        r.link.conditions = Conditions()
        assert "the tasks were killed" in await s.failure()


async def test_also_those_that_have_everything(room: Path) -> None:
    """The decision and the destination's CLOSE cross on the way."""
    async with (
        relayed(room, spec=SMALL, conditions=Conditions(delay=0.1)) as r,
        r.daemon() as s,
        s.restore() as standin,
    ):
        await standin.finish()
        await until(lambda: s.daemon.statistics().drain is not None)
        await r.relay.abort("an operator decided so")
        assert r.goes_on
        story = await s.failure()
        assert "every page arrived, but the source goes on" in story
        assert "the tasks were killed" in story
        assert (await standin.wait()).signal == 9


async def test_poisoned_ones_end_it(room: Path) -> None:
    async with (
        relayed(room, conditions=Conditions(bandwidth=1e6)) as r,
        r.daemon() as s,
        s.restore() as standin,
    ):
        await standin.finish()
        await s.transferring()
        r.link.conditions = Conditions()
        s.daemon.stop()
        s.daemon.stop()
        await s.failure()
        assert await r.relay.wait() is Fate.CLOSED
        assert not r.goes_on


@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_source_that_is_lost_is_told_of(how: Literal["fin", "reset"], room: Path) -> None:
    # Read-ahead stops before that as long as nobody takes anything.
    behaviour = Behaviour(cut_after=4 * MIB, cut_with=how)
    async with (
        relayed(room, cache=MIB, behaviour=behaviour) as r,
        r.daemon(reconnect=20.0) as s,
        s.restore() as standin,
    ):
        await standin.finish()
        assert "the relay has lost the source" in await s.failure()
        assert await r.relay.wait() is Fate.LOST


@pytest.mark.parametrize("when", ["before", "while"])
async def test_a_source_that_says_nothing_more_stays_frozen_until_the_tasks_are_gone(
    room: Path, when: str
) -> None:
    """Our end of its connection must not become a reset by itself: tasks run at the destination.

    Whether the destination is told that there are no more pages, or just loses its connection.
    """
    async with (
        relayed(room, behaviour=Behaviour(silent_after=4 * MIB), link_timeout=0.3) as r,
        r.daemon(on_failure="kill", link_timeout=5.0) as s,
        s.restore() as standin,
    ):
        if when == "before":
            await until(lambda: r.relay.snapshot().link is Link.LOST)
        await standin.finish()
        await until(lambda: r.relay.snapshot().link is Link.LOST)
        assert r.source.end is None
        assert r.relay.fate is Fate.HELD
        await s.failure()
        assert await r.relay.wait() is Fate.RESUMED
        assert r.goes_on


async def test_the_hold_timeout(room: Path) -> None:
    async with relayed(room, hold_timeout=0.5) as r:
        with r.connect() as stock:
            task = r.images.tasks[0]
            await trio.to_thread.run_sync(stock.get, task.pid, task.runs[0].start)
            await trio.sleep(1.0)
            assert r.relay.fate is Fate.HELD
        assert await r.relay.wait() is Fate.RESUMED
        assert r.goes_on


async def test_nor_does_it_end_what_may_have_everything(room: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every page was given, and the end of the session was lost: the destination may run."""
    async with relayed(room, spec=SMALL, hold_timeout=1.5, conditions=Conditions(delay=0.1)) as r:
        async with r.daemon(link_timeout=1.0, connect_timeout=0.3) as s, s.restore() as standin:
            await standin.finish()
            await until(lambda: s.daemon.statistics().drain is not None)
            r.link.cut(Loss.RST, down=1000.0)
            await all_good(standin)
            await s.daemon.wait()
        await until(lambda: "was given every page" in caplog.text)
        assert r.relay.fate is Fate.HELD
        assert r.source.end is None
        await r.abort()


async def test_a_daemon_that_could_be_too_late_is_told(room: Path) -> None:
    async with (
        relayed(room, hold_timeout=10.0) as r,
        r.daemon(reconnect=6.5, link_timeout=1.0) as s,
        s.restore(),
    ):
        assert "or two may run" in await s.failure()


# ---- who else comes --------------------------------------------------------------------------------------


async def test_a_second_destination_is_refused(room: Path, tmp_path: Path) -> None:
    async with relayed(room) as r, r.daemon() as s, s.restore(early=4) as standin:
        await s.handed_over()
        (tmp_path / "other" / "work").mkdir(parents=True)
        async with (
            serve(
                tmp_path / "other",
                SPEC,
                images=r.images,
                style="full",
                page_server=(r.link.address, r.link.port),
            ) as other,
            other.restore(early=4),
        ):
            assert "serves another restore" in await other.failure()
        with r.connect() as stock:
            stock.send(GET, 1, r.images.tasks[0].runs[0].start, r.images.tasks[0].pid)
            assert await trio.to_thread.run_sync(stock.is_over)
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()
        assert await r.relay.wait() is Fate.CLOSED


async def test_a_wrong_key_is_refused(room: Path) -> None:
    async with relayed(room) as r:
        key = read_marker(r.images.directory)
        assert key is not None
        write_marker(r.images.directory, RelayMarker(bytes(32), None))
        async with r.daemon() as s, s.restore(early=4):
            assert "does not know the marker" in await s.failure()
        assert not r.relay.session.is_taken
        assert r.relay.fate is Fate.HELD


async def test_what_was_overheard_is_refused(room: Path) -> None:
    async with relayed(room) as r, r.daemon() as s, s.restore(early=4) as standin:
        await s.handed_over()
        marker = read_marker(r.images.directory)
        await until(lambda: r.relay.session.name is not None)
        name = r.relay.session.name
        assert marker is not None
        assert name is not None
        with r.connect() as client:
            client.sock.sendall(Hello(name, Lane.BULK, 1).encode(marker.key))
            told = await trio.to_thread.run_sync(client.receive, 32)
            assert Frame.decode(told, 32) == Frame(Command.REFUSED, Refusal.REPLAYED)
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()
        assert await r.relay.wait() is Fate.CLOSED


async def test_who_only_connects_takes_nothing(room: Path) -> None:
    async with relayed(room) as r:
        with r.connect():
            pass
        async with r.daemon() as s, s.restore() as standin:
            await standin.finish()
            await all_good(standin)
            await s.daemon.wait()


async def test_a_close_without_a_page_is_passed_on_with_a_warning(
    room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with relayed(room) as r:
        with r.connect() as stock:
            assert await trio.to_thread.run_sync(stock.close, CLOSE) == 0
        assert await r.relay.wait() is Fate.CLOSED
        assert not r.goes_on
    assert "never asked for a page" in caplog.text


async def test_without_a_destination_the_source_goes_on_at_the_end(room: Path) -> None:
    async with relayed(room) as r:
        pass
    assert r.relay.fate is Fate.RESUMED
    assert r.goes_on


# ---- the spool -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
async def test_the_source_ends_with_the_spool(room: Path, early: bool) -> None:
    """With the restore finished, or without one; the destination is served on either way."""
    async with relayed(
        room, spool=room / "spool", close_when_spooled=early, conditions=Conditions(bandwidth=20e6)
    ) as r:
        if early:
            assert await r.relay.wait() is Fate.CLOSED
        async with r.daemon() as s, s.restore() as standin:
            await until(lambda: r.relay.is_spooled)
            assert (r.relay.fate is Fate.HELD) is not early
            await standin.finish()
            assert await r.relay.wait() is Fate.CLOSED
            assert not r.goes_on
            r.link.conditions = Conditions()
            await all_good(standin)
            await s.daemon.wait()
