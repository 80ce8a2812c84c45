"""How long a busy process stands still, and then waits, when it moves by pre-copy, by post-copy, or by both.

    python benchmarks/hybrid.py [--rounds N] [--size MIB] [--json FILE] [--readme FILE] [--picture FILE]

The kernel has to track what a process writes, so this runs in the virtual machine of `make test-vm`, with
Debian's kernel 6.1, on a processor that is emulated: what is compared is compared in one machine and in turn,
and the seconds mean nothing beyond that. Emulation slows an interpreter down far more than what is C, so the
daemon's is started before the process is frozen. The loopback device has a round trip of 10 ms.
_hybrid_guest.py has what happens in the machine.

pre-copy    pre-dumps until what changes does not get less, a dump of the rest, and a restore
post-copy   a lazy dump, and a lazy restore with criupy-lazy-pages
hybrid      the same pre-dumps, a lazy dump of the rest, and a lazy restore with criupy-lazy-pages, from what
            criupy.images.write_lazy_parents makes of it

The freeze is the longest time without a heartbeat; the stall is the sum of all faults of one thread from then
on. All images lie in a directory that both sides share, in memory. Every byte is looked at in the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import trio
from _report import add_report_options, positive, publish

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from vm.image import Missing, find_criu_prefixes  # noqa: E402 - it is beside the tests
from vm.machine import Guest, start  # noqa: E402

WAYS = ("pre-copy", "post-copy", "hybrid")
MARK = ("<!-- hybrid: begin -->", "<!-- hybrid: end -->")
GUEST = "/root/bench"
IMAGES = "/root/images"
MOST_STALL = 0.5


async def once(guest: Guest, way: str, criu: str, size: int) -> dict[str, Any]:
    """Move a process once."""
    room = f"{IMAGES}/room"
    words = ["python3", f"{GUEST}/guest.py", way, criu, room, str(size)]
    done = await guest.run(words, timeout=300)
    await guest.run(["rm", "-rf", room])
    found: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    return found


async def measure(rounds: int, size: int) -> dict[str, Any]:
    """Move it by each way in turn."""
    criu = str(find_criu_prefixes()[-1] / "bin" / "criu")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with start(memory=3072) as machine:
        async with machine.connect() as guest:
            kernel = (await guest.run(["uname", "-r"])).output.split("-")[0]
            program = Path(__file__).with_name("_hybrid_guest.py")
            await guest.put(f"{GUEST}/guest.py", program.read_bytes())
            # One written byte would make all of a huge page dirty.
            await guest.put("/sys/kernel/mm/transparent_hugepage/enabled", b"never")
            # A disk that is still written to would slow down who comes after.
            await guest.run(["mkdir", IMAGES])
            await guest.run(["mount", "-t", "tmpfs", "-o", "size=2g", "none", IMAGES])
            await guest.run(["ip", "link", "set", "lo", "up"])
            await guest.run(["tc", "qdisc", "replace", "dev", "lo", "root", "netem", "delay", "5ms"])
            for number in range(rounds):
                for way in WAYS:
                    found = await once(guest, way, criu, size)
                    version = found.pop("criu")
                    runs[way].append(found)
                    print(f"{way} {number + 1}: {found}", file=sys.stderr)
    return {
        "criu": version,
        "kernel": kernel,
        "rounds": rounds,
        "size_mib": size,
        "round_trip_ms": 10,
        "ways": runs,
    }


def median(runs: list[dict[str, Any]], name: str) -> float:
    """Return the median of a metric, 0 where a way has none."""
    return statistics.median(run.get(name, 0.0) for run in runs)


def table(report: dict[str, Any]) -> str:
    """Make the table, and judge."""
    ways: dict[str, list[dict[str, Any]]] = report["ways"]
    lines = [
        (
            f"{report['size_mib']} MiB, one thread that touches random pages and one that rewrites 2 MiB, "
            f"{report['round_trip_ms']} ms round trip, criu {report['criu']}, Linux {report['kernel']} in an "
            f"emulated machine; medians of {report['rounds']} rounds, in turn, in one run."
        ),
        "",
        (
            "| | freeze | of this, criu restore | stall | faults | pages that pre-dumps wrote "
            "| restored before it runs | fetched then |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, runs in ways.items():
        pages = statistics.median(sum(run["round_pages"]) for run in runs)
        lines.append(
            f"| {way} | {median(runs, 'freeze_s'):.2f} s | {median(runs, 'restore_s'):.2f} s "
            f"| {median(runs, 'stall_s'):.3f} s | {median(runs, 'faults'):,.0f} | {pages:,.0f} "
            f"| {median(runs, 'restored_pages'):,.0f} | {median(runs, 'fetched_pages'):,.0f} |"
        )
    lines += ["", "| aim | measured | |", "|---|---|---|"]
    for what, value, limit in judged(report):
        lines.append(f"| {what} | {value:.2f} | {'reached' if value <= limit else '**missed**'} |")
    return "\n".join(lines)


def judged(report: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return of each aim: what, the value, the limit."""
    ways = report["ways"]
    freeze = {way: median(runs, "freeze_s") for way, runs in ways.items()}
    stall = {way: median(runs, "stall_s") for way, runs in ways.items()}
    # At the pace at which post-copy fetched its pages.
    pace = median(ways["post-copy"], "drain_s") / median(ways["post-copy"], "fetched_pages")
    dirty_s = median(ways["hybrid"], "fetched_pages") * pace
    return [
        ("stall of hybrid / post-copy ≤ 0.5", stall["hybrid"] / stall["post-copy"], MOST_STALL),
        (
            "freeze of hybrid / that of post-copy and the time that its last dirty set takes to come ≤ 1",
            freeze["hybrid"] / (freeze["post-copy"] + dirty_s),
            1.0,
        ),
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw freeze and stall of each way, each run a point."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    looks = {
        "svg.hashsalt": "criupy",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    with mpl.rc_context(looks):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        for panel, (name, title) in zip(
            figure.subplots(1, 2),
            {"freeze_s": "stands still", "stall_s": "then waits for pages, in sum"}.items(),
            strict=True,
        ):
            for number, runs in enumerate(report["ways"].values()):
                values = [run.get(name, 0.0) for run in runs]
                panel.barh(number, statistics.median(values), color="#0072b2", alpha=0.4)
                panel.plot(values, [number] * len(values), "k|", markersize=9)
            panel.set_yticks(range(len(WAYS)), WAYS)
            panel.invert_yaxis()
            panel.set_xlim(left=0)
            panel.set_title(title)
            panel.set_xlabel("s, in an emulated machine")
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare pre-copy, post-copy and both.")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--size", type=positive, default=256, metavar="MIB")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it there, as SVG")
    add_report_options(parser)
    options = parser.parse_args()
    try:
        report = publish(options, lambda: trio.run(measure, options.rounds, options.size), table, MARK)
    except Missing as missing:
        raise SystemExit(str(missing)) from missing
    if options.picture:
        draw(report, options.picture)


if __name__ == "__main__":
    main()
