"""Showing how far a restore is: a bar on a terminal, lines elsewhere, JSON for programs.

Consumers of snapshots, without a clock of their own: the time is that of the
snapshots. Showing must not hurt what is shown. Where the stream cannot be
written (the reader went away, the disk is full) a consumer falls silent, and
the transfer goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Literal, Protocol

from criupy._command.run import lead_nowhere
from criupy.lazy_pages._statistics import PAGE_SIZE, Rates, State, Statistics

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Kind", "Progress", "make_progress", "summary"]

Kind = Literal["auto", "plain", "json", "none"]


class Progress(Protocol):
    """A consumer of snapshots."""

    #: Seconds between two snapshots that are worth showing.
    interval: float
    #: Where other lines for the same terminal have to go while this is shown; None: anywhere.
    print_above: Callable[[str], None] | None

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


class _Silent:
    interval = float("inf")
    print_above: Callable[[str], None] | None = None

    def update(self, statistics: Statistics) -> None:
        """Show nothing."""

    def close(self, statistics: Statistics) -> None:
        """Show nothing."""


class _Lines:
    """What the two kinds of lines have in common: a stream that may break."""

    interval = 1.0
    print_above: Callable[[str], None] | None = None

    def __init__(self, stream: IO[str]) -> None:
        self._stream: IO[str] | None = stream
        self._before = Statistics()

    def _print(self, text: str) -> None:
        with _breaking(self):
            if self._stream is not None:
                print(text, file=self._stream, flush=True)

    def fall_silent(self) -> None:
        if self._stream is not None:
            lead_nowhere(self._stream)
        self._stream = None
        self.interval = float("inf")


class _Json(_Lines):
    def update(self, statistics: Statistics) -> None:
        self._print(json.dumps(statistics.to_json(), separators=(",", ":")))

    close = update


class _Plain(_Lines):
    def update(self, statistics: Statistics) -> None:
        if statistics.state in {State.WAITING, State.RESTORING}:
            return
        self._print(_line(statistics, statistics.since(self._before)))
        self._before = statistics

    def close(self, statistics: Statistics) -> None:
        self._print(_line(statistics, _overall(statistics)))


class _Bar:
    """A bar by rich, redrawn only when told, so without a thread."""

    interval = 0.25

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        class SurvivingConsole(Console):
            def on_broken_pipe(self) -> None:
                """Say so: rich would end the program."""
                raise BrokenPipeError

        self._progress: RichProgress | None = Progress(
            # Together they fit 80 columns, so that rich need not squeeze them.
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}", markup=False),
            console=SurvivingConsole(file=stream),
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._stream = stream
        self._task: TaskID = self._progress.add_task("waiting", total=None, text="")
        self._seconds: list[Statistics] = [Statistics()]
        self.print_above: Callable[[str], None] | None = self._print_above
        with _breaking(self):
            self._progress.start()

    def update(self, statistics: Statistics) -> None:
        # Rates over about a second: over one interval they only flicker.
        while len(self._seconds) > 1 and statistics.elapsed - self._seconds[1].elapsed >= 1:
            del self._seconds[0]
        rates = statistics.since(self._seconds[0])
        self._seconds.append(statistics)
        self._draw(statistics, rates)

    def close(self, statistics: Statistics) -> None:
        self._draw(statistics, _overall(statistics))
        self.print_above = None
        with _breaking(self):
            if self._progress is not None:
                self._progress.stop()

    def _draw(self, statistics: Statistics, rates: Rates) -> None:
        with _breaking(self):
            if self._progress is not None:
                self._progress.update(
                    self._task,
                    total=statistics.pages_total or None,
                    completed=statistics.pages_settled,
                    text=_short_figures(statistics, rates),
                    refresh=True,
                )

    def _print_above(self, text: str) -> None:
        if self._progress is None:
            raise BrokenPipeError
        self._progress.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def fall_silent(self) -> None:
        lead_nowhere(self._stream)
        self._progress = None
        self.print_above = None
        self.interval = float("inf")


@contextlib.contextmanager
def _breaking(consumer: _Lines | _Bar) -> Iterator[None]:
    """Let a consumer fall silent when its stream breaks (ValueError: it was closed)."""
    try:
        yield
    except (OSError, ValueError):
        consumer.fall_silent()


# ---- words ------------------------------------------------------------------------


def _overall(statistics: Statistics) -> Rates:
    """Return the rates of the whole transfer, from restore-finished on."""
    rates = statistics.since(Statistics())
    seconds = statistics.drain
    if seconds is None and statistics.restored is not None:
        seconds = statistics.elapsed - statistics.restored
    scale = statistics.elapsed / seconds if seconds else 1.0
    return Rates(rates.bytes * scale, rates.pages * scale, rates.faults * scale, rates.p50_us, rates.p99_us)


def _line(statistics: Statistics, rates: Rates) -> str:
    return f"{statistics.elapsed:7.1f} s  {statistics.state.value}: {_figures(statistics, rates)}"


def _figures(statistics: Statistics, rates: Rates) -> str:
    # When tasks have been given up nobody waits for their pages any more, and yet they never came.
    is_cut_short = statistics.state in {State.ABORTED, State.FAILED}
    done = statistics.pages_received if is_cut_short else statistics.pages_settled
    text = (
        f"{done:,} of {statistics.pages_total:,} pages, {rates.bytes / 1e6:,.0f} MB/s, "
        f"{rates.faults:,.0f} faults/s"
    )
    if rates.p50_us is not None and rates.p99_us is not None:
        text += f", p50 {_microseconds(rates.p50_us)}, p99 {_microseconds(rates.p99_us)}"
    return text


def _short_figures(statistics: Statistics, rates: Rates) -> str:
    if statistics.state is not State.TRANSFERRING and not statistics.pages_received:
        return str(statistics.state.value)
    text = f"{statistics.pages_settled:,} pages, {rates.bytes / 1e6:,.0f} MB/s, {rates.faults:,.0f} faults/s"
    if rates.p99_us is not None:
        text += f", p99 {_microseconds(rates.p99_us)}"
    return text if statistics.state is State.TRANSFERRING else f"{statistics.state.value}: {text}"


def _microseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} us" if value < 10_000 else f"{value / 1000:,.0f} ms"


def summary(statistics: Statistics) -> str:
    """Return the lines that ``--display-stats`` ends with."""
    s = statistics
    events = s.events
    forked = f", {s.forks} forked since" if s.forks else ""
    gone = f", {s.tasks_gone} gone before their last page" if s.tasks_gone else ""
    lines = [
        ("Outcome", f"{s.state.value} after {s.elapsed:.3f} s"),
        ("Tasks", f"{s.tasks}{forked}{gone}"),
        ("Lazy memory", f"{s.pages_total:,} pages, {s.pages_total * PAGE_SIZE / 1e6:,.1f} MB"),
    ]
    if s.restored is not None:
        lines.append(("Tasks ran", f"{s.restored:.3f} s after the start"))
    if s.drain is not None:
        megabytes = _overall(s).bytes / 1e6
        lines.append(("Last page", f"{s.drain:.3f} s after that, {megabytes:,.1f} MB/s"))
    local = f", {s.local_received:,} of them from images," if 0 < s.local_received < s.pages_received else ""
    lines += [
        ("Installed", f"{s.pages_demand:,} pages on demand, {s.pages_background:,} ahead of it"),
        ("Fetched", f"{s.pages_received:,} pages{local} in {s.requests:,} requests"),
        ("Faults", f"{s.faults:,}, waited {s.stall:.3f} s in all; {s.pages_zero:,} were for zero pages"),
    ]
    if s.faults:
        shown = [f"p{percent} {_microseconds(s.latency_us(percent))}" for percent in (50, 90, 99)]
        lines.append(("Fault latency", f"{', '.join(shown)}, max {_microseconds(s.latency_max_ns / 1000)}"))
    if s.pages_dropped:
        lines.append(("Not wanted", f"{s.pages_dropped:,} pages: unmapped, discarded, or their task gone"))
    counted = [
        (events.fork, "fork"),
        (events.remap, "mremap"),
        (events.remove, "madvise"),
        (events.unmap, "munmap"),
    ]
    if any(count for count, _ in counted):
        lines.append(("Memory events", ", ".join(f"{count:,} {name}" for count, name in counted if count)))
    if s.pages_poisoned:
        lines.append(("Poisoned", f"{s.pages_poisoned:,} pages: touching one is a SIGBUS"))
    elif s.pages_missing and s.state is not State.ABORTED:
        lines.append(("Missing", f"{s.pages_missing:,} pages"))
    return "\n".join(f"{name + ':':<15}{text}" for name, text in lines)
