"""What the parts of our core cost, and what the machine can do at all, in one run.

    python benchmarks/limits.py [--rounds N] [--json FILE] [--readme docs/benchmarks.md]

the core      look-up of a page, one after the other at random addresses; a frame written
              and read; the ioctls as the pager calls them, into memory without huge pages
the machine   copying memory, a page fault, a thread that is woken, a fault that another
              thread answers, TCP over loopback
sources       what criu dump --lazy-pages and criupy-page-server deliver to a client that
              throws the pages away, by the length of a request and what is outstanding;
              also of a process that has every second page
links         criupy.testing's link: what it is told to be, and what it is

All but the servers and the link is C (limits*.c), compiled here with the sources of the core.
Medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import trio
from _limits_program import Lines, build, run, serving
from _page_clients import MIB, Running, server
from _report import Report, add_report_options, positive, publish

from criupy.images import lazy_extents, read_mm, read_pagemap
from criupy.testing.criu_linux import Criu, find_criu, lazy_dump
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.link_linux import Conditions, open_link
from criupy.testing.spec import WorkloadSpec
from criupy.testing.workload_linux import Workload, start_workload

MARK = ("<!-- limits: begin -->", "<!-- limits: end -->")
WHO = ("stock", "ours")
#: Pages by one request, and outstanding at most.
WINDOWS = ((1, 1), (1, 16), (16, 64), (64, 64), (64, 128), (64, 256), (256, 512))
SOURCE_SIZE = 128 * MIB
#: A process that has every second page, and the pages outstanding, each of which is asked for by itself.
SCATTERED, SCATTERED_WINDOW = WorkloadSpec(size=256 * MIB, fragmented=True), 16
EXTENTS = (1, 1024, 262_144, 1_000_000)
CHUNKS = (4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20)
READS = (4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
STREAM = ("stream", "stream CPU")
#: What a link is told, what it is called, and how much passes it to be measured.
LINKS = (
    ("no limit", Conditions(), 512 * MIB),
    ("10 ms, 1.25 GB/s", Conditions(delay=0.005, bandwidth=1.25e9), 512 * MIB),
    ("10 ms, 125 MB/s", Conditions(delay=0.005, bandwidth=125e6), 64 * MIB),
)


def size_name(size: int) -> str:
    return f"{size >> 20} MiB" if size >= MIB else f"{size >> 10} KiB"


A_FAULT = ("a page fault", "bare fault")
#: Our part, its key, the limit beside it, and its key.
OURS = (
    *((f"look-up, {nr:,} extent{'s'[: nr > 1]}", f"lookup {nr}", *A_FAULT) for nr in EXTENTS),
    ("frame, written and read", "frame", "a page asked for over loopback", "request"),
    ("`UFFDIO_COPY` of a page", "copy page", *A_FAULT),
    ("... with `DONTWAKE`, and a `UFFDIO_WAKE` for 16", "copy page, wake later", *A_FAULT),
    ("`UFFDIO_COPY` of a page, 64 threads wait for others", "copy page, waited", *A_FAULT),
    ("... with `DONTWAKE`, and a `UFFDIO_WAKE` for 16", "copy page, waited, wake later", *A_FAULT),
    ("`UFFDIO_WAKE`, nobody waits", "wake", "a thread woken", "wake-up"),
)
#: What the machine does, and its key where the kernel places the threads, where they share a
#: core, have one each, and have one each but do not sleep.
MACHINE = (
    ("a thread woken by an eventfd", ("wake-up", "wake-up, one core", "wake-up, two cores", None)),
    (
        "a fault answered by a thread: read, `UFFDIO_COPY`",
        ("userfault", "userfault, one core", "userfault, two cores", "userfault, spinning"),
    ),
    (
        "a page asked for by TCP over loopback",
        ("request", "request, one core", "request, two cores", "request, spinning"),
    ),
)


async def from_dump(criu: Criu, source: Workload, program: Path, each: int, window: int, room: Path) -> float:
    """Dump lazily and fetch; the process goes on afterwards."""
    async with lazy_dump(criu, source.pid, room) as dump:
        found = lazy_extents(read_pagemap(room, source.pid), read_mm(room, source.pid))
        if source.spec.fragmented:
            what = (found.starts[0], found.total_pages, each, window, 1)
        else:
            nr_pages, start = max(zip(found.nr_pages, found.starts, strict=True))
            what = (start, asked(nr_pages, each), each, window, 0)
        words = (dump.port, dump.frame_size, source.pid, *what)
        taken = await trio.to_thread.run_sync(run, program, "fetch", *words)
    return taken["fetch"][1]


def from_server(running: Running, images: WrittenImages, program: Path, each: int, window: int) -> float:
    task, spec = images.tasks[0], images.spec
    pages = spec.populated_pages if spec.fragmented else asked(spec.populated_pages, each)
    words = (running.port, running.frame_size, task.pid, task.runs[0].start, pages, each, window)
    return run(program, "fetch", *words, int(spec.fragmented))["fetch"][1]


def asked(nr_pages: int, each: int) -> int:
    """Count the pages to ask for: single ones would take long."""
    return nr_pages // 4 if each == 1 else nr_pages


async def links(program: Path) -> dict[str, dict[str, float]]:
    found = {}
    with serving(program) as port:
        for name, conditions, length in LINKS:
            async with open_link(("127.0.0.1", port), conditions) as link:
                count = 50 if conditions.delay else 1000
                trip = await trio.to_thread.run_sync(run, program, "round-trip", link.port, count)
                stream = await trio.to_thread.run_sync(run, program, "stream", link.port, length)
            found[name] = {"round_trip_ms": trip["round trip"][1], "mb_s": stream["stream"][1]}
    return found


async def measure(criu: Criu, rounds: int) -> Report:
    measured: list[Lines] = []
    sources: dict[str, dict[str, list[float]]] = {}
    passed: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="criupy-bench-") as folder:
        room = Path(folder)
        program = build(room / "limits")
        count = "new" if criu.frame_size == 32 else "old"
        images = {
            spec: write_images(room / f"images-{number}", spec, style="full", count=count)
            for number, spec in enumerate((WorkloadSpec(size=SOURCE_SIZE), SCATTERED))
        }
        for number in range(rounds):
            measured.append(run(program, "measure"))
            for spec, written in images.items():
                async with start_workload(spec, room) as source:
                    for each, window in [(1, SCATTERED_WINDOW)] if spec.fragmented else WINDOWS:
                        name = f"{each}{' of 2' * spec.fragmented}/{window}"
                        case = sources.setdefault(name, {who: [] for who in WHO})
                        dumped = room / f"dump-{number}-{name.replace('/', '-')}"
                        case["stock"].append(await from_dump(criu, source, program, each, window, dumped))
                        with server("ours", criu, written, room) as running:
                            case["ours"].append(from_server(running, written, program, each, window))
            for name, values in (await links(program)).items():
                for what, value in values.items():
                    passed.setdefault(name, {}).setdefault(what, []).append(value)
            print(f"{number + 1}/{rounds}", file=sys.stderr)
    return {
        "criu": ".".join(map(str, criu.version)),
        "kernel": platform.release().split("-")[0],
        "cores": os.cpu_count(),
        "rounds": rounds,
        "measured": {
            key: {"unit": unit, "runs": [lines[key][1] for lines in measured]}
            for key, (unit, _) in measured[0].items()
        },
        "sources": sources,
        "links": passed,
    }


# ---- the table ------------------------------------------------------------------------------


def digits(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def cell(report: Report, key: str | None) -> str:
    """Write the median of what has this key; there is none where a machine lacks what it takes."""
    case = report["measured"].get(key)
    return f"{digits(statistics.median(case['runs']))} {case['unit']}" if case else "-"


def table(report: dict[str, Any]) -> str:
    """Make the Markdown tables of medians."""
    lines = [
        (
            f"Linux {report['kernel']}, {report['cores']} cores, criu {report['criu']}; "
            f"medians of {report['rounds']} rounds in one run."
        ),
        "",
        "| ours | | beside it | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {ours} | {cell(report, key)} | {limit} | {cell(report, limit_key)} |"
        for ours, key, limit, limit_key in OURS
    ]
    lines += [
        "",
        "| `UFFDIO_COPY`, at a time | by one thread | by two |",
        "|---|---|---|",
    ]
    lines += [
        f"| {what} | {cell(report, one)} | {cell(report, two)} |"
        for what, one, two in (
            *((size_name(size), f"copy {size}", f"copy by two {size}") for size in CHUNKS),
            ("2 MiB, from memory and not from the cache", "copy uncached", None),
            ("beside it: memcpy", "memcpy", "memcpy by two"),
        )
    ]
    lines += [
        "",
        "| the machine, p50 | threads anywhere | on one core | on two | on two, and none sleeps |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {what} | {' | '.join(cell(report, key) for key in keys)} |" for what, keys in MACHINE]
    lines += [
        "",
        "| one TCP stream over loopback | bandwidth | CPU of the receiver |",
        "|---|---|---|",
    ]
    lines += [
        f"| {size_name(size)} a read | {' | '.join(cell(report, f'{key} {size}') for key in STREAM)} |"
        for size in READS
    ]
    lines += [
        "",
        "| pages a request / outstanding | `criu dump --lazy-pages` | `criupy-page-server` |",
        "|---|---|---|",
    ]
    for name, case in report["sources"].items():
        cells = " | ".join(f"{digits(statistics.median(case[who]))} MB/s" for who in WHO)
        lines.append(f"| {name.replace('/', ' / ')} | {cells} |")
    lines += [
        "",
        "| the link, told to be | round trip of a byte | one stream |",
        "|---|---|---|",
    ]
    for name, case in report["links"].items():
        trip, rate = (statistics.median(case[what]) for what in ("round_trip_ms", "mb_s"))
        lines.append(f"| {name} | {digits(trip)} ms | {digits(rate)} MB/s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the parts of the core, and the machine.")
    parser.add_argument("--rounds", type=positive, default=5)
    add_report_options(parser)
    options = parser.parse_args()

    def measured() -> Report:
        found, reasons = find_criu()
        if not found:
            raise SystemExit(f"no CRIU to compare with: {'; '.join(reasons)}")
        return trio.run(measure, found[0], options.rounds)

    publish(options, measured, table, MARK)


if __name__ == "__main__":
    main()
