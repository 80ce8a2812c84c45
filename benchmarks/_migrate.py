"""One migration of a case, and what it took.

What is measured does not ask a daemon for its own opinion:

drain      from the first instruction of the restored process to its memory being resident,
           all but a 512th (or 64 pages), by its anonymous pages, read every 2 ms; where it forks, to
           the end of the last child, which has looked at every byte
faults     touches that met a page fault and lasted longer than 2 us; latency and summed stall are
           those, measured in the process around each touch
CPU, peak  of the daemon, from its rusage when it ends
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio
from _cases import Case, Source, Way
from _page_server import page_server as our_page_server

from criupy.testing.control_linux import Control, Worker
from criupy.testing.criu_linux import (
    Criu,
    CriuJob,
    Restored,
    dump,
    lazy_dump,
    lazy_pages_daemon,
    our_command,
    page_server,
    restore,
    stock_command,
)
from criupy.testing.link_linux import open_link
from criupy.testing.workload_linux import start_standin, start_workload

SLACK = 1 / 512
LEAST_SLACK = 64  # pages by which the kernel's own count may lag behind
POLL = 0.002
LONGEST = 300.0
QUIET = ["-v2"]  # what is logged of every page would be measured too


class WrongPagesError(Exception):
    """Pages were delivered that hold something else than at the source."""


@dataclass(slots=True)
class Taken:
    """What one run gave: its metrics, the nanoseconds of each fault, and (seconds, resident pages).

    ``alone`` are the faults while nothing else was transferred.
    """

    metrics: dict[str, float]
    waits: Sequence[int]
    alone: Sequence[int] = ()
    resident: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Origin:
    """A dumped process: its images, and the control file that tells what is restored of it what to do."""

    images: Path
    control: Control
    pid: int
    pids: tuple[int, ...]


@contextlib.asynccontextmanager
async def full_images(criu: Criu, case: Case, room: Path) -> AsyncIterator[Origin]:
    """Dump the case's process fully, for all its runs."""
    async with start_workload(case.spec, room) as source:
        origin = Origin(room / "images", source.control, source.pid, source.pids)
        await dump(criu, source.pid, origin.images, extra=QUIET)
        os.sync()  # writing back later would be measured
        yield origin


@contextlib.asynccontextmanager
async def served(
    criu: Criu, case: Case, way: Way, full: Origin | None, room: Path
) -> AsyncIterator[tuple[Origin, tuple[str, int] | None, CriuJob | None]]:
    """Have the source of a run ready: what was dumped, where its pages are to be had, and by whom."""
    async with contextlib.AsyncExitStack() as stack:
        job = address = None
        if way.source is Source.DUMP:
            source = await stack.enter_async_context(start_workload(case.spec, room))
            origin = Origin(room / "images", source.control, source.pid, source.pids)
            pages = await stack.enter_async_context(lazy_dump(criu, source.pid, origin.images, extra=QUIET))
            job, address = pages.job, (pages.address, pages.port)
        else:
            if full is None:
                raise ValueError(f"{case.name}: no full images for {way.name}")
            origin = full
        if way.source is Source.STOCK_SERVER:
            work = room / "server"
            work.mkdir()
            pages = await stack.enter_async_context(page_server(criu, origin.images, work, extra=QUIET))
            job, address = pages.job, (pages.address, pages.port)
        elif way.source is Source.OUR_SERVER:
            words = ("--lazy-pages", "-D", str(origin.images))
            address = stack.enter_context(our_page_server(room / "server", *words))
        if case.link is not None and address is not None:
            link = await stack.enter_async_context(open_link(address, case.link))
            address = (link.address, link.port)
        yield origin, address, job


def daemon_command(criu: Criu, way: Way) -> tuple[tuple[str, ...], list[str]]:
    """Return the daemon's command and its further options."""
    if way.is_stock:
        return stock_command(criu), QUIET
    return our_command(), [*QUIET, *(["--extended"] if way.source is Source.OUR_SERVER else [])]


async def run(criu: Criu, case: Case, way: Way, full: Origin | None, room: Path) -> Taken:
    """Migrate once."""
    take = with_standin if case.alone else migrate
    with trio.fail_after(LONGEST):
        return await take(criu, case, way, full, room)


async def migrate(criu: Criu, case: Case, way: Way, full: Origin | None, room: Path) -> Taken:
    work = room / "work"
    work.mkdir()
    command, extra = daemon_command(criu, way)
    async with served(criu, case, way, full, room) as (origin, address, job):
        control = origin.control.copy(room / "restored.control")
        binds = {origin.control.path: control.path}
        with contextlib.closing(control):
            case.activity.start(control, case.spec)
            async with (
                lazy_pages_daemon(command, origin.images, work, source=address, extra=extra) as daemon,
                restore(criu, origin.images, work, origin.pid, binds=binds, extra=QUIET) as restored,
            ):
                control.gone = restored.gone
                await running(control.worker())
                begin = trio.current_time()
                pages = case.spec.populated_pages * case.spec.tree
                wanted = pages - max(LEAST_SLACK, int(pages * SLACK))
                resident = await drained(restored, origin.pids, wanted, begin)
                await restored.finished()
                ended = await daemon.succeed()
                waits, job_s = await stop(control, case)
                await verify(control, case)
                if job is not None:
                    await job.succeed()
    drain = max(resident[-1][0], job_s) if case.activity.children else resident[-1][0]
    metrics = {
        "drain_s": drain,
        "mb_s": pages * 4096 / drain / 1e6,
        **quantiles(waits, ()),
        "faults": len(waits),
        "stall_s": sum(waits) / 1e9,
        "cpu_s": ended.user_seconds + ended.system_seconds,
        "peak_mb": ended.max_rss / 1e6,
    }
    return Taken(metrics, waits, resident=resident)


async def with_standin(criu: Criu, case: Case, way: Way, full: Origin | None, room: Path) -> Taken:
    """Touch pages of a stand-in for criu restore while nothing else is transferred, then while all is."""
    work, own = room / "work", room / "restorer"
    work.mkdir()
    own.mkdir()
    command, extra = daemon_command(criu, way)
    async with (
        served(criu, case, way, full, room) as (origin, address, job),
        lazy_pages_daemon(command, origin.images, work, source=address, extra=extra) as daemon,
        start_standin(
            case.spec,
            work / "lazy-pages.socket",
            own,
            pid_base=origin.pid,
            withheld=case.alone,
            withheld_pause_us=case.activity.pause_us,
        ) as standin,
    ):
        await standin.wait_registered()
        alone = standin.worker().samples
        good = standin.early_result_is_good
        case.activity.start(standin.control, case.spec)
        await standin.finish()
        ended = await daemon.succeed()
        waits, _ = await stop(standin.control, case)
        if not good:
            raise WrongPagesError("pages touched before the restore had finished")
        await verify(standin.control, case)
        if job is not None:
            await job.succeed()
    metrics = quantiles(waits, alone)
    if waits:
        metrics |= {"faults": len(waits), "stall_s": sum(waits) / 1e9}
    metrics |= {"cpu_s": ended.user_seconds + ended.system_seconds, "peak_mb": ended.max_rss / 1e6}
    return Taken(metrics, waits, alone)


async def running(worker: Worker) -> None:
    """Wait until a process runs: its first touch waits for a page before its heart beats."""
    beat, begun = worker.heartbeat, worker.result.started_ns
    while worker.heartbeat == beat and worker.result.started_ns == begun:
        await trio.sleep(POLL / 4)


async def host_pid(restored: Restored, pid: int) -> int:
    """Return the pid of a restored process as this script sees it."""
    while True:
        try:
            return restored.job.kept.host_pid(pid)
        except ProcessLookupError:  # missed while it gets another parent, as criu ends
            await trio.sleep(POLL)


@contextlib.contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[int]]:
    descriptors: list[int] = []
    try:
        for path in paths:
            descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401 - one may fail
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def drained(
    restored: Restored, pids: Sequence[int], wanted: int, begin: float
) -> list[tuple[float, int]]:
    """Wait until the processes have so many pages of their own together; return how they grew."""
    own = [await host_pid(restored, pid) for pid in pids]
    pause = POLL * max(1, len(own) // 4)  # reading is not free
    grown: list[tuple[float, int]] = []
    with opened([Path(f"/proc/{pid}/statm") for pid in own]) as files:
        while True:
            fields = [os.pread(descriptor, 128, 0).split() for descriptor in files]
            pages = sum(int(each[1]) - int(each[2]) for each in fields)
            grown.append((trio.current_time() - begin, pages))
            if pages >= wanted:
                return grown
            await trio.sleep(pause)


async def stop(control: Control, case: Case) -> tuple[array[int], float]:
    """End what the process does; return the nanoseconds of its faults and the seconds of its last command."""
    spec = case.spec
    workers = [control.worker(*divmod(number, spec.threads)) for number in range(spec.tree * spec.threads)]
    waits: array[int] = array("I")
    seconds = 0.0
    for worker in workers:
        worker.stop()
    for worker in workers:
        result = await worker.wait()
        if not result.is_good or result.value != case.activity.children:
            raise WrongPagesError(f"{result}")
        seconds = max(seconds, result.seconds)
        if case.activity.order is not None:
            samples = worker.samples
            if len(samples) >= spec.samples:
                raise RuntimeError(f"there were more than {spec.samples} faults of one thread")
            waits += samples
    return waits, seconds


async def verify(control: Control, case: Case) -> None:
    """Look at every byte of every process."""
    for task in range(case.spec.tree):
        result = await control.worker(task).verify()
        if not result.is_good:
            raise WrongPagesError(f"task {task}: {result}")


def quantiles(waits: Sequence[int], alone: Sequence[int]) -> dict[str, float]:
    """Return what is said of faults: of one run, or of those of several together."""
    metrics: dict[str, float] = {}
    for name, taken in (("", waits), ("alone_", alone)):
        ordered = sorted(taken)
        if ordered:
            metrics[f"{name}p50_us"] = quantile(ordered, 0.5) / 1e3
            metrics[f"{name}p99_us"] = quantile(ordered, 0.99) / 1e3
    if waits and alone:
        metrics["p99_over_alone"] = metrics["p99_us"] / metrics["alone_p99_us"]
    return metrics


def quantile(ordered: Sequence[int], part: float) -> float:
    """Return a quantile of sorted values, 0 without any."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0
