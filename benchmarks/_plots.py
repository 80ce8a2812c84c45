"""Pictures of a report: fault latencies, how memory fills, and what a round trip costs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cases import CASES, ROUND_TRIP_CASES, link_name
from _report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

#: Told apart also without colour: Okabe and Ito's colours, and lines of different kinds.
LOOKS = {
    "stock": {"color": "#d55e00", "linestyle": "--"},
    "ours": {"color": "#0072b2", "linestyle": "-"},
    "ours, our page server": {"color": "#009e73", "linestyle": ":"},
}
LATENCY_CASES = ("random", "hot", "threads", "fragmented", "local-random", "link-random")
RESIDENT_CASES = ("random", "idle", "hot", "fragmented", "local-random", "link-random")
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "criupy",  # the same picture for the same numbers
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def draw(report: Report, folder: Path) -> None:
    """Draw every picture that the report has something for."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    pictures = {"latency": latency, "resident": resident, "round-trip": round_trip}
    folder.mkdir(exist_ok=True)
    with mpl.rc_context(SETTINGS):
        for name, make in pictures.items():
            figure = make(report)
            FigureCanvasSVG(figure)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def panels(report: Report, names: tuple[str, ...]) -> tuple[Figure, Iterator[tuple[Axes, dict[str, Any]]]]:
    """Make a picture with a panel for each of the cases that were run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = iter(figure.subplots(2, 3).flat)
    lines: dict[str, Line2D] = {}

    def each() -> Iterator[tuple[Axes, dict[str, Any]]]:
        for name in names:
            if name in report["cases"]:
                panel = next(axes)
                yield panel, report["cases"][name]["ways"]
                panel.set_title(textwrap.fill(CASES[name].title, 42))
                lines.update((str(line.get_label()), line) for line in panel.get_lines())
        for panel in axes:
            panel.set_axis_off()
        figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=3)

    return figure, each()


def latency(report: Report) -> Figure:
    """Draw what part of the faults was served within a time."""
    figure, each = panels(report, LATENCY_CASES)
    for panel, ways in each:
        for way, taken in ways.items():
            panel.plot(taken["latency_us"], report["quantiles"], label=way, **LOOKS[way])
        panel.set_xscale("log")
        counts = " → ".join(f"{taken['figures']['faults']:,.0f}" for taken in ways.values())
        panel.set_xlabel(f"({counts} faults)")
    figure.supxlabel("time of a fault, us")
    figure.supylabel("part of all faults")
    return figure


def resident(report: Report) -> Figure:
    """Draw how the memory of the restored process fills."""
    figure, each = panels(report, RESIDENT_CASES)
    for panel, ways in each:
        for way, taken in ways.items():
            panel.plot(taken["resident_s"], taken["resident_mib"], label=way, **LOOKS[way])
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    figure.supxlabel("since the restored process runs, s")
    figure.supylabel("resident memory, MiB")
    return figure


def round_trip(report: Report) -> Figure:
    """Draw drain and stall against the round trip that was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    lines: dict[tuple[str, str], list[tuple[float, dict[str, float]]]] = {}
    bandwidths = dict.fromkeys(case.link.bandwidth for case in ROUND_TRIP_CASES if case.link is not None)
    for bandwidth in bandwidths:
        for case in ROUND_TRIP_CASES:
            if case.name not in report["cases"] or (case.link and case.link.bandwidth != bandwidth):
                continue
            link = report["links"][link_name(case.link) if case.link else "loopback"]
            speed = f"{(bandwidth or 0) / 1e6:,.0f} MB/s"
            for way, taken in report["cases"][case.name]["ways"].items():
                lines.setdefault((way, speed), []).append((link["round_trip_ms"], taken["figures"]))
    for panel, (metric, title) in zip(
        figure.subplots(1, 2), {"drain_s": "drain", "stall_s": "summed stall"}.items(), strict=True
    ):
        for number, ((way, speed), points) in enumerate(lines.items()):
            marker = "os"[number // 2 % 2]
            x, y = [trip for trip, _ in points], [figures[metric] for _, figures in points]
            panel.plot(x, y, marker=marker, fillstyle="none", label=f"{way}, {speed}", **LOOKS[way])
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(f"{title}, 16 MiB, random touches (leftmost: loopback)")
        panel.set_xlabel("round trip, ms")
        panel.set_ylabel(f"{title}, s")
    figure.axes[0].legend()
    return figure
