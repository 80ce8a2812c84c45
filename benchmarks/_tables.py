"""Tables of a report: short for the README, whole for the documentation, and what became of the aims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from _cases import CASES, Case
from _report import Report

#: Columns of the README, with the metric that stands in when a case has no transfer beside it.
COLUMNS = {
    "drain": ("drain_s",),
    "summed stall": ("stall_s",),
    "fault p50": ("p50_us", "alone_p50_us"),
    "fault p99": ("p99_us", "alone_p99_us"),
    "daemon CPU": ("cpu_s",),
}
METRICS = {
    "drain_s": "drain",
    "mb_s": "drained",
    "faults": "faults",
    "alone_p50_us": "fault p50, nothing else transferred",
    "alone_p99_us": "fault p99, nothing else transferred",
    "p50_us": "fault p50",
    "p99_us": "fault p99",
    "p99_over_alone": "fault p99 / nothing else transferred",
    "stall_s": "summed stall",
    "cpu_s": "daemon CPU",
    "peak_mb": "daemon peak memory",
}
#: What is said of a point of a picture.
BRIEF = frozenset({"drain_s", "faults", "p50_us", "stall_s"})


def shown(metric: str, value: float) -> str:
    """Write a value with its unit, in three digits."""
    if metric == "mb_s":
        return f"{value:,.0f} MB/s"
    if metric == "peak_mb":
        return f"{value:,.0f} MB"
    if metric == "faults":
        return f"{value:,.0f}"
    if metric == "p99_over_alone":
        return f"{value:.2f}"
    seconds = value / 1e6 if metric.endswith("_us") else value
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{three(seconds / scale)} {unit}"
    return f"{three(seconds / 1e-6)} us"


def three(value: float) -> str:
    """Write three digits of a number below a thousand, or all before the point."""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f}"


def ratio(over: float, under: float) -> str:
    """Write a quotient, nothing where there is none."""
    return three(over / under) if under else ""


def rows(report: Report) -> Iterator[tuple[Case, dict[str, Any], str]]:
    """Yield each case with its ways, once for each way that is not the first."""
    for name, case in CASES.items():
        if name in report["cases"]:
            ways = report["cases"][name]["ways"]
            for way in list(ways)[1:]:
                yield case, ways, way


def title_of(case: Case, way: str) -> str:
    """Name a row."""
    return case.title if way == "ours" else f"{case.title}; {way}"


def conditions(report: Report) -> str:
    """Say what all numbers were taken with."""
    return (
        f"criu {report['criu']} at the source, Linux {report['kernel']}, {report['cores']} cores, loopback "
        f"where no link is named; medians of at most {report['rounds']} rounds, in turn, in one run of "
        f"{report['minutes']:g} minutes, and latencies of the faults of all rounds together"
    )


def readme_table(report: Report) -> str:
    """Make the README's table: each cell has stock, ours, and how many times better ours is."""
    lines = [
        f"{conditions(report)}. In each cell: `criu lazy-pages` → `criupy-lazy-pages` (stock / ours).",
        "",
        f"| process | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for case, ways, way in rows(report):
        if not case.is_main:
            continue
        stock, ours = ways["stock"]["figures"], ways[way]["figures"]
        cells = []
        for metrics in COLUMNS.values():
            metric = next((name for name in metrics if ours.get(name)), "")
            cells.append(
                f"{shown(metric, stock[metric])} → {shown(metric, ours[metric])} "
                f"(**{ratio(stock[metric], ours[metric])}**)"
                if metric
                else ""
            )
        lines.append(f"| {title_of(case, way)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_spread(metric: str, way: dict[str, Any]) -> str:
    """Write a figure, and the least and the most that any round had of it."""
    figure = shown(metric, way["figures"].get(metric, 0))
    values = [run[metric] for run in way["runs"] if metric in run]
    least, most = (shown(metric, found(values)) for found in (min, max)) if values else ("", "")
    return figure if least == most else f"{figure} ({least} to {most})"


def full_table(report: Report) -> str:
    """Make the table of every metric of every case, and of the links they were run over."""
    lines = [
        f"{conditions(report)}. In brackets: the least and the most of any round.",
        "",
        "| process | rounds | | `criu lazy-pages` | `criupy-lazy-pages` | stock / ours |",
        "|---|---|---|---|---|---|",
    ]
    for case, ways, way in rows(report):
        stock, ours = ways["stock"]["figures"], ways[way]["figures"]
        rounds = " / ".join(dict.fromkeys(str(ways[name]["rounds"]) for name in ("stock", way)))
        for metric, what in METRICS.items():
            if (case.is_main or metric in BRIEF) and metric in ours:
                lines.append(
                    f"| {title_of(case, way)} | {rounds} | {what} | {with_spread(metric, ways['stock'])} "
                    f"| {with_spread(metric, ways[way])} | {ratio(stock[metric], ours[metric])} |"
                )
    lines += ["", "| link | measured: round trip of a byte | one stream |", "|---|---|---|"]
    for name, link in report["links"].items():
        trip, stream = shown("_s", link["round_trip_ms"] / 1e3), shown("mb_s", link["mb_s"])
        lines.append(f"| {name} | {trip} | {stream} |")
    return "\n".join(lines)


def aims(report: Report) -> str:
    """Make the table of what was aimed at."""
    lines = ["| process | aim | measured | stock | ours | |", "|---|---|---|---|---|---|"]
    for name, case in CASES.items():
        if name not in report["cases"]:
            continue
        figures = {way: each["figures"] for way, each in report["cases"][name]["ways"].items()}
        for aim in case.aims:
            what = METRICS[aim.metric] + (f", {aim.way} / {aim.over}" if aim.over else f", {aim.way}")
            value, sign = aim.value(figures), "≥" if aim.at_least else "≤"
            if aim.over:
                limit, got = f"{aim.limit:.3g}", f"{value:.3g}"
            else:
                limit, got = shown(aim.metric, aim.limit), shown(aim.metric, value)
            lines.append(
                f"| {case.title} | {what} {sign} {limit} | {got} "
                f"| {shown(aim.metric, figures['stock'][aim.metric])} "
                f"| {shown(aim.metric, figures[aim.way][aim.metric])} "
                f"| {'reached' if aim.is_met(figures) else '**missed**'} |"
            )
    return "\n".join(lines)
