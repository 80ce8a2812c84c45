"""The workload program: its control file, its memory, every command."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from criupy.testing import control_linux as control
from criupy.testing import spec as spec_module
from criupy.testing.control_linux import Command, Order, Touch, WorkloadError
from criupy.testing.spec import PAGE, RESERVE_PAGES, ZOMBIE_STATUS, WorkloadSpec, page_bytes
from criupy.testing.workload_linux import Workload, start_workload

pytestmark = pytest.mark.usefixtures("workload_program")

MOVED = 0x40_0000_0000


def poke(workload: Workload, address: int, data: bytes) -> None:
    with Path(f"/proc/{workload.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(data)


def peek(pid: int, address: int, length: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(length)


def nr_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def nr_mappings(workload: Workload) -> int:
    return len(Path(f"/proc/{workload.pid}/maps").read_text().splitlines())


def test_layout_is_the_same_in_c_and_python(workload_program: Path) -> None:
    shown = subprocess.run([workload_program, "--layout"], capture_output=True, text=True, check=True)
    layout = {name: int(number) for name, number in map(str.split, shown.stdout.splitlines())}
    ours = {f"control.{name}": offset for name, offset in control.CONTROL_OFFSETS.items()}
    ours |= {f"slot.{name}": offset for name, offset in control.SLOT_OFFSETS.items()}
    ours |= {f"result.{field.name}": n * 8 for n, field in enumerate(fields(control.Result))}
    ours |= {
        "size.control": control.CONTROL_SIZE,
        "size.slot": control.SLOT_SIZE,
        "size.result": control.RESULT_SIZE,
        "constant.error_size": control.ERROR_SIZE,
        "constant.histogram_size": control.HISTOGRAM_SIZE,
        "constant.nr_commands": len(Command),
        "constant.area_base": spec_module.AREA_BASE,
        "constant.area_gap": spec_module.AREA_GAP,
        "constant.reserve_base": spec_module.RESERVE_BASE,
        "constant.reserve_pages": RESERVE_PAGES,
        "constant.stall_ns": control.STALL_NS,
        "constant.zombie_status": ZOMBIE_STATUS,
    }
    assert ours == layout


@pytest.mark.parametrize("name", ["command", "order", "gate", "restorer_state"])
def test_numbers_are_the_same_in_c_and_python(name: str) -> None:
    header = Path(__file__).parents[1] / "src/criupy/testing/workload.h"
    enums = {"command": Command, "order": Order, "gate": control.Gate}
    ours = enums.get(name, control.RestorerState)
    body = re.search(rf"enum {name} {{([^}}]*)}}", header.read_text())
    assert body is not None
    names = re.findall(rf"{name.removesuffix('_state').upper()}_(\w+)", body[1])
    assert names == [member.name for member in ours]


@pytest.mark.parametrize(
    "spec",
    [
        WorkloadSpec(size=64 * PAGE),
        WorkloadSpec(size=64 * PAGE, seed=2**64 - 1, areas=4, tree=3),
        WorkloadSpec(size=64 * PAGE, areas=4, adjacent=True, fragmented=True),
        WorkloadSpec(size=15 * PAGE, areas=5, fragmented=True, reserve=64 * PAGE),
    ],
    ids=["plain", "areas-tree", "adjacent-fragmented", "odd-reserve"],
)
async def test_memory_holds_what_python_expects(spec: WorkloadSpec, tmp_path: Path) -> None:
    async with start_workload(spec, tmp_path) as workload:
        for task, pid in enumerate(workload.pids):
            expected = {
                run.start + n * PAGE: run.first + n for run in spec.runs() for n in range(run.nr_pages)
            }
            assert len(expected) == spec.populated_pages
            for area in spec.task_areas():
                for address in range(area.start, area.end, PAGE):
                    page = peek(pid, address, PAGE)
                    index = expected.get(address)
                    assert page == (bytes(PAGE) if index is None else spec.page(task, index)), hex(address)
            result = await workload.worker(task).verify()
            assert result.is_good
            assert await workload.worker(task).resident() >= spec.populated_pages


def test_pages_differ_by_seed_task_index_and_generation() -> None:
    pages = {page_bytes(s, t, p, g) for s in range(4) for t in range(4) for p in range(4) for g in range(4)}
    assert len(pages) == 256
    assert all(b"\0" * 8 not in page for page in pages)


async def test_verify_tells_wrong_from_zero(tmp_path: Path) -> None:
    spec = WorkloadSpec(size=32 * PAGE)
    start = spec.task_areas()[0].start
    async with start_workload(spec, tmp_path) as workload:
        poke(workload, start + 5 * PAGE + 4095, b"\x01")
        poke(workload, start + 9 * PAGE, bytes(PAGE))
        poke(workload, start + 20 * PAGE, spec.page(0, 21))
        result = await workload.worker().verify()
        assert (result.checked, result.wrong, result.zero) == (32, 2, 1)
        assert (result.first_bad, result.first_bad_address) == (5, start + 5 * PAGE)
        by_syscall = await workload.worker().read_by_syscall()
        assert (by_syscall.checked, by_syscall.wrong, by_syscall.zero) == (32, 2, 1)
        # the last byte of page 5 is beyond what a touch looks at
        assert (await workload.worker().touch()).wrong == 1
        worker = workload.worker()
        worker.start_touching(flags=Touch.WHOLE_PAGE)
        assert (await worker.wait()).wrong == 2


@pytest.mark.parametrize("pages", [1, 2, 33, 64])
@pytest.mark.parametrize("order", [Order.SEQUENTIAL, Order.RANDOM])
async def test_touch_comes_to_every_page_once(order: Order, pages: int, tmp_path: Path) -> None:
    spec = WorkloadSpec(size=pages * PAGE, samples=1000)
    async with start_workload(spec, tmp_path) as workload:
        worker = workload.worker()
        await worker.discard(0, pages)
        # discarded pages become present again only by being touched
        assert await worker.resident() == 0
        worker.start_touching(order, flags=Touch.EVERY_PAGE)
        result = await worker.wait()
        assert (result.touches, result.is_good) == (pages, True)
        assert await worker.resident() == pages
        assert len(worker.samples) == pages
        assert sum(worker.samples) == result.total_ns
        assert max(worker.samples) == result.max_ns
        assert result.stall_ns == sum(ns for ns in worker.samples if ns > control.STALL_NS)
        assert sum(worker.histogram) == pages


async def test_histogram_buckets_are_where_the_docstring_says(tmp_path: Path) -> None:
    async with start_workload(WorkloadSpec(size=64 * PAGE, samples=4096), tmp_path) as workload:
        worker = workload.worker()
        worker.start_touching(Order.HOT, nr=64, count=4096)
        await worker.wait()
        counted = [0] * control.HISTOGRAM_SIZE
        for ns in worker.samples:
            (bucket,) = (
                k
                for k in range(control.HISTOGRAM_SIZE)
                if control.bucket_start(k) <= ns < control.bucket_start(k + 1)
            )
            counted[bucket] += 1
        assert counted == list(worker.histogram)


async def test_nine_of_ten_hot_touches_are_in_a_tenth(tmp_path: Path) -> None:
    async with start_workload(WorkloadSpec(size=1000 * PAGE), tmp_path) as workload:
        worker = workload.worker()
        await worker.discard(0, 1000)
        worker.start_touching(Order.HOT, count=400, flags=Touch.EVERY_PAGE)
        await worker.wait()
        hot = await worker.resident(500, 100)
        assert 85 <= hot <= 100  # of 360 touches
        assert 15 <= await worker.resident() - hot <= 40


async def test_touches_without_a_fault_are_no_samples_of_faults(tmp_path: Path) -> None:
    async with start_workload(WorkloadSpec(size=64 * PAGE, samples=1 << 16), tmp_path) as workload:
        worker = workload.worker()
        worker.start_touching(count=1 << 15, flags=Touch.SAMPLE_FAULTS)
        assert (await worker.wait()).touches == 1 << 15
        assert len(worker.samples) == 0


async def test_touching_stops_when_told(tmp_path: Path) -> None:
    async with start_workload(WorkloadSpec(), tmp_path) as workload:
        worker = workload.worker()
        worker.start_touching(Order.HOT, nr=8, flags=Touch.UNTIL_STOPPED)
        with pytest.raises(WorkloadError, match="busy"):
            worker.issue(Command.VERIFY)
        while worker.result.touches < 100:
            pass
        worker.stop()
        assert (await worker.wait()).is_good


async def test_touching_goes_on_while_memory_changes(tmp_path: Path) -> None:
    spec = WorkloadSpec(size=128 * PAGE, threads=2)
    async with start_workload(spec, tmp_path) as workload:
        toucher, changer = workload.worker(thread=1), workload.worker()
        toucher.start_touching(flags=Touch.UNTIL_STOPPED | Touch.WHOLE_PAGE | Touch.EVERY_PAGE)
        for turn in range(30):
            await changer.move(16, 32, MOVED + turn % 2 * (1 << 30))
            await changer.discard(64, 8)
            await changer.write(60, 16, generation=turn)
            await changer.protect(100, 16, step=2)
            await changer.protect(100, 16, step=2, writable=True)
        await changer.unmap(0, 8)
        toucher.stop()
        assert (await toucher.wait()).is_good
        result = await changer.verify()
        assert (result.is_good, result.checked) == (True, 120)


async def test_discarded_pages_are_expected_to_be_zero(tmp_path: Path) -> None:
    spec = WorkloadSpec(size=32 * PAGE)
    start = spec.task_areas()[0].start
    async with start_workload(spec, tmp_path) as workload:
        await workload.worker().discard(4, 8)
        assert peek(workload.pid, start + 4 * PAGE, 8 * PAGE) == bytes(8 * PAGE)
        assert (await workload.worker().verify()).is_good
        poke(workload, start + 4 * PAGE, spec.page(0, 4))
        assert (await workload.worker().verify()).wrong == 1


async def test_moved_and_rewritten_pages_keep_their_index(tmp_path: Path) -> None:
    spec = WorkloadSpec(size=32 * PAGE)
    async with start_workload(spec, tmp_path) as workload:
        worker = workload.worker()
        await worker.move(8, 16, MOVED)
        assert peek(workload.pid, MOVED + PAGE, PAGE) == spec.page(0, 9)
        await worker.write(10, 1, generation=3)
        assert peek(workload.pid, MOVED + 2 * PAGE, PAGE) == page_bytes(spec.seed, 0, 10, 3)
        assert (await worker.verify()).checked == 32


async def test_unmap_more_than_4_gib_in_one_call(tmp_path: Path) -> None:
    spec = WorkloadSpec(size=16 * PAGE, reserve=(4 << 30) + 16 * PAGE)
    async with start_workload(spec, tmp_path) as workload:
        worker = workload.worker()
        result = await worker.verify()
        # of the reserve only the populated pages and their neighbours are looked at
        assert (result.is_good, result.checked) == (True, 16 + 2 * RESERVE_PAGES)
        before = nr_mappings(workload)
        await worker.unmap(spec.main_pages, spec.reserve_pages)
        assert nr_mappings(workload) == before - 1
        assert (await worker.verify()).checked == 16


async def test_protect_splits_the_mapping(tmp_path: Path) -> None:
    async with start_workload(WorkloadSpec(size=64 * PAGE), tmp_path) as workload:
        worker, before = workload.worker(), nr_mappings(workload)
        assert (await worker.protect(0, 64, step=4)).value == 8
        assert nr_mappings(workload) == before + 15
        assert (await worker.verify()).is_good
        await worker.protect(0, 64, step=4, writable=True)
        assert nr_mappings(workload) == before


async def test_forked_children_see_the_same(tmp_path: Path) -> None:
    spec = WorkloadSpec(size=64 * PAGE, children=2, tree=2)
    async with start_workload(spec, tmp_path) as workload:
        parent, child = workload.worker(1), workload.child(1)
        # told before it exists, as when nothing may be lost between fork and check
        child.issue(Command.VERIFY)
        pid = await parent.fork(child)
        assert (await child.wait()).is_good
        assert child.pid == pid
        await child.write(0, 4, generation=9)
        await parent.discard(0, 2)
        assert (await child.verify()).is_good
        assert (await parent.verify()).is_good
        await child.exit(3)
        assert os.waitstatus_to_exitcode(await parent.wait_child(pid)) == 3
        many = await parent.fork_many(5)
        assert (many.value, many.checked, many.is_good) == (5, 5 * 64, True)


async def test_tree_threads_and_zombie(tmp_path: Path) -> None:
    spec = WorkloadSpec(tree=5, threads=3, zombie=True)
    async with start_workload(spec, tmp_path) as workload:
        assert len(set(workload.pids)) == 5
        assert all(nr_threads(pid) == 3 for pid in workload.pids)
        assert await workload.is_running()
        for task in range(5):
            for thread in range(3):
                assert (await workload.worker(task, thread).verify()).is_good
        assert os.waitstatus_to_exitcode(await workload.worker().reap_zombie()) == ZOMBIE_STATUS


async def test_failures_are_told(tmp_path: Path) -> None:
    async with start_workload(WorkloadSpec(), tmp_path) as workload:
        worker = workload.worker()
        with pytest.raises(WorkloadError, match="worker 0, move: mremap: Invalid argument"):
            await worker.move(0, 1, 1)
        with pytest.raises(WorkloadError, match="no such child slot"):
            await worker.run(Command.FORK, 0)
        workload.kept.kill()
        with pytest.raises(WorkloadError, match=r"worker 0 cannot answer: process \d+ ended"):
            await worker.verify()
        assert (await workload.wait()).signal == 9


async def test_a_start_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "workload.control").symlink_to("/proc/version")
    with pytest.raises(WorkloadError, match=r"ended at its start: .*workload\.control: "):
        async with start_workload(WorkloadSpec(), tmp_path):
            pass


def test_impossible_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="size 4095: each of the 1 areas"):
        WorkloadSpec(size=4095)
    with pytest.raises(ValueError, match="each of the 2 areas"):
        WorkloadSpec(size=3 * PAGE, areas=2)
    with pytest.raises(ValueError, match="reserve 4096: not a multiple of 65536"):
        WorkloadSpec(reserve=PAGE)
    with pytest.raises(ValueError, match="at least one task"):
        WorkloadSpec(tree=0)
