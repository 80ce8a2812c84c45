"""What the demo measured, as a table that is understood at a glance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["FAULT_NS", "Freeze", "Measured", "summary"]

FAULT_NS = 5000
"""A touch that took longer than this waited for its page; others take well below a microsecond."""

_LABEL_WIDTH = 28
_CELL_WIDTH = 18


@dataclass(frozen=True, slots=True)
class Freeze:
    """Where the time went while the process ran nowhere, in seconds."""

    dump: float
    daemon: float
    restore: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.dump + self.daemon + self.restore


@dataclass(frozen=True, slots=True)
class Measured:
    """One migration of `size` bytes; times in seconds, `waits` sorted in ns.

    `freeze` is None where no process was frozen.
    """

    program: str
    size: int
    freeze: Freeze | None
    drain: float
    waits: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Megabytes per second while memory was on its way."""
        return self.size / self.drain / 1e6

    @property
    def stall(self) -> float:
        """Seconds the process waited for pages, in all."""
        return sum(self.waits) / 1e9

    def wait_us(self, percent: int) -> float | None:
        """Return how long this percentage of the waits lasted at most, in microseconds; None without any."""
        if not self.waits:
            return None
        return self.waits[min(len(self.waits) * percent // 100, len(self.waits) - 1)] / 1e3


@dataclass(frozen=True, slots=True)
class _Row:
    label: str
    value: Callable[[Measured], float | None]
    unit: str
    digits: int = 0
    more_is_better: bool = False

    def cell(self, measured: Measured) -> str:
        value = self.value(measured)
        return "-" if value is None else f"{value:,.{self.digits}f} {self.unit}".rstrip()

    def comparison(self, ours: Measured, stock: Measured) -> str:
        mine, other = self.value(ours), self.value(stock)
        if not mine or not other:
            return ""
        factor = mine / other if self.more_is_better else other / mine
        if 0.95 < factor < 1.05:
            return "the same"
        return f"{factor:.1f}x better" if factor > 1 else f"{1 / factor:.1f}x worse"


def _frozen(part: Callable[[Freeze], float]) -> Callable[[Measured], float | None]:
    return lambda measured: None if measured.freeze is None else part(measured.freeze)


_FREEZE_ROWS = (
    _Row("Freeze time", _frozen(lambda freeze: freeze.total), "s", 3),
    _Row("  saving (criu dump)", _frozen(lambda freeze: freeze.dump), "s", 3),
    _Row("  starting the fetcher", _frozen(lambda freeze: freeze.daemon), "s", 3),
    _Row("  rebuilding (criu restore)", _frozen(lambda freeze: freeze.restore), "s", 3),
)
_ROWS = (
    _Row("Drain time", lambda measured: measured.drain, "s", 3),
    _Row("  speed", lambda measured: measured.rate, "MB/s", more_is_better=True),
    _Row("Faults", lambda measured: len(measured.waits), ""),
    _Row("  latency, half (p50)", lambda measured: measured.wait_us(50), "us"),
    _Row("  latency, 99 in 100 (p99)", lambda measured: measured.wait_us(99), "us"),
    _Row("  summed stall", lambda measured: measured.stall, "s", 3),
)

_FREEZE_TIME = (
    "Freeze time: from the moment criu dump stopped the process to its first instruction at the destination. "
    "Between two hosts, copying the small image files comes on top."
)
_DRAIN_TIME = "Drain time: from its first instruction at the destination until all its memory was there."
_FAULTS = (
    f"Faults: touches of memory that was not there yet, so the process waited (over {FAULT_NS // 1000} us), "
    "measured inside the process; p50 and p99: half, and 99 in 100, waited at most so long; summed stall: "
    "all waits together."
)


def _verdict(ours: Measured, stock: Measured) -> str:
    faster = stock.drain / ours.drain
    when = f"{faster:.1f} times sooner" if faster >= 1 else f"{1 / faster:.1f} times later"
    text = (
        f"With {ours.program} all memory was there {when} than with {stock.program}, "
        f"and the process waited {ours.stall:.3f} s for it instead of {stock.stall:.3f} s."
    )
    if (ours.wait_us(50) or 0) > (stock.wait_us(50) or 0) and ours.stall < stock.stall:
        text += (
            " A single wait was longer, because a page that is asked for comes behind the many on their way "
            "already; but there were fewer waits, and their sum is what the process feels."
        )
    return text


def summary(runs: Sequence[Measured]) -> tuple[list[str], list[str]]:
    """Return the lines of a table with one column per run, ours first, and the sentences that explain it."""
    frozen = any(run.freeze is not None for run in runs)
    rows = _FREEZE_ROWS + _ROWS if frozen else _ROWS
    table = [" " * _LABEL_WIDTH + "".join(f"{run.program:>{_CELL_WIDTH}}" for run in runs)]
    for row in rows:
        line = f"{row.label:<{_LABEL_WIDTH}}" + "".join(f"{row.cell(run):>{_CELL_WIDTH}}" for run in runs)
        if len(runs) > 1:
            line += f"  {row.comparison(runs[0], runs[1])}"
        table.append(line.rstrip())
    verified = "".join(f"{'every byte right':>{_CELL_WIDTH}}" for _ in runs)
    table.append(f"{'Memory at the end':<{_LABEL_WIDTH}}{verified}")
    sentences = [*([_FREEZE_TIME] if frozen else []), _DRAIN_TIME, _FAULTS]
    if len(runs) > 1:
        sentences.append(_verdict(runs[0], runs[1]))
    return table, sentences
