"""Compare criupy-lazy-pages with criu lazy-pages: same source, same process, in turn, in one run.

    python benchmarks/lazy_pages.py [--rounds N] [--json FILE] [--readme README.md]

For each workload and round a real process is dumped with `criu dump --lazy-pages`,
restored in a pid namespace of this machine, and served by one daemon, then by the
other. What is measured does not ask either daemon for its own opinion:

drain      from the first instruction of the restored process to its memory being
           resident, all but the last 256 pages, by its RSS read every 2 ms
faults     touches of the process that took longer than 5 us; latency and summed
           stall are those, measured in the process around each touch
CPU, peak  of the daemon, from its rusage when it ends

Medians over the rounds are printed and written; the ratio is stock over ours.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from _report import add_report_options, publish

from criupy.testing.control_linux import Control, Order, Touch
from criupy.testing.criu_linux import (
    Criu,
    Restored,
    find_criu,
    lazy_dump,
    lazy_pages_daemon,
    our_command,
    restore,
    stock_command,
)
from criupy.testing.spec import WorkloadSpec
from criupy.testing.workload_linux import start_workload

MIB = 1 << 20
PAGE = 4096
SLACK_PAGES = 256
FAULT_NS = 5000
POLL = 0.002
UNLIMITED = 1 << 40

MARK = ("<!-- benchmark: begin -->", "<!-- benchmark: end -->")
COLUMNS = {
    "drain_s": ("drain", "s", 3),
    "faults": ("demand faults", "", 0),
    "p50_us": ("fault p50", "us", 0),
    "p99_us": ("fault p99", "us", 0),
    "stall_s": ("summed stall", "s", 3),
    "cpu_s": ("daemon CPU", "s", 2),
    "peak_mb": ("daemon peak memory", "MB", 0),
}


def random_touches(control: Control) -> None:
    control.worker().start_touching(Order.RANDOM, count=UNLIMITED, seed=7, flags=Touch.UNTIL_STOPPED)


def idle(control: Control) -> None:
    """Leave the process to itself."""


def cases(size: int) -> dict[str, tuple[WorkloadSpec, Callable[[Control], None]]]:
    busy = WorkloadSpec(size=size, samples=8_000_000)
    return {"random": (busy, random_touches), "idle": (WorkloadSpec(size=size), idle)}


async def host_pid(restored: Restored, pid: int) -> int:
    """Return the pid of a restored process as this script sees it."""
    while True:
        try:
            return restored.job.kept.host_pid(pid)
        except ProcessLookupError:  # missed while it gets another parent, as criu ends
            await trio.sleep(POLL)


async def resident(host_pid: int, pages: int) -> None:
    """Wait until a process has this many pages."""
    statm = Path(f"/proc/{host_pid}/statm")
    while int(statm.read_text().split()[1]) < pages:
        await trio.sleep(POLL)


async def run(
    criu: Criu, command: tuple[str, ...], spec: WorkloadSpec, orders: Callable[[Control], None], room: Path
) -> dict[str, float]:
    images, work = room / "images", room / "work"
    work.mkdir()
    async with start_workload(spec, room) as source, lazy_dump(criu, source.pid, images) as pages:
        control = source.control.copy(room / "restored.control")
        orders(control)
        worker = control.worker()
        async with (
            lazy_pages_daemon(
                command, images, work, source=(pages.address, pages.port), extra=["-v2"]
            ) as daemon,
            restore(
                criu, images, work, source.pid, binds={source.control.path: control.path}, extra=["-v2"]
            ) as restored,
        ):
            beat = worker.heartbeat
            while worker.heartbeat == beat:
                await trio.sleep(POLL / 4)
            begin = trio.current_time()
            await resident(await host_pid(restored, source.pid), spec.main_pages - SLACK_PAGES)
            drain = trio.current_time() - begin
            await restored.finished()
            ended = await daemon.succeed()
            if not worker.is_idle:
                worker.stop()
                await worker.wait()
            faults = sorted(ns for ns in worker.samples if ns > FAULT_NS)
            result = await worker.verify()
            if not result.is_good:
                raise SystemExit(f"{command[0]} delivered wrong pages: {result}")
            await pages.job.succeed()
        control.close()
    return {
        "drain_s": drain,
        "faults": len(faults),
        "p50_us": faults[len(faults) // 2] / 1e3 if faults else 0.0,
        "p99_us": faults[len(faults) * 99 // 100] / 1e3 if faults else 0.0,
        "stall_s": sum(faults) / 1e9,
        "cpu_s": ended.user_seconds + ended.system_seconds,
        "peak_mb": ended.max_rss / 1e6,
    }


async def compare(rounds: int, size: int) -> dict[str, Any]:
    found, reasons = find_criu()
    if not found:
        raise SystemExit(f"no CRIU to compare with: {'; '.join(reasons)}")
    criu = found[0]
    daemons = {"stock": stock_command(criu), "ours": our_command()}
    report: dict[str, Any] = {
        "criu": ".".join(map(str, criu.version)),
        "kernel": platform.release().split("-")[0],
        "cores": os.cpu_count(),
        "rounds": rounds,
        "size_mib": size // MIB,
        "cases": {},
    }
    for name, (spec, orders) in cases(size).items():
        runs: dict[str, list[dict[str, float]]] = {who: [] for who in daemons}
        for number in range(rounds):
            for who, command in daemons.items():
                with tempfile.TemporaryDirectory(prefix="criupy-bench-") as room:
                    measured = await run(criu, command, spec, orders, Path(room))
                runs[who].append(measured)
                print(f"{name} {number + 1}/{rounds} {who}: {measured['drain_s']:.3f} s", file=sys.stderr)
        medians = {
            who: {key: statistics.median(run[key] for run in taken) for key in COLUMNS}
            for who, taken in runs.items()
        }
        report["cases"][name] = {"median": medians, "runs": runs}
    return report


def table(report: dict[str, Any]) -> str:
    """Make a Markdown table of medians and ratios."""
    lines = [
        (
            f"{report['size_mib']} MiB process, criu {report['criu']} at the source, "
            f"Linux {report['kernel']}, {report['cores']} cores, loopback; "
            f"medians of {report['rounds']} rounds, in turn, in one run."
        ),
        "",
        "| process | | `criu lazy-pages` | `criupy-lazy-pages` | stock / ours |",
        "|---|---|---|---|---|",
    ]
    titles = {"random": "touches random pages without pause", "idle": "idle"}
    for name, case in report["cases"].items():
        stock, ours = case["median"]["stock"], case["median"]["ours"]
        for key, (title, unit, digits) in COLUMNS.items():
            if not stock[key] and not ours[key]:
                continue
            ratio = f"{stock[key] / ours[key]:.1f}" if ours[key] else ""
            cells = [f"{side[key]:,.{digits}f} {unit}".strip() for side in (stock, ours)]
            lines.append(f"| {titles[name]} | {title} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare criupy-lazy-pages with criu lazy-pages.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=512, metavar="MIB")
    add_report_options(parser)
    options = parser.parse_args()
    publish(options, lambda: trio.run(compare, options.rounds, options.size * MIB), table, MARK)


if __name__ == "__main__":
    main()
