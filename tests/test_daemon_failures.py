"""What goes wrong while a restore is served: who goes on, who ends, and that no page is ever wrong."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Literal

import pytest

from criupy.lazy_pages._statistics import State
from criupy.testing.control_linux import Order, RestorerState, WorkloadError
from criupy.testing.page_server import Behaviour, End, Wrong
from criupy.testing.spec import WorkloadSpec
from criupy.testing.workload_linux import Standin
from serving import MIB, SPEC, Serving, all_good, needs_forks, needs_poison, no_lies, serve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

VIOLATIONS: dict[Wrong, str] = {
    "command": "command",
    "flags": "command",
    "count": "count",
    "zero": "count",
    "address": "address",
    "id": "id",
}
EVERY_VIOLATION = pytest.mark.parametrize("wrong", VIOLATIONS)

CUTS = {
    "fin": (Behaviour(cut_after=3 * MIB), "closed the connection"),
    "reset": (Behaviour(cut_after=3 * MIB, cut_with="reset"), "reset"),
    "silence": (Behaviour(silent_after=3 * MIB), "silent"),
}
EARLY_CUTS = {
    "fin": (Behaviour(cut_after=100), "closed the connection"),
    "reset": (Behaviour(cut_after=100, cut_with="reset"), "reset"),
    "silence": (Behaviour(silent_after=100), "silent"),
}


async def vetoed(standin: Standin) -> None:
    """The restore hears of it before any task has run."""
    with pytest.raises(WorkloadError, match=r"vetoed|cannot answer|ended"):
        await standin.finish()
    assert (await standin.wait()).code == 3
    assert standin.control.restorer_state is RestorerState.VETOED


async def poisoned(s: Serving, standin: Standin) -> None:
    """The tasks run on with what they have; the source does not."""
    found = [await standin.worker(task).verify() for task in range(standin.spec.tree)]
    for result in found:
        no_lies(result)
    done = s.daemon.statistics()
    assert done.state is State.FAILED
    assert sum(result.poisoned for result in found) == done.pages_poisoned > 0
    assert await standin.is_running()


# ---- the page server breaks the protocol --------------------------------------------------


@EVERY_VIOLATION
@pytest.mark.parametrize("count", ["old", "new"])
async def test_bad_reply_before_restore_finished(
    room: Path, wrong: Wrong, count: Literal["old", "new"]
) -> None:
    async with (
        serve(room, behaviour=Behaviour(wrong=wrong), count=count) as s,
        s.restore(early=1) as standin,
    ):
        text = await s.failure()
        assert f"({VIOLATIONS[wrong]})" in text
        assert "vetoed" in text
        await vetoed(standin)
        assert await s.source_goes_on()
        assert s.daemon.statistics().state is State.ABORTED


@needs_poison
@EVERY_VIOLATION
async def test_bad_reply_after_restore_finished(room: Path, wrong: Wrong) -> None:
    async with serve(room, behaviour=Behaviour(wrong=wrong, wrong_at=3)) as s, s.restore() as standin:
        await standin.finish()
        text = await s.failure()
        assert f"({VIOLATIONS[wrong]})" in text
        assert "poisoned" in text
        await poisoned(s, standin)
        assert not await s.source_goes_on()


@needs_poison
@pytest.mark.parametrize("frame", [24, 32])
async def test_frames_of_the_wrong_size(room: Path, frame: Literal[24, 32]) -> None:
    """Nothing on the wire tells the versions apart, so this must not hang for longer than --link-timeout."""
    async with (
        serve(room, server_frame=frame, frame_size=56 - frame, link_timeout=0.3) as s,
        s.restore(early=1) as standin,
    ):
        assert "vetoed" in await s.failure()
        await vetoed(standin)
        s.source.violations.clear()  # it could not but misunderstand


# ---- the link breaks ------------------------------------------------------------------------


@pytest.mark.parametrize("cut", EARLY_CUTS)
async def test_link_breaks_before_restore_finished(room: Path, cut: str) -> None:
    behaviour, words = EARLY_CUTS[cut]
    async with serve(room, behaviour=behaviour, link_timeout=0.3) as s, s.restore(early=1) as standin:
        text = await s.failure()
        assert words in text
        assert "vetoed" in text
        await vetoed(standin)
        assert await s.source_goes_on()


@needs_poison
@pytest.mark.parametrize("cut", CUTS)
async def test_link_breaks_after_restore_finished(room: Path, cut: str) -> None:
    behaviour, words = CUTS[cut]
    async with serve(room, behaviour=behaviour, link_timeout=0.3) as s, s.restore() as standin:
        await standin.finish()
        text = await s.failure()
        assert words in text
        assert "poisoned" in text
        await poisoned(s, standin)
        assert await s.source_goes_on() is (s.source.end is End.CUT)  # what the source did itself


@needs_poison
async def test_who_waits_for_a_page_that_will_not_come_gets_a_signal(room: Path) -> None:
    behaviour, _ = CUTS["fin"]
    async with serve(room, SPEC, behaviour=behaviour) as s, s.restore() as standin:
        standin.worker().start_touching(Order.RANDOM)
        await standin.finish()
        await s.failure()
        result = await standin.worker().wait()
        no_lies(result)
        assert result.poisoned > 0
        refused = await standin.worker().read_by_syscall()
        no_lies(refused)
        assert refused.refused == result.poisoned


@needs_poison
@needs_forks
async def test_children_are_not_lied_to_either(room: Path) -> None:
    spec = WorkloadSpec(size=8 * MIB, children=2)
    async with (
        serve(room, spec, behaviour=Behaviour(silent_after=3 * MIB), link_timeout=0.5) as s,
        s.restore() as standin,
    ):
        await standin.finish()
        parent, child, grandchild = standin.worker(), standin.child(0), standin.child(1)
        await parent.fork(child)
        await child.fork(grandchild)
        await s.failure()
        results = [await worker.verify() for worker in (parent, child, grandchild)]
        for result in results:
            no_lies(result)
            assert result.poisoned == results[0].poisoned > 0
        assert s.daemon.statistics().forks == 2
        assert s.daemon.statistics().pages_poisoned == 3 * results[0].poisoned


@needs_poison
async def test_a_tree_is_poisoned_whole(room: Path) -> None:
    spec = WorkloadSpec(size=2 * MIB, tree=4, areas=2, zombie=True)
    behaviour = Behaviour(cut_after=3 * MIB, cut_with="reset")
    async with serve(room, spec, behaviour=behaviour) as s, s.restore() as standin:
        await standin.finish()
        await s.failure()
        await poisoned(s, standin)


# ---- --on-failure kill -------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
async def test_kill_on_failure(room: Path, cut: str) -> None:
    behaviour, words = CUTS[cut]
    spec = WorkloadSpec(size=2 * MIB, tree=3)
    async with (
        serve(room, spec, behaviour=behaviour, link_timeout=0.3, on_failure="kill") as s,
        s.restore() as standin,
    ):
        await standin.finish()
        text = await s.failure()
        assert words in text
        assert "killed" in text
        assert (await standin.wait()).signal == signal.SIGKILL
        for pid in standin.pids:
            assert (await standin.kept.wait(pid)).signal == signal.SIGKILL
        # Nothing runs here any more: better that the source does.
        assert await s.source_goes_on()


@needs_forks
async def test_kill_on_failure_finds_forked_children(room: Path) -> None:
    spec = WorkloadSpec(size=8 * MIB, tree=2, children=3)
    behaviour = Behaviour(silent_after=3 * MIB)
    async with (
        serve(room, spec, behaviour=behaviour, link_timeout=0.5, on_failure="kill") as s,
        s.restore() as standin,
    ):
        await standin.finish()
        pids = [
            await standin.worker(0).fork(standin.child(0)),
            await standin.worker(1).fork(standin.child(1)),
            await standin.child(1).fork(standin.child(2)),
        ]
        assert "killed" in await s.failure()
        for pid in [*standin.pids, *pids]:
            assert not standin.kept.is_alive(pid)
        assert await s.source_goes_on()


# ---- the restore fails, the tasks end ---------------------------------------------------------------


@pytest.mark.parametrize("early", [0, 8])
async def test_restore_abandoned(room: Path, early: int) -> None:
    """Here the stock daemon says CLOSE, and the source is killed."""
    async with serve(room, WorkloadSpec(tree=3)) as s, s.restore(early=early) as standin:
        await standin.wait_registered()
        assert (await standin.abandon()).code == 4
        text = await s.failure()
        assert "the restore failed" in text
        assert await s.source_goes_on()
        assert s.source.end is End.RESET


async def test_restore_abandoned_between_tasks(room: Path) -> None:
    async with serve(room, WorkloadSpec(tree=3)) as s, s.restore(announce=1) as standin:
        await standin.wait_announced(1)
        assert (await standin.abandon()).code == 4
        await s.failure()
        assert await s.source_goes_on()


async def test_restorer_killed(room: Path) -> None:
    async with serve(room) as s, s.restore() as standin:
        await standin.wait_registered()
        standin.kept.kill()
        assert "the restore failed" in await s.failure()
        assert await s.source_goes_on()


async def test_one_task_killed(room: Path) -> None:
    spec = WorkloadSpec(size=2 * MIB, tree=3)
    async with serve(room, spec, behaviour=Behaviour(delay=0.05)) as s, s.restore() as standin:
        await standin.finish()
        victim = standin.pids[2]
        standin.kept.kill(victim)
        done = await s.daemon.wait()
        assert done.state is State.COMPLETE
        assert done.pages_dropped > 0
        assert done.tasks_gone == 1
        for task in range(2):
            assert (await standin.worker(task).verify()).is_good
        assert not await s.source_goes_on()


@pytest.mark.parametrize("tree", [1, 3])
async def test_all_tasks_killed(room: Path, tree: int) -> None:
    """They ran, and are gone: the source, which is behind them, must not start again."""
    behaviour = Behaviour(silent_after=MIB)
    async with (
        serve(room, WorkloadSpec(size=2 * MIB, tree=tree), behaviour=behaviour, link_timeout=0.5) as s,
        s.restore() as standin,
    ):
        await standin.finish()
        for pid in standin.pids:
            standin.kept.kill(pid)
        done = await s.daemon.wait()
        assert (done.state, done.tasks_gone, done.pages_missing) == (State.COMPLETE, tree, 0)
        assert not await s.source_goes_on()


@needs_poison
async def test_a_task_killed_and_then_the_link_lost(room: Path) -> None:
    spec = WorkloadSpec(size=2 * MIB, tree=2)
    behaviour = Behaviour(silent_after=MIB)
    async with serve(room, spec, behaviour=behaviour, link_timeout=0.5) as s, s.restore() as standin:
        await standin.finish()
        standin.kept.kill(standin.pids[1])
        assert "silent" in await s.failure()
        result = await standin.worker().verify()
        no_lies(result)
        assert result.poisoned == s.daemon.statistics().pages_poisoned > 0


async def test_a_source_that_answers_nothing_to_close(room: Path) -> None:
    """Every page is there: the restore was served, whatever the source says in the end."""
    async with (
        serve(room, behaviour=Behaviour(silent_at_close=True), link_timeout=0.3) as s,
        s.restore() as standin,
    ):
        await standin.finish()
        done = await s.daemon.wait()
        assert done.state is State.COMPLETE
        await all_good(standin)
        assert not await s.source_goes_on()
