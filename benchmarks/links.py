"""How long a thread waits for a page while all others are being transferred, over links with a round trip.

    python benchmarks/links.py [--rounds N] [--size MIB] [--json FILE] [--readme README.md]

A real process is dumped with `criu dump --lazy-pages` and restored on this machine; between
lies criupy.testing's link, whose bandwidth all connections share. Its threads touch random
pages with pauses from their first instruction on, and measure each touch.

stock       criu lazy-pages, connected to the dump; of a smaller process, for it takes so long
one lane    criupy-lazy-pages --lanes 1, by a relay (criupy-page-server --upstream)
two lanes   the same with --lanes 2
alone       without any background transfer: faults before the restore has finished, one after
            the other, of a stand-in for criu restore (whose process does not run then), with
            images that criupy-page-server gives out; by the daemon's own clock, to 1/16

What lasted longer than a tenth of the round trip was a fault. Only those are counted that
came before the last page. A round ends with a look at every byte. The cut is a reset of all
connections in the middle of a transfer with two lanes: from it to the next page that is delivered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio
from _page_server import page_server
from _report import add_report_options, positive, publish

from criupy.testing.control_linux import Control, Order, Touch
from criupy.testing.criu_linux import (
    Criu,
    find_criu,
    lazy_dump,
    lazy_pages_daemon,
    our_command,
    restore,
    stock_command,
)
from criupy.testing.images import write_images
from criupy.testing.link_linux import Conditions, Link, Loss, open_link
from criupy.testing.spec import WorkloadSpec
from criupy.testing.workload_linux import start_standin, start_workload

MIB = 1 << 20
DELAY = 0.005
THREADS = 4
PAUSE_NS = 3_000_000
UNLIMITED = 1 << 40
ALONE_TOUCHES = 60
STOCK_SIZE = 32 * MIB
LINKS = {"125 MB/s": 125e6, "1.25 GB/s": 1.25e9}
MARK = ("<!-- links: begin -->", "<!-- links: end -->")
WAYS = ("alone", "stock", "one lane", "two lanes")


def start_touching(control: Control) -> None:
    for thread in range(THREADS):
        control.worker(0, thread).start_touching(
            Order.RANDOM, count=UNLIMITED, seed=thread + 1, pause_ns=PAUSE_NS, flags=Touch.UNTIL_STOPPED
        )


def faults(control: Control) -> list[int]:
    """Return the nanoseconds of each touch that had to wait for the link."""
    least = 2 * DELAY * 1e9 / 10
    return [ns for thread in range(THREADS) for ns in control.worker(0, thread).samples if ns > least]


async def alone(bandwidth: float, room: Path) -> dict[str, float]:
    """Touch pages one after the other, with nothing else on the link."""
    spec = WorkloadSpec(size=MIB)
    images = write_images(room / "images", spec, style="full").directory
    work, socket = room / "work", room / "work" / "lazy-pages.socket"
    work.mkdir()
    (room / "restorer").mkdir()
    with page_server(room / "server", "--lazy-pages", "-D", str(images)) as address:
        async with (
            open_link(address, Conditions(delay=DELAY, bandwidth=bandwidth)) as link,
            lazy_pages_daemon(
                our_command(),
                images,
                work,
                source=(link.address, link.port),
                extra=["--extended", "--stats-file", "stats.json"],
            ) as daemon,
            start_standin(spec, socket, room / "restorer", early=ALONE_TOUCHES) as standin,
        ):
            await standin.finish()
            await daemon.succeed()
            if not standin.early_result_is_good:
                raise SystemExit("alone: wrong pages were delivered")
    stats = json.loads((work / "stats.json").read_text())
    return {
        "faults": stats["faults"],
        "p50_ms": stats["latency_p50_us"] / 1000,
        "p99_ms": stats["latency_p99_us"] / 1000,
        "used": 0.0,
    }


@contextlib.asynccontextmanager
async def migrating(
    criu: Criu, size: int, bandwidth: float, way: str, room: Path
) -> AsyncIterator[tuple[Control, Link, Any]]:
    spec = WorkloadSpec(size=size, threads=THREADS, samples=1 << 16)
    images, work = room / "images", room / "work"
    command = stock_command(criu) if way == "stock" else our_command()
    extra = [] if way == "stock" else ["--lanes", "1" if way == "one lane" else "2", "--reconnect", "10"]
    work.mkdir()
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(start_workload(spec, room))
        dump = await stack.enter_async_context(lazy_dump(criu, source.pid, images))
        address = (dump.address, dump.port)
        if way != "stock":
            words = ("-D", str(images), "--upstream", f"{dump.address}:{dump.port}")
            address = stack.enter_context(page_server(room / "relay", *words))
        conditions = Conditions(delay=DELAY, bandwidth=bandwidth)
        link = await stack.enter_async_context(open_link(address, conditions))
        control = source.control.copy(room / "restored.control")
        stack.callback(control.close)
        start_touching(control)
        daemon = await stack.enter_async_context(
            lazy_pages_daemon(command, images, work, source=(link.address, link.port), extra=["-v2", *extra])
        )
        restored = await stack.enter_async_context(
            restore(criu, images, work, source.pid, binds={source.control.path: control.path}, extra=["-v2"])
        )
        control.gone = restored.gone
        yield control, link, daemon
        for thread in range(THREADS):
            control.worker(0, thread).stop()
            await control.worker(0, thread).wait()
        result = await control.worker().verify()
        if not result.is_good:
            raise SystemExit(f"{way} delivered wrong pages: {result}")


async def busy(criu: Criu, size: int, bandwidth: float, way: str, room: Path) -> dict[str, float]:
    """Touch pages while all are transferred; ``used`` is what part of the link that took."""
    async with migrating(criu, size, bandwidth, way, room) as (control, link, daemon):
        await link.reached(1)
        begin = trio.current_time()
        await daemon.succeed()
        used = link.down / (trio.current_time() - begin) / bandwidth
        waits = faults(control)
    return {
        "faults": len(waits),
        "p50_ms": percentile(waits, 50),
        "p99_ms": percentile(waits, 99),
        "used": used,
    }


async def time_lost(criu: Criu, size: int, bandwidth: float, room: Path) -> float:
    """Reset everything in the middle of a transfer; return the seconds to the next page."""
    async with migrating(criu, size, bandwidth, "two lanes", room) as (_, link, daemon):
        await link.reached(size // 2)
        link.cut(Loss.RST)
        begin = trio.current_time()
        await trio.sleep(DELAY / 2)  # nothing new can be there before
        await link.reached(link.down + 4096)
        lost = trio.current_time() - begin
        await daemon.succeed()
    return lost


def percentile(values: list[int], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))] / 1e6


async def measure(rounds: int, size: int) -> dict[str, Any]:
    found, reasons = find_criu()
    if not found:
        raise SystemExit(f"no CRIU to compare with: {'; '.join(reasons)}")
    criu = found[0]
    report: dict[str, Any] = {
        "criu": ".".join(map(str, criu.version)),
        "kernel": platform.release().split("-")[0],
        "cores": os.cpu_count(),
        "rounds": rounds,
        "size_mib": size // MIB,
        "stock_size_mib": min(size, STOCK_SIZE) // MIB,
        "round_trip_ms": 2 * DELAY * 1000,
        "links": {},
    }
    for name, bandwidth in LINKS.items():
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        cuts = []
        for number in range(rounds):
            for way in WAYS:
                with tempfile.TemporaryDirectory(prefix="criupy-bench-") as room:
                    if way == "alone":
                        runs[way].append(await alone(bandwidth, Path(room)))
                    else:
                        much = min(size, STOCK_SIZE) if way == "stock" else size
                        runs[way].append(await busy(criu, much, bandwidth, way, Path(room)))
                print(f"{name} {number + 1}/{rounds} {way}: {runs[way][-1]}", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="criupy-bench-") as room:
                cuts.append(await time_lost(criu, size, bandwidth, Path(room)) * 1000)
            print(f"{name} {number + 1}/{rounds} cut: {cuts[-1]:.1f} ms", file=sys.stderr)
        medians = {
            way: {key: statistics.median(run[key] for run in taken) for key in taken[0]}
            for way, taken in runs.items()
        }
        report["links"][name] = {
            "median": medians,
            "runs": runs,
            "cut_ms": {"median": statistics.median(cuts), "runs": cuts},
        }
    return report


def table(report: dict[str, Any]) -> str:
    """Make a Markdown table of medians and ratios."""
    lines = [
        (
            f"{report['size_mib']} MiB process (stock: {report['stock_size_mib']} MiB), "
            f"{THREADS} threads that touch random pages with pauses, "
            f"criu {report['criu']} at the source, {report['round_trip_ms']:g} ms round trip, "
            f"Linux {report['kernel']}, {report['cores']} cores; "
            f"medians of {report['rounds']} rounds, in turn, in one run."
        ),
        "",
        "| link | while all is transferred | fault p50 | fault p99 | p99 / alone | link used |",
        "|---|---|---|---|---|---|",
    ]
    for name, link in report["links"].items():
        alone_ms = link["median"]["alone"]["p99_ms"]
        for way in WAYS:
            m = link["median"][way]
            used = "" if way == "alone" else f"{m['used'] * 100:.0f} %"
            what = "nothing else is" if way == "alone" else way
            lines.append(
                f"| {name} | {what} | {m['p50_ms']:.1f} ms | {m['p99_ms']:.1f} ms "
                f"| {m['p99_ms'] / alone_ms:.2f} | {used} |"
            )
        lines.append(f"| {name} | a cut costs | {link['cut_ms']['median']:.1f} ms | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long faults wait during a transfer.")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--size", type=positive, default=256, metavar="MIB")
    add_report_options(parser)
    options = parser.parse_args()
    publish(options, lambda: trio.run(measure, options.rounds, options.size * MIB), table, MARK)


if __name__ == "__main__":
    main()
