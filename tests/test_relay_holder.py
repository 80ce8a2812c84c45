"""A relay whose second holder dies, on a host that can start no other: what its source must not learn."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._uffd.pager_linux import Link
from criupy.errors import PageServerError
from criupy.page_server import Config as ServerConfig
from criupy.page_server import Fate, PageServer, Relay, RelayConfig, _relay_linux, _twice_linux, open_relay
from criupy.page_server._control_linux import ABORT, SOCKET_NAME, ask
from criupy.page_server._held_linux import Holder
from criupy.testing.images import WrittenImages
from criupy.testing.link_linux import Loss, open_link
from criupy.testing.page_server import Behaviour, End
from criupy.testing.page_server import PageServer as Source
from criupy.testing.wait import until
from criupy.wire.extension import encode_plain
from criupy.wire.page_server import Command
from test_relay_ends import Ours, a_source

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

#: Long enough for what must not happen to happen.
QUIET = 0.3


@dataclass(slots=True)
class Host:
    """Whether a process can be started, and those that were."""

    is_full: bool = False
    started: list[int] = field(default_factory=list)

    def kill(self) -> None:
        os.kill(self.started[-1], signal.SIGKILL)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host()
    start = Holder.start

    def start_if_possible(holder: Holder) -> None:
        if host.is_full:
            raise PageServerError("the holder cannot be started: no more processes")
        start(holder)
        assert holder.pid is not None
        host.started.append(holder.pid)

    monkeypatch.setattr(Holder, "start", start_if_possible)
    for module in (_twice_linux, _relay_linux):
        monkeypatch.setattr(module, "RETRY", 0.02)
    yield host
    host.is_full = False


@dataclass(slots=True, eq=False)
class Relayed:
    images: WrittenImages
    server: PageServer
    relay: Relay

    async def connect(self, counter: int = 1) -> Ours:
        where = (self.server.address, self.server.port)
        return await trio.to_thread.run_sync(Ours, where, self.images, counter)

    async def get(self, client: Ours) -> None:
        first = self.images.tasks[0]
        await trio.to_thread.run_sync(client.get, first.pid, first.runs[0].start)


@contextlib.asynccontextmanager
async def relayed(
    images: WrittenImages, upstream: tuple[str, int], room: Path, **config: Any
) -> AsyncIterator[Relayed]:
    relay_config = RelayConfig(upstream, work_dir=room, **config)
    async with open_relay(ServerConfig(images.directory), relay_config) as (server, relay):
        yield Relayed(images, server, relay)


def at(source: Source) -> tuple[str, int]:
    return source.address, source.port


async def abort(room: Path) -> str:
    return await trio.to_thread.run_sync(ask, room / SOCKET_NAME, ABORT, 30.0)


async def lose_holder(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.is_full = True
    host.kill()
    await until(lambda: "the source has no second holder" in caplog.text)


async def test_a_destination_waits_for_another_holder(
    host: Host, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A page that was refused would cost its tasks; meanwhile a crash would let the source go on."""
    async with a_source(room) as (images, source):
        async with relayed(images, at(source), room) as r:
            with await r.connect() as client:
                await r.get(client)
            await lose_holder(host, caplog)
            with await r.connect(2) as client:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(r.get, client)
                    await trio.sleep(QUIET)
                    assert len(nursery.child_tasks) == 1
                    host.is_full = False
            assert "a second holder again" in caplog.text
            assert len(host.started) == 2
        assert r.relay.is_left
        await trio.sleep(QUIET)
        assert source.end is None
        assert await abort(room) == "the source goes on"


async def test_and_does_not_get_its_pages_when_an_operator_aborts_meanwhile(
    host: Host, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_source(room) as (images, source):
        async with relayed(images, at(source), room) as r:
            with await r.connect() as client:
                await r.get(client)
            await lose_holder(host, caplog)
            with await r.connect(2) as client:
                client.sock.sendall(encode_plain(Command.FINISHED))
                await until(lambda: r.relay.session.has_finished)
                assert await abort(room) == "the source goes on"
                assert (await trio.to_thread.run_sync(client.refusal)).name == "ENDED"
        assert source.end is End.RESET


@pytest.mark.parametrize("how", ["another", "abort", "hold-timeout"])
async def test_a_relay_that_stops_waits_for_a_holder(
    host: Host, room: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """The tasks run at the destination: with its only holder gone the source must not go on by itself."""
    config = {"hold_timeout": 1.0} if how == "hold-timeout" else {}
    async with a_source(room) as (images, source), trio.open_nursery() as nursery:
        async with relayed(images, at(source), room, **config) as r:
            with await r.connect() as client:
                await r.get(client)
                client.sock.sendall(encode_plain(Command.FINISHED))
                await until(lambda: r.relay.session.has_finished)
            await lose_holder(host, caplog)

            async def decide() -> None:
                await until(lambda: "cannot end before" in caplog.text)
                await trio.sleep(QUIET)
                assert source.end is None
                if how == "another":
                    host.is_full = False
                elif how == "abort":
                    assert await abort(room) == "the source goes on"

            nursery.start_soon(decide)
        if how == "another":
            assert r.relay.is_left
            await trio.sleep(QUIET)
            assert source.end is None
            await abort(room)
        else:
            assert r.relay.fate is Fate.RESUMED
            await source.ended.wait()
            assert source.end is End.RESET
            assert not (room / SOCKET_NAME).exists()


async def test_with_a_source_that_is_lost_it_waits_for_nobody(
    host: Host, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        a_source(room) as (images, source),
        open_link((source.address, source.port)) as link,
        relayed(images, (link.address, link.port), room) as r,
    ):
        with await r.connect() as client:
            await r.get(client)
            client.sock.sendall(encode_plain(Command.FINISHED))
            await until(lambda: r.relay.session.has_finished and r.relay.snapshot().complete)
            link.cut(Loss.RST)
            await until(lambda: r.relay.snapshot().link is Link.LOST)
        await lose_holder(host, caplog)
    assert r.relay.fate is Fate.LOST


async def test_a_source_that_says_nothing_more_is_ended_all_the_same(
    host: Host, room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The destination has all that it needs: the end of our own socket would let the source go on."""
    async with a_source(room, Behaviour(silent_after=1 << 20)) as (images, source):
        async with relayed(images, at(source), room, link_timeout=0.3) as r:
            with await r.connect() as client:
                await r.get(client)
                await until(lambda: r.relay.snapshot().link is Link.LOST)
                await lose_holder(host, caplog)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.to_thread.run_sync, client.say, Command.CLOSE)
                    await trio.sleep(QUIET)
                    assert not source.ended.is_set()
                    host.is_full = False
            assert await r.relay.wait() is Fate.CLOSED
        await source.ended.wait()
        assert source.end is not None
        assert not source.end.source_goes_on


async def test_a_host_that_starts_no_thread_either(
    host: Host, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sync = trio.to_thread.run_sync

    async def refuse(work: Any, *args: Any) -> Any:
        if getattr(work, "__self__", None).__class__ is _twice_linux.HeldTwice:
            raise RuntimeError("can't start new thread")
        return await run_sync(work, *args)

    async with a_source(room) as (images, source), relayed(images, at(source), room) as r:
        monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
        with await r.connect() as client:
            await r.get(client)
            await r.relay.abort("that is all")
    assert len(host.started) == 1


async def test_a_relay_that_has_no_descriptor_left(host: Host) -> None:
    """It looks again later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        await _twice_linux._exit_of(os.getpid())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
