"""Showing how far a restore is: a bar on a terminal, lines elsewhere, JSON for programs."""

from __future__ import annotations

import importlib.util
import json
from typing import IO, TYPE_CHECKING, Literal, Protocol

from criupy.lazy_pages._statistics import PAGE_SIZE, State, Statistics

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Kind", "Progress", "make_progress", "summary"]

Kind = Literal["auto", "plain", "json", "none"]


class Progress(Protocol):
    """A consumer of snapshots."""

    #: Seconds between two snapshots that are worth showing.
    interval: float

    def update(self, statistics: Statistics) -> None:
        """Show a snapshot."""

    def close(self, statistics: Statistics) -> None:
        """Show the last snapshot and give the terminal back."""


def make_progress(kind: Kind, stream: IO[str], *, background: bool) -> Progress:
    """Choose how to show progress on a stream.

    ``auto`` is a bar on a terminal if rich is installed, lines elsewhere, and
    nothing in the background, where there is no one to see it.
    """
    match kind:
        case "json":
            return _Json(stream)
        case "plain":
            return _Plain(stream)
        case "auto" if not background:
            if stream.isatty() and importlib.util.find_spec("rich") is not None:
                return _Bar(stream)
            return _Plain(stream)
        case _:
            return _Silent()


def _settled(statistics: Statistics) -> int:
    return statistics.pages_total - min(statistics.pages_missing, statistics.pages_total)


def _latency(statistics: Statistics) -> str:
    p50, p99 = statistics.latency_us(50), statistics.latency_us(99)
    if p50 is None or p99 is None:
        return f"{statistics.faults} faults"
    return f"{statistics.faults} faults, p50 {p50:.0f} us, p99 {p99:.0f} us"


class _Rate:
    """Megabytes per second between two snapshots."""

    def __init__(self) -> None:
        self._last = Statistics()

    def __call__(self, statistics: Statistics) -> float:
        seconds = statistics.elapsed - self._last.elapsed
        pages = statistics.pages_received - self._last.pages_received
        self._last = statistics
        return pages * PAGE_SIZE / seconds / 1e6 if seconds > 0 else 0.0


class _Silent:
    interval = float("inf")

    def update(self, statistics: Statistics) -> None:
        pass

    def close(self, statistics: Statistics) -> None:
        pass


class _Json:
    interval = 1.0

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def update(self, statistics: Statistics) -> None:
        print(json.dumps(statistics.to_json()), file=self._stream, flush=True)

    close = update


class _Plain:
    interval = 1.0

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._rate = _Rate()

    def update(self, statistics: Statistics) -> None:
        if statistics.state in {State.WAITING, State.RESTORING}:
            return
        self._print(statistics, self._rate(statistics))

    def close(self, statistics: Statistics) -> None:
        rate = 0.0
        if statistics.drain:
            rate = statistics.pages_received * PAGE_SIZE / statistics.drain / 1e6
        self._print(statistics, rate)

    def _print(self, statistics: Statistics, rate: float) -> None:
        print(
            f"{statistics.state.value}: {_settled(statistics)} of {statistics.pages_total} pages, "
            f"{rate:.0f} MB/s, {_latency(statistics)}",
            file=self._stream,
            flush=True,
        )


class _Bar:
    interval = 0.25

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._progress: RichProgress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(file=stream),
            auto_refresh=False,
        )
        self._task: TaskID = self._progress.add_task("waiting", total=None, text="")
        self._rate = _Rate()
        self._progress.start()

    def update(self, statistics: Statistics) -> None:
        self._progress.update(
            self._task,
            description=statistics.state.value,
            total=statistics.pages_total or None,
            completed=_settled(statistics),
            text=f"{_settled(statistics):,} of {statistics.pages_total:,} pages, "
            f"{self._rate(statistics):,.0f} MB/s, {_latency(statistics)}",
            refresh=True,
        )

    def close(self, statistics: Statistics) -> None:
        self.update(statistics)
        self._progress.stop()


def summary(statistics: Statistics) -> str:
    """Return the lines that ``--display-stats`` ends with."""
    events = statistics.events
    lines = [
        f"state              {statistics.state.value}",
        f"tasks              {statistics.tasks}, and {statistics.forks} forked since; {statistics.tasks_gone} gone early",
        f"lazy pages         {statistics.pages_total} ({statistics.pages_total * PAGE_SIZE / 1e6:.0f} MB)",
        f"  fetched          {statistics.pages_received} in {statistics.requests} requests",
        f"  not wanted       {statistics.pages_dropped}",
        f"  poisoned         {statistics.pages_poisoned}",
        f"faults             {_latency(statistics)}",
        f"  on missing pages {statistics.pages_demand} fetched at once; waited {statistics.stall:.3f} s in all",
        f"  zero pages       {statistics.pages_zero}",
        f"memory events      {events.fork} fork, {events.remap} mremap, {events.remove} madvise, {events.unmap} munmap",
    ]
    if statistics.drain is not None:
        rate = statistics.pages_received * PAGE_SIZE / max(statistics.drain, 1e-9) / 1e6
        lines.append(f"drained            {statistics.drain:.3f} s after restore-finished ({rate:.0f} MB/s)")
    return "\n".join(lines)
