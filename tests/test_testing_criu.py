"""The harness around real CRIU, proven with CRIU's own daemon at every place of ours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import trio

from criupy.testing.control_linux import Command, Control
from criupy.testing.criu_linux import (
    Criu,
    CriuJobError,
    dump,
    lazy_dump,
    lazy_pages_daemon,
    page_server,
    restore,
    stock_command,
)
from criupy.testing.spec import ZOMBIE_STATUS, WorkloadSpec
from criupy.testing.workload_linux import start_workload

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("workload_program")]

MIB = 1 << 20


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def all_good(control: Control, tasks: int) -> None:
    for task in range(tasks):
        result = await control.worker(task).verify()
        assert result.is_good, (task, result)


@pytest.mark.spread
@pytest.mark.parametrize(
    "spec",
    [
        WorkloadSpec(size=32 * MIB),
        WorkloadSpec(size=8 * MIB, tree=5, threads=2, zombie=True, areas=4, adjacent=True, fragmented=True),
    ],
    ids=["one", "tree"],
)
async def test_live_migration(criu: Criu, spec: WorkloadSpec, room: Path) -> None:
    images, work = room / "images", room / "work"
    async with start_workload(spec, room) as source, lazy_dump(criu, source.pid, images) as pages:
        assert not await source.is_running()
        copy = source.control.copy(room / "restored.control")
        async with (
            lazy_pages_daemon(
                stock_command(criu), images, work, source=(pages.address, pages.port)
            ) as daemon,
            restore(criu, images, work, source.pid, binds={source.control.path: copy.path}) as restored,
        ):
            copy.gone = restored.gone
            await restored.finished()
            await all_good(copy, spec.tree)
            await daemon.succeed()
            await pages.job.succeed()
            assert (await source.wait()).signal == 9
            await all_good(copy, spec.tree)
            if spec.zombie:
                assert await copy.worker().reap_zombie() == ZOMBIE_STATUS << 8
            copy.worker().issue(Command.EXIT, 5)
            assert (await restored.task_ended()).code == 5
        copy.close()


async def test_local_images(criu: Criu, room: Path) -> None:
    images, work = room / "images", room / "work"
    spec = WorkloadSpec(size=16 * MIB, areas=2)
    async with start_workload(spec, room) as source:
        await dump(criu, source.pid, images)
        assert (await source.wait()).signal == 9
        async with (
            lazy_pages_daemon(stock_command(criu), images, work) as daemon,
            restore(criu, images, work, source.pid) as restored,
        ):
            source.control.gone = restored.gone
            await restored.finished()
            await all_good(source.control, 1)
            await daemon.succeed()


async def test_page_server(criu: Criu, room: Path) -> None:
    images, work = room / "images", room / "work"
    async with start_workload(WorkloadSpec(size=16 * MIB), room) as source:
        await dump(criu, source.pid, images)
        async with (
            page_server(criu, images, room) as pages,
            lazy_pages_daemon(
                stock_command(criu), images, work, source=(pages.address, pages.port)
            ) as daemon,
            restore(criu, images, work, source.pid) as restored,
        ):
            source.control.gone = restored.gone
            await restored.finished()
            await all_good(source.control, 1)
            await daemon.succeed()
            await pages.job.succeed()


async def test_source_resumes_when_its_dump_is_killed(criu: Criu, room: Path) -> None:
    async with start_workload(WorkloadSpec(), room) as source:
        async with lazy_dump(criu, source.pid, room / "images"):
            assert not await source.is_running()
        assert await source.is_running()
        assert (await source.worker().verify()).is_good


async def test_restored_and_source_answer_in_different_files(criu: Criu, room: Path) -> None:
    images, work = room / "images", room / "work"
    async with start_workload(WorkloadSpec(), room) as source:
        await dump(criu, source.pid, images, leave_running=True)
        copy = source.control.copy(room / "restored.control")
        async with restore(
            criu, images, work, source.pid, lazy=False, binds={source.control.path: copy.path}
        ) as restored:
            copy.gone = restored.gone
            await restored.finished()
            await copy.worker().write(0, 1, generation=7)
            restored.kill()
            assert (await restored.task_ended()).signal == 9
        copy.close()
        # what the restored process wrote is not here
        assert (await source.worker().verify()).is_good


async def test_failure_names_the_log_and_its_errors(criu: Criu, room: Path) -> None:
    with pytest.raises(CriuJobError, match=r"dump ended with exit status 1, not 0: .*Error .*dump\.log"):
        await dump(criu, 4_000_000, room / "images")


async def test_nothing_is_left_when_a_migration_is_cancelled(criu: Criu, room: Path) -> None:
    images, work = room / "images", room / "work"
    jobs = []
    with trio.CancelScope() as scope:
        async with start_workload(WorkloadSpec(tree=3), room) as source:
            pids = source.pids
            async with (
                lazy_dump(criu, source.pid, images) as pages,
                lazy_pages_daemon(stock_command(criu), images, work) as daemon,
                restore(criu, images, work, source.pid) as restored,
            ):
                jobs = [pages.job, daemon, restored.job]
                scope.cancel()
                await trio.sleep(math.inf)
    assert scope.cancelled_caught
    assert len(jobs) == 3
    assert not [pid for pid in pids if is_there(pid)]
    assert all(job.kept._process.returncode is not None for job in jobs)
    assert pages.job.kept.ended[pages.job.kept.pid].signal == 9
