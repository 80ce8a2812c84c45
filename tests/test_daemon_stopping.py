"""Stopping and cancelling at every stage: the rules of each period hold, and nothing is left behind."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import trio

from criupy.errors import LazyPagesError
from criupy.lazy_pages._daemon_linux import Config, open_lazy_pages
from criupy.lazy_pages._statistics import State
from criupy.testing.control_linux import Gate, RestorerState, WorkloadError
from criupy.testing.images import write_images
from criupy.testing.page_server import Behaviour, End, PageServer
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.testing.workload_linux import Standin, start_standin
from serving import MIB, SPEC, Serving, all_good, needs_poison, no_lies, serve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

TREE = WorkloadSpec(size=2 * MIB, tree=3)
FAR = Behaviour(delay=0.1)


async def vetoed(standin: Standin) -> None:
    with contextlib.suppress(WorkloadError):
        await standin.finish()
    assert (await standin.wait()).code == 3
    assert standin.control.restorer_state is RestorerState.VETOED


async def test_before_a_restore_connects(room: Path) -> None:
    async with serve(room) as s:
        s.daemon.stop()
        assert "no restore had connected" in await s.failure()
        assert not s.source.accepted.is_set()
        assert not s.daemon.socket_path.exists()


async def test_before_the_daemon_has_run_at_all(room: Path) -> None:
    images = write_images(room / "images", SPEC, style="full")
    with pytest.raises(LazyPagesError, match="no restore had connected"):
        async with open_lazy_pages(Config(images.directory), work_dir=room / "work") as daemon:
            daemon.stop()
    assert not (room / "work" / "lazy-pages.socket").exists()


async def test_during_the_handover(room: Path) -> None:
    async with serve(room, TREE) as s, s.restore(announce=2) as standin:
        await standin.wait_announced(2)
        await s.handed_over(2)
        s.daemon.stop()
        assert "vetoed" in await s.failure()
        assert await s.source_goes_on()
        assert s.daemon.statistics().state is State.ABORTED
        # The task whose turn it is hears of it when it speaks; here none will.
        await standin.abandon()


@pytest.mark.parametrize("early", [0, 4])
async def test_before_restore_finished(room: Path, early: int) -> None:
    async with serve(room, TREE) as s, s.restore(early=early) as standin:
        await standin.wait_registered()
        await s.handed_over()
        s.daemon.stop()
        text = await s.failure()
        assert "vetoed" in text
        assert "source goes on" in text
        await vetoed(standin)
        assert await s.source_goes_on()
        assert s.source.end is End.RESET


async def test_while_a_task_waits_before_restore_finished(room: Path) -> None:
    async with serve(room, behaviour=Behaviour(silent_after=0)) as s, s.restore(early=1) as standin:
        await until(lambda: s.daemon.statistics().faults > 0)
        s.daemon.stop()
        assert "vetoed" in await s.failure()
        await vetoed(standin)
        assert await s.source_goes_on()


async def test_during_a_slow_connect(room: Path) -> None:
    async with full_backlog() as address:
        images = write_images(room / "images", SPEC)
        async with serve(room, images=images, page_server=address) as s, s.restore() as standin:
            await until(lambda: not s.daemon.socket_path.exists())
            s.daemon.stop()
            assert "vetoed" in await s.failure()
            await vetoed(standin)


@contextlib.asynccontextmanager
async def full_backlog() -> AsyncIterator[tuple[str, int]]:
    """A listener that takes no connection any more: connecting to it waits."""
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(trio.socket.socket())
        await listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address: tuple[str, int] = listener.getsockname()
        while True:
            client = stack.enter_context(trio.socket.socket())
            with trio.move_on_after(0.05) as waiting:
                await client.connect(address)
            if waiting.cancelled_caught:
                break
        yield address


async def test_after_restore_finished_everything_still_comes(room: Path) -> None:
    async with serve(room, behaviour=FAR) as s, s.restore() as standin:
        await standin.finish()
        await s.transferring()
        s.daemon.stop()
        assert s.daemon.statistics().pages_missing > 0
        assert (await s.daemon.wait()).state is State.COMPLETE
        await all_good(standin)
        assert not await s.source_goes_on()


async def poisoned(s: Serving, standin: Standin) -> None:
    result = await standin.worker().verify()
    no_lies(result)
    assert result.poisoned == s.daemon.statistics().pages_poisoned > 0
    assert not await s.source_goes_on()
    assert s.source.end is End.CLOSED


@needs_poison
async def test_second_stop(room: Path) -> None:
    async with serve(room, behaviour=FAR) as s, s.restore() as standin:
        await standin.finish()
        await s.transferring()
        s.daemon.stop()
        s.daemon.stop()
        text = await s.failure()
        assert "second request" in text
        assert "poisoned" in text
        await poisoned(s, standin)


@needs_poison
async def test_stop_timeout(room: Path) -> None:
    async with serve(room, behaviour=FAR, stop_timeout=0.03) as s, s.restore() as standin:
        await standin.finish()
        s.daemon.stop()
        assert "--stop-timeout" in await s.failure()
        await poisoned(s, standin)


@needs_poison
async def test_second_stop_with_a_silent_source(room: Path) -> None:
    behaviour = Behaviour(silent_after=MIB)
    async with serve(room, behaviour=behaviour, link_timeout=0.5) as s, s.restore() as standin:
        await standin.finish()
        await s.transferring()
        s.daemon.stop()
        s.daemon.stop()
        assert "second request" in await s.failure()
        no_lies(await standin.worker().verify())
        assert not await s.source_goes_on()


async def test_second_stop_kills_when_told_to(room: Path) -> None:
    async with serve(room, TREE, behaviour=FAR, on_failure="kill") as s, s.restore() as standin:
        await standin.finish()
        await s.transferring()
        s.daemon.stop()
        s.daemon.stop()
        text = await s.failure()
        assert "killed" in text
        assert "source goes on" in text
        assert (await standin.wait()).signal == signal.SIGKILL
        assert await s.source_goes_on()


@needs_poison
async def test_second_stop_from_local_images(room: Path) -> None:
    """Local pages come too fast to be caught with any left: it may end either way, never with zeros."""
    async with serve(room, WorkloadSpec(size=32 * MIB), style="full") as s, s.restore() as standin:
        await standin.finish()
        await s.transferring()
        s.daemon.stop()
        s.daemon.stop()
        try:
            await s.daemon.wait()
        except LazyPagesError as error:
            s.expected.append(error)
            assert "poisoned" in str(error)
        no_lies(await standin.worker().verify())


async def test_stop_after_the_end(room: Path) -> None:
    async with serve(room) as s, s.restore() as standin:
        await standin.finish()
        done = await s.daemon.wait()
        s.daemon.stop()
        s.daemon.stop()
        assert await s.daemon.wait() is done
        await all_good(standin)


# ---- cancelling the block -------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Cancellable:
    """A daemon in a task of its own."""

    server: PageServer
    socket: Path
    scope: trio.CancelScope
    ended: trio.Event

    async def cancel(self) -> None:
        self.scope.cancel()
        await self.ended.wait()
        assert self.scope.cancelled_caught
        assert not self.socket.exists()

    async def source_goes_on(self) -> bool:
        await self.server.ended.wait()
        assert self.server.end is not None
        return self.server.end.source_goes_on


@contextlib.asynccontextmanager
async def cancellable(
    room: Path,
    spec: WorkloadSpec = SPEC,
    behaviour: Behaviour = FAR,
    on_failure: Literal["poison", "kill"] = "poison",
) -> AsyncIterator[Cancellable]:
    images = write_images(room / "images", spec)
    server = PageServer(images, behaviour)
    c = Cancellable(server, room / "work" / "lazy-pages.socket", trio.CancelScope(), trio.Event())

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        source = (server.address, server.port)
        config = Config(images.directory, page_server=source, link_timeout=0.5, on_failure=on_failure)
        with c.scope:
            async with open_lazy_pages(config, work_dir=room / "work"):
                task_status.started()
                await trio.sleep_forever()
        c.ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        await nursery.start(run)
        yield c
        await c.ended.wait()
        assert server.violations == []
        nursery.cancel_scope.cancel()


async def test_cancelled_before_a_restore_connects(room: Path) -> None:
    async with cancellable(room) as c:
        await c.cancel()
        assert not c.server.accepted.is_set()


async def test_cancelled_during_the_handover(room: Path) -> None:
    async with cancellable(room, TREE) as c, start_standin(TREE, c.socket, room, announce=1) as standin:
        await standin.wait_announced(1)
        await c.server.accepted.wait()
        await c.cancel()
        assert await c.source_goes_on()
        await standin.abandon()


async def test_cancelled_before_restore_finished(room: Path) -> None:
    async with cancellable(room, TREE) as c, start_standin(TREE, c.socket, room) as standin:
        await standin.wait_registered()
        await c.server.accepted.wait()
        await c.cancel()
        assert await c.source_goes_on()
        await vetoed(standin)


@needs_poison
@pytest.mark.parametrize("behaviour", [FAR, Behaviour(silent_after=MIB)], ids=["far", "silent"])
async def test_cancelled_after_restore_finished(room: Path, behaviour: Behaviour) -> None:
    async with cancellable(room, behaviour=behaviour) as c, start_standin(SPEC, c.socket, room) as standin:
        await standin.finish()
        await c.server.accepted.wait()
        await c.cancel()
        result = await standin.worker().verify()
        no_lies(result)
        assert result.poisoned > 0
        assert not await c.source_goes_on()


async def test_cancelled_after_restore_finished_with_kill(room: Path) -> None:
    async with (
        cancellable(room, TREE, on_failure="kill") as c,
        start_standin(TREE, c.socket, room) as standin,
    ):
        await standin.finish()
        await c.server.accepted.wait()
        await c.cancel()
        assert (await standin.wait()).signal == signal.SIGKILL
        assert await c.source_goes_on()


async def test_cancelled_after_the_end(room: Path) -> None:
    async with (
        cancellable(room, behaviour=Behaviour()) as c,
        start_standin(SPEC, c.socket, room) as standin,
    ):
        await standin.finish()
        await c.server.ended.wait()
        await c.cancel()
        await all_good(standin)
        assert not await c.source_goes_on()


class BodyError(Exception):
    pass


@pytest.mark.parametrize("connected", [False, True])
async def test_an_exception_in_the_block_stops_at_once(room: Path, connected: bool) -> None:
    async with trio.open_nursery() as nursery:
        images = write_images(room / "images", SPEC)
        server = PageServer(images)
        await nursery.start(server.run)
        config = Config(images.directory, page_server=(server.address, server.port))
        with pytest.raises(ExceptionGroup) as caught:
            async with open_lazy_pages(config, work_dir=room / "work") as daemon:
                if connected:
                    async with start_standin(SPEC, daemon.socket_path, room) as standin:
                        await standin.wait_registered()
                        await server.accepted.wait()
                        raise BodyError
                raise BodyError
        assert caught.group_contains(BodyError)
        if connected:
            await server.ended.wait()
            assert server.end is not None
            assert server.end.source_goes_on
        nursery.cancel_scope.cancel()


# ---- criu waits for nobody: it may have finished before the daemon has looked ---------------------


@pytest.mark.parametrize("spec", [SPEC, TREE], ids=["one", "tree"])
async def test_first_stop_after_a_restore_that_nobody_saw_finish(room: Path, spec: WorkloadSpec) -> None:
    """All that criu said waits in the socket. A veto would come too late, and turn its memory into zeros."""
    async with serve(room, spec) as s, s.restore() as standin:
        blocking(standin)
        s.daemon.stop()
        await standin.wait_until_ready(spec.tree)
        assert (await s.daemon.wait()).state is State.COMPLETE
        await all_good(standin)
        assert not await s.source_goes_on()


@needs_poison
async def test_cancelled_after_a_restore_that_nobody_saw_finish(room: Path) -> None:
    async with cancellable(room) as c, start_standin(SPEC, c.socket, room) as standin:
        blocking(standin)
        await c.cancel()
        # Poisoned; or killed, if the source had not been reached and still has everything.
        try:
            await standin.wait_until_ready(1)
            result = await standin.worker().verify()
        except WorkloadError:
            assert (await standin.wait()).signal == signal.SIGKILL
        else:
            no_lies(result)
            assert result.poisoned == SPEC.populated_pages


def blocking(standin: Standin) -> None:
    """Let the restore finish while this process, and with it the daemon, does nothing at all."""
    standin.control.gate = Gate.FINISH
    while standin.control.restorer_state < RestorerState.FINISHED:
        time.sleep(0.001)
