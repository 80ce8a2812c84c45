"""What goes wrong in a real migration: who goes on, who ends, and that no page is ever wrong."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from criupy.testing.control_linux import Control, Order
from criupy.testing.criu_linux import Criu
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from migrating import MIB, Migration, migrate, script

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("workload_program")]

SPEC = WorkloadSpec(size=64 * MIB, children=1)
SLOW = 16 * MIB


async def source_goes_on(m: Migration) -> None:
    assert (await m.dump.job.wait()).code == 1
    assert await m.source.is_running()
    assert (await m.source.worker().verify()).is_good


def last_error(m: Migration) -> str:
    errors = [line for line in m.log.splitlines() if "Error (" in line]
    assert len(errors) == 1, errors
    return errors[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_daemon_ends_before_restore_finished(criu: Criu, room: Path, number: signal.Signals) -> None:
    hold = f"touch {room}/there; while [ ! -e {room}/go ]; do sleep 0.02; done"
    async with migrate(criu, SPEC, room, restore_extra=script(room, "post-restore", hold)) as m:
        await until((room / "there").exists)
        # Without a connection the source would wait on for a daemon, frozen, whoever dies here.
        await until(lambda: "tasks have come" in m.log)
        os.kill(m.daemon.kept.pid, number)
        ended = await m.daemon.wait()
        (room / "go").touch()
        assert (await m.restored.job.wait()).code != 0
        await source_goes_on(m)
        if number == signal.SIGTERM:
            assert ended.code == 1
            assert "vetoed" in last_error(m)


async def test_restore_that_fails_leaves_the_source_running(criu: Criu, room: Path) -> None:
    async with migrate(criu, SPEC, room, restore_extra=script(room, "post-restore", "exit 1")) as m:
        assert (await m.restored.job.wait()).code != 0
        assert (await m.daemon.wait()).code == 1
        assert "the restore failed" in last_error(m)
        await source_goes_on(m)


@pytest.mark.spread
@pytest.mark.parametrize("how", ["touch", "syscall", "child"])
async def test_no_zeros_when_the_source_is_killed(criu: Criu, room: Path, how: str) -> None:
    async with migrate(criu, SPEC, room, rate=SLOW) as m:
        await m.transferring()
        worker = m.control.worker()
        assert (await worker.touch(count=10)).is_good
        if how == "child":
            child = m.control.child()
            await worker.fork(child)
            worker = child
        m.dump.job.kept.kill()
        assert (await m.daemon.wait()).code == 1
        assert "poisoned" in last_error(m)
        result = await (worker.read_by_syscall() if how == "syscall" else worker.verify())
        assert result.zero == result.wrong == 0, result
        assert result.checked == SPEC.main_pages
        lost = result.refused if how == "syscall" else result.poisoned
        assert 0 < lost < SPEC.main_pages


async def test_a_thread_that_waits_gets_sigbus_not_zeros(criu: Criu, room: Path) -> None:
    def touch(control: Control) -> None:
        control.worker().start_touching(Order.RANDOM, nr=SPEC.main_pages)

    async with migrate(criu, SPEC, room, rate=SLOW, before=touch) as m:
        await m.transferring()
        m.dump.job.kept.kill()
        result = await m.control.worker().wait()
        assert result.zero == result.wrong == 0, result
        assert result.poisoned > 0


async def test_kill_on_failure(criu: Criu, room: Path) -> None:
    async with migrate(criu, SPEC, room, rate=SLOW, daemon_extra=["--on-failure", "kill"]) as m:
        await m.transferring()
        child = await m.control.worker().fork(m.control.child())
        m.dump.job.kept.kill()
        assert (await m.daemon.wait()).code == 1
        assert "killed" in last_error(m)
        assert (await m.restored.task_ended()).signal == signal.SIGKILL
        assert m.restored.gone(child) is not None


async def test_silent_source(criu: Criu, room: Path) -> None:
    async with migrate(criu, SPEC, room, rate=SLOW, daemon_extra=["--link-timeout", "500ms"]) as m:
        await m.transferring()
        assert m.link is not None
        m.link.stall()
        assert (await m.daemon.wait()).code == 1
        assert "silent" in last_error(m)
        result = await m.control.worker().verify()
        assert result.zero == result.wrong == 0
        assert result.poisoned > 0
        m.link.flow()
        # The process runs here, damaged as it is: the source must not run, too.
        assert (await m.dump.job.wait()).code == 0
        assert (await m.source.wait()).signal == signal.SIGKILL


@pytest.mark.spread
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
async def test_a_signal_drains_or_does_nothing(criu: Criu, room: Path, number: signal.Signals) -> None:
    async with migrate(criu, SPEC, room, rate=SLOW) as m:
        await m.transferring()
        os.kill(m.daemon.kept.pid, number)
        await trio.sleep(0.2)
        m.speed_up()
        await m.ends_well()
        await m.verify_all()


@pytest.mark.spread
@pytest.mark.parametrize("again", [True, False], ids=["second-sigterm", "stop-timeout"])
async def test_draining_has_an_end(criu: Criu, room: Path, again: bool) -> None:
    async with migrate(criu, SPEC, room, rate=SLOW, daemon_extra=["--stop-timeout", "0.2"]) as m:
        await m.transferring()
        os.kill(m.daemon.kept.pid, signal.SIGTERM)
        if again:
            await trio.sleep(0.05)
            os.kill(m.daemon.kept.pid, signal.SIGTERM)
        assert (await m.daemon.wait()).code == 1
        assert "stopped" in last_error(m)
        result = await m.control.worker().verify()
        assert result.zero == result.wrong == 0
        assert result.poisoned > 0
        # CLOSE was answered: the source ended, and nothing runs twice.
        assert (await m.dump.job.wait()).code == 0
        assert (await m.source.wait()).signal == signal.SIGKILL


async def test_stopped_with_kill_lets_the_source_go_on(criu: Criu, room: Path) -> None:
    extra = ["--stop-timeout", "0.2", "--on-failure", "kill"]
    async with migrate(criu, SPEC, room, rate=SLOW, daemon_extra=extra) as m:
        await m.transferring()
        os.kill(m.daemon.kept.pid, signal.SIGTERM)
        assert (await m.daemon.wait()).code == 1
        assert (await m.restored.task_ended()).signal == signal.SIGKILL
        await source_goes_on(m)


async def test_task_killed_during_the_transfer(criu: Criu, room: Path) -> None:
    async with migrate(criu, WorkloadSpec(size=32 * MIB, tree=3), room, rate=SLOW) as m:
        await m.transferring()
        pid = m.control.worker(2).pid
        m.restored.kill(pid)
        await until(lambda: m.restored.gone(pid) is not None)
        m.speed_up()
        await m.ends_well()
        for task in range(2):
            assert (await m.control.worker(task).verify()).is_good
        assert m.stats["pages_dropped"] > 0


async def test_all_tasks_gone(criu: Criu, room: Path) -> None:
    async with migrate(criu, SPEC, room, rate=SLOW) as m:
        await m.transferring()
        m.restored.kill()
        await m.ends_well()
        assert "gone" in m.log


async def test_nobody_listens_at_the_source(criu: Criu, room: Path) -> None:
    async with migrate(criu, SPEC, room, daemon_extra=["--port", "1"]) as m:
        assert (await m.daemon.wait()).code == 1
        # criu waits for nobody: its restore may have finished, but nothing is left of it.
        await m.restored.job.wait()
        await until(lambda: m.restored.gone(m.source.pid) is not None)
        assert "127.0.0.1:1" in last_error(m)
        # The source never saw anybody; it waits on, frozen, for a daemon that comes.
        assert m.dump.job.is_running
