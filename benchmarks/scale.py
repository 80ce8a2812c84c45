"""What a fault, the start and the memory cost as a restore grows: extents, processes, threads, size.

    python benchmarks/scale.py [--rounds N] [--json FILE] [--picture FILE] [--readme README.md]

ready       from exec of criupy-lazy-pages, as it is installed, to the byte on --status-fd, which
            a restore waits for; median of 20
start-up    the same with dumps of many extents (one page each) and of many processes
memory      what the daemon has mapped for itself (RssAnon) beyond that with one small extent, when
            it is ready: the images as they were read; the state of each page comes with its process
faults      of a stand-in for criu restore, touches of random pages that have to be fetched, with
            nothing transferred in the background; p50 and p99 as the touching thread sees them.
            From local images, from criupy-page-server on this machine, and by stock
            criu lazy-pages from local images. While one thing grows, the others do not: one
            process, one thread, 1 GiB, one extent. All threads together touch at the same
            rate; of many processes one touches. Sizes whose images and pages would not fit the free
            memory are left out

Medians over the rounds, in which ways and sizes take turns; one extent and most of them, of which
the quotient is aimed at, have three times as many.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio
from _page_server import page_server
from _report import add_report_options, positive, publish

from criupy.images import PageFlags, PagemapStyle, write_pagemap
from criupy.testing.criu_linux import Criu, find_criu, lazy_pages_daemon, our_command, stock_command
from criupy.testing.images import write_images
from criupy.testing.spec import AREA_BASE, PAGE, RESERVE_BASE, RESERVE_PAGES, WorkloadSpec
from criupy.testing.workload_linux import start_standin

MIB = 1 << 20
FAULT_NS = 5000
TOUCHES = 1000
STOCK_TOUCHES = 200  # its faults take a millisecond each, in the end
PAUSE_US = 100
LOADED = 0.3  # after it is ready a daemon loads what criu's start leaves it time for
READY_TIMES = 20
MARK = ("<!-- scale: begin -->", "<!-- scale: end -->")
OURS = ("local images", "page server")
STOCK = "stock, local images"

MOST_RATIO, MOST_READY_MS, MOST_START_S, MOST_BYTES = 1.1, 150, 3, 64  # aimed at

EXTENTS = (1, 64, 4096, 32_768, 262_144)
PROCESSES = (1, 10, 100, 1000)
THREADS = (1, 4, 16, 64)
SIZES = (64, 256, 1024, 4096)
START_EXTENTS = (1, 1000, 10_000, 100_000, 1_000_000)
GROWS = {
    "extents": "extents of 1 GiB",
    "processes": "processes of 512 KiB",
    "threads": "threads that fault",
    "size": "MiB, an extent every 4",
}

# ---- dumps -----------------------------------------------------------------------------------------


def split(images: Path, nr_pages: int, extents: int, style: PagemapStyle) -> None:
    """Let the pagemap of the only task say the same in so many entries."""
    each = nr_pages // extents
    starts = array("Q", range(AREA_BASE, AREA_BASE + nr_pages * PAGE, each * PAGE))
    flags = array("B", (int(PageFlags.LAZY | PageFlags.PRESENT),)) * extents
    with (images / "pagemap-100.img").open("wb") as file:
        write_pagemap(file, 1, starts, array("Q", (each,)) * extents, flags, style)


def write_hollow(images: Path, extents: int) -> None:
    """Write a dump of one task with so many extents of a page each, whose pages file is a hole."""
    length, room = 2 * extents * PAGE, RESERVE_PAGES * PAGE
    write_images(images, WorkloadSpec(reserve=-(-length // room) * room), style="full")
    starts = array("Q", range(RESERVE_BASE, RESERVE_BASE + length, 2 * PAGE))
    flags = array("B", (int(PageFlags.LAZY | PageFlags.PRESENT),)) * extents
    with (images / "pagemap-100.img").open("wb") as file:
        write_pagemap(file, 1, starts, array("Q", (1,)) * extents, flags, PagemapStyle.NEW)
    with (images / "pages-1.img").open("wb") as file:
        file.truncate(extents * PAGE)


# ---- start-up --------------------------------------------------------------------------------------


def anonymous(pid: int) -> int:
    """Return the bytes of a process that are no file's."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "RssAnon" in line)
    return int(line.split()[1]) * 1024


def start(images: Path, *words: str) -> tuple[float, int]:
    """Run the command until it is ready; return after how many seconds, and its memory then."""
    command = Path(sys.executable).with_name("criupy-lazy-pages")
    with tempfile.TemporaryDirectory(prefix="criupy-bench-") as work:
        reader, writer = os.pipe()
        full = [command, "-D", images, "-W", work, "-o", "log", "--status-fd", str(writer), *words]
        with open(reader, "rb") as status:  # noqa: PTH123
            begin = time.perf_counter()
            with subprocess.Popen(full, pass_fds=[writer], stderr=subprocess.DEVNULL) as process:
                os.close(writer)
                try:
                    byte = status.read(1)
                    took = time.perf_counter() - begin
                    if byte != b"\0":
                        raise SystemExit(f"criupy-lazy-pages did not start: {Path(work, 'log').read_text()}")
                    found = anonymous(process.pid)
                finally:
                    process.kill()
    return took, found


def measure_ready(room: Path) -> dict[str, list[float]]:
    spec = WorkloadSpec(size=64 * MIB)
    full = write_images(room / "full", spec, style="full").directory
    lazy = write_images(room / "lazy", spec).directory
    remote = ("--page-server", "--address", "127.0.0.1", "--port", "9")
    found: dict[str, list[float]] = {way: [] for way in OURS}
    for _ in range(READY_TIMES):
        found["local images"].append(start(full)[0])
        found["page server"].append(start(lazy, *remote)[0])
    return found


def measure_start(room: Path, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"extents": {}, "processes": {}}
    base = 0
    for extents in START_EXTENTS:
        write_hollow(room / f"extents-{extents}", extents)
        runs = [start(room / f"extents-{extents}") for _ in range(rounds)]
        memory = int(statistics.median(memory for _, memory in runs))
        base = base or memory
        found["extents"][extents] = {"s": [took for took, _ in runs], "bytes": memory - base}
    for tree in PROCESSES:
        images = write_images(room / f"tree-{tree}", WorkloadSpec(size=PAGE, tree=tree), style="full")
        found["processes"][tree] = {"s": [start(images.directory)[0] for _ in range(rounds)]}
    return found


# ---- faults ----------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


async def faults(
    criu: Criu | None, way: str, images: Path, spec: WorkloadSpec, room: Path
) -> dict[str, float]:
    """Serve one restore that does not finish; return what the touches of its first task took."""
    touches = STOCK_TOUCHES if way == STOCK else TOUCHES
    spec = replace(spec, samples=touches)
    work = room / "work"
    for directory in (work, room / "restorer"):
        directory.mkdir()
    async with contextlib.AsyncExitStack() as stack:
        source, extra = None, ["-v1"]
        if way == "page server":
            source = stack.enter_context(page_server(room / "server", "--lazy-pages", "-D", str(images)))
            extra.append("--extended")
        command = stock_command(criu) if criu and way == STOCK else our_command()
        await stack.enter_async_context(lazy_pages_daemon(command, images, work, source=source, extra=extra))
        await trio.sleep(LOADED)
        standin = await stack.enter_async_context(
            start_standin(
                spec,
                work / "lazy-pages.socket",
                room / "restorer",
                register_delay_us=0,
                withheld=max(1, touches // spec.threads),
                withheld_pause_us=PAUSE_US * spec.threads,
            )
        )
        await standin.wait_registered()
        workers = [standin.worker(0, thread) for thread in range(spec.threads)]
        if not all(worker.result.is_good for worker in workers):
            raise SystemExit(f"{way}: wrong pages were delivered")
        waits = [ns / 1000 for worker in workers for ns in worker.samples if ns > FAULT_NS]
        await standin.abandon()
    return {"p50_us": percentile(waits, 50), "p99_us": percentile(waits, 99), "faults": len(waits)}


async def measure_faults(criu: Criu | None, rounds: int, room: Path) -> dict[str, Any]:
    style = PagemapStyle.OLD if criu and criu.frame_size == 24 else PagemapStyle.NEW
    count = style.value
    ways = (*OURS, STOCK) if criu else OURS
    runs: dict[str, dict[str, dict[int, list[dict[str, float]]]]] = {
        name: {way: {} for way in ways} for name in GROWS
    }

    async def each(name: str, nr: int, images: Path, spec: WorkloadSpec) -> None:
        for way in ways:
            with tempfile.TemporaryDirectory(prefix="criupy-bench-") as run:
                took = await faults(criu, way, images, spec, Path(run))
            runs[name][way].setdefault(nr, []).append(took)
            print(f"{name} {nr} {way}: {took}", file=sys.stderr)

    giga = WorkloadSpec(size=1024 * MIB)
    whole = write_images(
        room / "whole", giga, style="full", count=count, entry_pages=giga.main_pages
    ).directory
    for extents in (*EXTENTS, *(EXTENTS[0], EXTENTS[-1]) * 2) * rounds:
        split(whole, giga.main_pages, extents, style)
        await each("extents", extents, whole, giga)
    split(whole, giga.main_pages, 1, style)
    for threads in THREADS * rounds:
        await each("threads", threads, whole, replace(giga, threads=threads))
    for tree in PROCESSES:
        spec = WorkloadSpec(size=MIB // 2, tree=tree)
        images = write_images(room / f"tree-{tree}", spec, style="full", count=count).directory
        for _ in range(rounds):
            await each("processes", tree, images, spec)
    memory = os.sysconf("SC_AVPHYS_PAGES") * PAGE
    for size in (size for size in SIZES if 2 * size * MIB < memory):
        spec = WorkloadSpec(size=size * MIB)
        with tempfile.TemporaryDirectory(prefix="criupy-bench-", dir=room) as place:
            images = write_images(Path(place), spec, style="full", count=count).directory
            for _ in range(rounds):
                await each("size", size, images, spec)
    return runs


def measure(rounds: int) -> dict[str, Any]:
    found, _ = find_criu()
    criu = found[0] if found else None
    with tempfile.TemporaryDirectory(prefix="criupy-bench-") as room:
        return {
            "criu": ".".join(map(str, criu.version)) if criu else None,
            "kernel": platform.release().split("-")[0],
            "cores": os.cpu_count(),
            "rounds": rounds,
            "ready_s": measure_ready(Path(room)),
            "start": measure_start(Path(room), rounds),
            "faults": trio.run(measure_faults, criu, rounds, Path(room)),
        }


# ---- what is shown of it -----------------------------------------------------------------------------


def medians(runs: dict[str, list[dict[str, float]]], key: str) -> dict[int, float]:
    """Reduce the runs of one way to medians by size; JSON has made words of the numbers."""
    return {int(nr): statistics.median(run[key] for run in taken) for nr, taken in runs.items()}


def seconds(started: dict[str, Any]) -> dict[int, float]:
    return {int(nr): statistics.median(run["s"]) for nr, run in started.items()}


def table(report: dict[str, Any]) -> str:
    """Make a Markdown table: what it costs at the smallest and at the largest, and the ratio."""
    ready = {way: statistics.median(took) * 1000 for way, took in report["ready_s"].items()}
    lines = [
        f"Linux {report['kernel']}, {report['cores']} cores, criu {report['criu']}; "
        f"medians of {report['rounds']} rounds. Ready "
        + " and ".join(f"{ms:.0f} ms ({way})" for way, ms in ready.items())
        + f" after exec, medians of {READY_TIMES}.",
        "",
        "| cost | of | smallest | largest | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, what in GROWS.items():
        for way, runs in report["faults"][name].items():
            p50 = medians(runs, "p50_us")
            low, high = min(p50), max(p50)
            lines.append(
                f"| fault p50, {way} | {low:,} to {high:,} {what} "
                f"| {p50[low]:.1f} us | {p50[high]:.1f} us | {p50[high] / p50[low]:.2f} |"
            )
    for name, started in report["start"].items():
        took = seconds(started)
        low, high = min(took), max(took)
        lines.append(
            f"| start-up | {low:,} to {high:,} {name} "
            f"| {took[low]:.2f} s | {took[high]:.2f} s | {took[high] / took[low]:.1f} |"
        )
    extents, last = max((int(nr), run) for nr, run in report["start"]["extents"].items())
    lines.append(
        f"| memory when ready | {extents:,} extents | | {last['bytes'] / 1e6:.0f} MB "
        f"| {last['bytes'] / extents:.0f} bytes each |"
    )
    lines += ["", "| aim | measured | |", "|---|---|---|"]
    lines += [
        f"| {what} ≤ {limit:g}{unit} | {value:.{digits}f}{unit} "
        f"| {'reached' if value <= limit else '**missed**'} |"
        for what, value, limit, unit, digits in judged(report)
    ]
    return "\n".join(lines)


def judged(report: dict[str, Any]) -> Iterator[tuple[str, float, float, str, int]]:
    """Yield of each aim: what, the value, the limit, their unit, digits behind the point."""
    for way in OURS:
        p50 = medians(report["faults"]["extents"][way], "p50_us")
        low, high = min(p50), max(p50)
        what = f"fault p50 at {high:,} extents over that at {low:,}, {way}"
        yield what, p50[high] / p50[low], MOST_RATIO, "", 2
    for way, took in report["ready_s"].items():
        yield f"ready after exec, {way}", statistics.median(took) * 1000, MOST_READY_MS, " ms", 0
    extents, last = max((int(nr), run) for nr, run in report["start"]["extents"].items())
    yield f"start-up with {extents:,} extents", statistics.median(last["s"]), MOST_START_S, " s", 2
    yield "memory when ready, an extent", last["bytes"] / extents, MOST_BYTES, " bytes", 0


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot every cost against size."""
    import matplotlib as mpl  # not everybody who measures draws

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "criupy"  # the same picture of the same numbers
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for axis, (name, what) in zip(axes.flat, GROWS.items(), strict=False):
        for way, runs in report["faults"][name].items():
            for key, style in (("p50_us", "o-"), ("p99_us", "o:")):
                found = sorted(medians(runs, key).items())
                color = f"C{(*OURS, STOCK).index(way)}"
                axis.plot(*zip(*found, strict=True), style, color=color, label=f"{way}, {key[:3]}")
        axis.set(xscale="log", yscale="log", xlabel=what, ylabel="a fault, us")
    axes.flat[0].legend(fontsize="small")
    for name, started in report["start"].items():
        axes.flat[4].plot(*zip(*sorted(seconds(started).items()), strict=True), "o-", label=name)
    axes.flat[4].set(xscale="log", xlabel="extents or processes", ylabel="start-up, s", ylim=(0, None))
    axes.flat[4].legend(fontsize="small")
    memory = sorted((int(nr), run["bytes"] / 1e6) for nr, run in report["start"]["extents"].items())
    axes.flat[5].plot(*zip(*memory, strict=True), "o-")
    axes.flat[5].set(xscale="log", xlabel="extents", ylabel="memory, MB", ylim=(0, None))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how costs grow with a restore.")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the plots there, as SVG")
    add_report_options(parser)
    options = parser.parse_args()
    taken: list[dict[str, Any]] = []

    def shown(report: dict[str, Any]) -> str:
        taken.append(report)
        return table(report)

    publish(options, lambda: measure(options.rounds), shown, MARK)
    if options.picture:
        draw(taken[0], options.picture)


if __name__ == "__main__":
    main()
