"""Compare criupy-lazy-pages with criu lazy-pages: same source, same process, in turn, in one run.

    python benchmarks/lazy_pages.py [--case NAME ...] [--rounds N] [--json FILE] [--readme README.md]

Each case of ``_cases.py`` is a real process that is dumped and restored in a pid namespace of this
machine, and served by one daemon, then by the other, as often as the table says: fewer times where a
case says so, or has taken long. ``_migrate.py`` says what is measured. Every byte is looked at in the
end. Medians over the rounds are printed, and latencies of the faults of all rounds; with --readme its
table, ``docs/comparison.md`` and ``benchmarks/pictures`` beside it are refreshed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import trio
from _cases import CASES, Case, Source, Way, link_name
from _link import measure_link
from _migrate import Origin, Taken, full_images, quantile, quantiles, run
from _plots import draw
from _report import Report, add_report_options, positive, publish, put
from _tables import aims, full_table, readme_table

from criupy.testing.criu_linux import Criu, find_criu
from criupy.testing.link_linux import Conditions

MARK = ("<!-- benchmark: begin -->", "<!-- benchmark: end -->")
FULL_MARK = ("<!-- every case: begin -->", "<!-- every case: end -->")
AIMS_MARK = ("<!-- aims: begin -->", "<!-- aims: end -->")
POINTS = 200
ENOUGH = 45.0  # seconds: what takes so long is not measured again
#: Dense where faults are rare.
QUANTILES = [
    *(n / 100 for n in range(90)),
    *(0.9 + n / 1000 for n in range(90)),
    *(0.99 + n / 10000 for n in range(90)),
    *(0.999 + n / 10000 for n in range(11)),
]


def brief(value: float) -> float:
    """Keep what means something of a number."""
    return float(f"{value:.6g}")


def summary(taken: Sequence[Taken]) -> dict[str, Any]:
    """Return of the runs of a way: the figures that are shown, every run, and the median run's growth.

    The figures are medians over the runs, but latencies are those of all runs' faults together: where
    a run has few faults its own p99 is just the longest.
    """
    names = taken[0].metrics
    waits = sorted(ns for one in taken for ns in one.waits)
    alone = [ns for one in taken for ns in one.alone]
    figures = {name: statistics.median(one.metrics[name] for one in taken) for name in names}
    figures |= quantiles(waits, alone)
    seen = waits or sorted(alone)
    middle = sorted(taken, key=lambda one: one.metrics.get("drain_s", 0))[len(taken) // 2].resident
    step = max(1, -(-len(middle) // POINTS))
    shown = middle[::step] + ([middle[-1]] if (len(middle) - 1) % step else [])
    return {
        "rounds": len(taken),
        "figures": {name: brief(value) for name, value in figures.items()},
        "runs": [{name: brief(value) for name, value in one.metrics.items()} for one in taken],
        "latency_us": [brief(quantile(seen, part) / 1e3) for part in QUANTILES] if seen else [],
        "resident_s": [brief(seconds) for seconds, _ in shown],
        "resident_mib": [brief(pages / 256) for _, pages in shown],
    }


async def measured(criu: Criu, case: Case, way: Way, full: Origin | None) -> Taken:
    """Run once, in a room of its own."""
    with tempfile.TemporaryDirectory(prefix="criupy-bench-") as room:
        return await run(criu, case, way, full, Path(room))


async def compare_case(criu: Criu, case: Case, most: int) -> dict[str, Any]:
    """Measure every way of a case, in turn; exit with what failed, and where."""
    runs: dict[str, list[Taken]] = {way.name: [] for way in case.ways}
    took = dict.fromkeys(runs, 0.0)
    where = "its images"
    try:
        async with contextlib.AsyncExitStack() as stack:
            full = None
            if any(way.source is not Source.DUMP for way in case.ways):
                room = stack.enter_context(tempfile.TemporaryDirectory(prefix="criupy-bench-"))
                full = await stack.enter_async_context(full_images(criu, case, Path(room)))
            for number, way in itertools.product(range(most), case.ways):
                if number >= case.rounds_of(way, most) or took[way.name] >= ENOUGH:
                    continue
                where = f"{way.name}, round {number + 1}"
                begin = time.monotonic()
                taken = await measured(criu, case, way, full)
                took[way.name] += time.monotonic() - begin
                runs[way.name].append(taken)
                shown = " ".join(f"{name}={value:.4g}" for name, value in taken.metrics.items())
                print(f"{case.name}, {where}: {shown}", file=sys.stderr)
    except Exception as error:
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        raise SystemExit(f"case {case.name}, {where}: {type(error).__name__}: {error}") from error
    ways = {name: summary(taken) for name, taken in runs.items()}
    return {"ways": ways}


async def measure_links(cases: Iterable[Case]) -> dict[str, dict[str, float]]:
    """Measure each link that a case is run over, and loopback."""
    links: dict[str, dict[str, float]] = {}
    wanted: dict[str, Conditions | None] = {"loopback": None}
    wanted |= {link_name(case.link): case.link for case in cases if case.link is not None}
    for name, conditions in wanted.items():
        links[name] = {key: brief(value) for key, value in (await measure_link(conditions)).items()}
        print(f"link {name}: {links[name]}", file=sys.stderr)
    return links


async def compare(cases: Sequence[Case], rounds: int) -> Report:
    """Measure the cases."""
    found, reasons = find_criu()
    if not found:
        raise SystemExit(f"no CRIU to compare with: {'; '.join(reasons)}")
    criu = found[0]
    begin = time.monotonic()
    report: Report = {
        "criu": ".".join(map(str, criu.version)),
        "kernel": platform.release().split("-")[0],
        "cores": os.cpu_count(),
        "rounds": rounds,
        "quantiles": [brief(part) for part in QUANTILES],
        "links": await measure_links(cases),
        "cases": {case.name: await compare_case(criu, case, rounds) for case in cases},
    }
    report["minutes"] = round((time.monotonic() - begin) / 60, 1)
    return report


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``cases`` are those that were picked."""
    parser = argparse.ArgumentParser(description="Compare criupy-lazy-pages with criu lazy-pages.")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="at most so many of each (5)")
    parser.add_argument(
        "--case", action="append", choices=CASES, metavar="NAME", help="only this; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="name the cases")
    add_report_options(parser)
    options = parser.parse_args(words)
    if options.case and options.readme:
        parser.error("--readme wants every case, of one run")
    if options.readme and not (options.readme.parent / "docs" / "comparison.md").exists():
        parser.error(
            f"--readme {options.readme}: there is no docs/comparison.md beside it, which is refreshed, too"
        )
    options.cases = [case for name, case in CASES.items() if not options.case or name in options.case]
    return options


def main() -> None:
    options = parse()
    if options.list:
        print("\n".join(f"{name:20} {case.title}" for name, case in CASES.items()))
        return

    def short_table(report: Report) -> str:
        if options.readme and set(report["cases"]) != set(CASES):
            raise SystemExit("--readme wants every case, of one run")
        return readme_table(report)

    report = publish(options, lambda: trio.run(compare, options.cases, options.rounds), short_table, MARK)
    for text in (full_table(report), aims(report)):
        print(f"\n{text}")
    if options.readme:
        root = options.readme.parent
        put(root / "docs" / "comparison.md", FULL_MARK, full_table(report))
        put(root / "docs" / "comparison.md", AIMS_MARK, aims(report))
        draw(report, root / "benchmarks" / "pictures")


if __name__ == "__main__":
    main()
