"""Real migrations: CRIU dumps lazily, our daemon serves, CRIU restores."""

from __future__ import annotations

from pathlib import Path

import pytest

from criupy.testing.control_linux import Command, Control, Order
from criupy.testing.criu_linux import Criu, dump, lazy_pages_daemon, our_command, page_server, restore
from criupy.testing.spec import ZOMBIE_STATUS, WorkloadSpec
from criupy.testing.workload_linux import start_workload
from migrating import MIB, migrate

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("workload_program")]

# Slow enough that a command given at the resume runs while pages are on their way.
SLOW = 60 * MIB
ELSEWHERE = 0x50_0000_0000


async def test_one_process(criu: Criu, room: Path) -> None:
    async with migrate(criu, WorkloadSpec(size=128 * MIB), room) as m:
        await m.restored.finished()
        await m.ends_well()
        await m.verify_all()
        assert m.stats["pages_missing"] == 0
        assert m.stats["pages_total"] >= 128 * MIB // 4096


async def test_busy_process(criu: Criu, room: Path) -> None:
    def touch(control: Control) -> None:
        control.worker().start_touching(Order.RANDOM, nr=128 * MIB // 4096)

    async with migrate(criu, WorkloadSpec(size=128 * MIB), room, before=touch) as m:
        result = await m.control.worker().wait()
        assert result.is_good
        assert result.touches == 128 * MIB // 4096
        await m.ends_well()
        await m.verify_all()
        assert m.stats["pages_demand"] > 0


async def test_tree_with_threads_and_a_zombie(criu: Criu, room: Path) -> None:
    spec = WorkloadSpec(
        size=16 * MIB, tree=5, threads=3, zombie=True, areas=4, adjacent=True, fragmented=True
    )

    def touch(control: Control) -> None:
        for task in range(5):
            for thread in range(1, 3):
                control.worker(task, thread).start_touching(Order.RANDOM, count=2000, seed=thread)

    async with migrate(criu, spec, room, before=touch) as m:
        for task in range(5):
            for thread in range(1, 3):
                assert (await m.control.worker(task, thread).wait()).is_good
        await m.ends_well()
        await m.verify_all()
        assert await m.control.worker().reap_zombie() == ZOMBIE_STATUS << 8
        m.control.worker().issue(Command.EXIT, 5)
        assert (await m.restored.task_ended()).code == 5


async def test_memory_changes_while_pages_are_in_flight(criu: Criu, room: Path) -> None:
    spec = WorkloadSpec(size=256 * MIB, reserve=5 << 30, children=2)
    pages = spec.main_pages

    async with migrate(criu, spec, room, rate=SLOW) as m:
        worker = m.control.worker()
        await m.restored.finished()
        # 5 GiB in one call: a length that does not fit an int (the stock daemon never gets over it).
        await worker.unmap(pages, spec.reserve_pages)
        assert await worker.fork(m.control.child(0)) > 0
        await worker.move(pages // 2, pages // 4, ELSEWHERE)
        await worker.discard(0, pages // 8)
        assert await worker.fork(m.control.child(1)) > 0
        assert m.daemon.is_running
        m.speed_up()
        for child in (m.control.child(0), m.control.child(1)):
            result = await child.verify()
            assert result.is_good, result
        await m.ends_well()
        await m.verify_all()
        stats = m.stats
        assert stats["events"]["fork"] == 2
        assert stats["events"]["remap"] >= 1
        assert stats["events"]["remove"] >= 1
        assert stats["events"]["unmap"] >= 1
        assert stats["pages_dropped"] > 0


async def test_mprotect_splits_mappings_in_flight(criu: Criu, room: Path) -> None:
    spec = WorkloadSpec(size=128 * MIB)
    async with migrate(criu, spec, room, rate=SLOW) as m:
        worker = m.control.worker()
        await m.restored.finished()
        # No event tells of the new borders: only the kernel's answer to a copy across one.
        for step in (64, 7, 1):
            await worker.protect(0, 16384, step=step)
        assert m.daemon.is_running
        m.speed_up()
        await m.ends_well()
        await m.verify_all()


async def test_local_images(criu: Criu, room: Path) -> None:
    images, work = room / "images", room / "work"
    spec = WorkloadSpec(size=64 * MIB, areas=4, tree=2)
    async with start_workload(spec, room) as source:
        await dump(criu, source.pid, images)
        assert (await source.wait()).signal == 9
        source.control.worker().start_touching(Order.RANDOM, count=20000)
        async with (
            lazy_pages_daemon(our_command(), images, work) as daemon,
            restore(criu, images, work, source.pid) as restored,
        ):
            source.control.gone = restored.gone
            await restored.finished()
            assert (await source.worker().wait()).is_good
            await daemon.succeed()
            for task in range(2):
                assert (await source.worker(task).verify()).is_good


@pytest.mark.spread
@pytest.mark.parametrize("where", ["source", "images"])
async def test_a_gigabyte_costs_less_than_100_mb(criu: Criu, room: Path, where: str) -> None:
    spec = WorkloadSpec(size=1024 * MIB)

    def touch(control: Control) -> None:
        control.worker().start_touching(Order.RANDOM, count=100_000)

    if where == "source":
        async with migrate(criu, spec, room, before=touch) as m:
            await m.restored.finished()
            peak = (await m.daemon.succeed()).max_rss
            assert (await m.control.worker().wait()).is_good
    else:
        images, work = room / "images", room / "work"
        async with start_workload(spec, room) as source:
            await dump(criu, source.pid, images)
            touch(source.control)
            async with (
                lazy_pages_daemon(our_command(), images, work) as daemon,
                restore(criu, images, work, source.pid) as restored,
            ):
                source.control.gone = restored.gone
                await restored.finished()
                peak = (await daemon.succeed()).max_rss
                assert (await source.worker().wait()).is_good
    assert peak < 100e6


async def test_page_server_of_criu(criu: Criu, room: Path) -> None:
    images, work = room / "images", room / "work"
    async with start_workload(WorkloadSpec(size=128 * MIB, areas=4), room) as source:
        await dump(criu, source.pid, images)
        async with (
            page_server(criu, images, room) as pages,
            lazy_pages_daemon(our_command(), images, work, source=(pages.address, pages.port)) as daemon,
            restore(criu, images, work, source.pid) as restored,
        ):
            source.control.gone = restored.gone
            await restored.finished()
            await daemon.succeed()
            await pages.job.succeed()
            assert (await source.worker().verify()).is_good
