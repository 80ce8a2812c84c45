"""What a restore has cost so far, as numbers."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from criupy._uffd._native import Stats

__all__ = ["PAGE_SIZE", "Events", "Rates", "State", "Statistics", "bucket_edges", "percentile"]

PAGE_SIZE: Final = 4096
_SUB_BUCKETS: Final = 16


class State(enum.Enum):
    """How far a restore is."""

    WAITING = "waiting"
    RESTORING = "restoring"
    TRANSFERRING = "transferring"
    COMPLETE = "complete"
    ABORTED = "aborted"
    FAILED = "failed"


def bucket_edges(bucket: int) -> tuple[int, int]:
    """Return the half-open range of nanoseconds that a histogram bucket counts (_uffd/histogram.c)."""
    if bucket < _SUB_BUCKETS:
        return bucket, bucket + 1
    octave, position = divmod(bucket, _SUB_BUCKETS)
    width = 1 << (octave - 1)
    start = (_SUB_BUCKETS + position) * width
    return start, start + width


def percentile(histogram: Sequence[int], percent: float) -> float | None:
    """Return the latency in ns that ``percent`` (0 to 100) of the counted faults stayed below.

    Exact to 1/16: the middle of the bucket that holds it. None without faults.
    """
    wanted = sum(histogram) * percent / 100
    seen = 0
    for bucket, count in enumerate(histogram):
        seen += count
        if count and seen >= wanted:
            low, high = bucket_edges(bucket)
            return (low + high) / 2
    return None


@dataclass(frozen=True, slots=True)
class Events:
    """How often the tasks changed their memory while pages were missing (userfaultfd events)."""

    fork: int = 0
    remap: int = 0
    remove: int = 0
    unmap: int = 0


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened between two snapshots: per second, and the latency of just these faults in us."""

    bytes: float
    pages: float
    faults: float
    p50_us: float | None
    p99_us: float | None


@dataclass(frozen=True, slots=True)
class Statistics:
    """The counters of one restore at one moment. Counts are pages of 4096 bytes, times seconds.

    ``elapsed`` runs from the start of the daemon, ``restored`` is when in it
    restore-finished was read, ``drain`` runs from there to the last wanted page
    (None before they are). ``pages_missing`` counts a page once for each address
    space that lacks it, so forks can raise it above ``pages_total``. ``local_total``,
    ``local_missing`` and ``local_received`` are the part of these that is in images here. ``latency``
    is the histogram of fault latencies, from the fault being read to its page
    being in place; see bucket_edges.
    """

    state: State = State.WAITING
    elapsed: float = 0.0
    restored: float | None = None
    drain: float | None = None
    tasks: int = 0
    tasks_gone: int = 0
    forks: int = 0
    pages_total: int = 0
    pages_missing: int = 0
    pages_received: int = 0
    local_total: int = 0
    local_missing: int = 0
    local_received: int = 0
    pages_demand: int = 0
    pages_background: int = 0
    pages_existing: int = 0
    pages_dropped: int = 0
    pages_zero: int = 0
    pages_poisoned: int = 0
    bytes_received: int = 0
    requests: int = 0
    demand_requests: int = 0
    faults: int = 0
    events: Events = field(default_factory=Events)
    latency_sum_ns: int = 0
    latency_max_ns: int = 0
    latency: tuple[int, ...] = ()

    @classmethod
    def from_pager(cls, stats: Stats, state: State, now_ns: int) -> Statistics:
        """Take over a snapshot of the pager; ``now_ns`` is CLOCK_MONOTONIC."""
        restored = drain = None
        if stats.finished_ns:
            restored = (stats.finished_ns - stats.created_ns) / 1e9
        if stats.finished_ns and stats.drained_ns:
            drain = (stats.drained_ns - stats.finished_ns) / 1e9
        return cls(
            state=state,
            elapsed=((stats.ended_ns or now_ns) - stats.created_ns) / 1e9,
            restored=restored,
            drain=drain,
            tasks=stats.nr_tasks,
            tasks_gone=stats.nr_gone,
            forks=stats.nr_forks,
            pages_total=stats.pages_total,
            pages_missing=stats.pages_missing,
            pages_received=stats.pages_received,
            local_total=stats.local_total,
            local_missing=stats.local_missing,
            local_received=stats.local_received,
            pages_demand=stats.pages_demand,
            pages_background=stats.pages_background,
            pages_existing=stats.pages_existing,
            pages_dropped=stats.pages_dropped,
            pages_zero=stats.pages_zero,
            pages_poisoned=stats.pages_poisoned,
            bytes_received=stats.bytes_received,
            requests=stats.nr_requests,
            demand_requests=stats.nr_demand_requests,
            faults=stats.nr_faults,
            events=Events(
                fork=stats.nr_events_fork,
                remap=stats.nr_events_remap,
                remove=stats.nr_events_remove,
                unmap=stats.nr_events_unmap,
            ),
            latency_sum_ns=stats.latency_sum_ns,
            latency_max_ns=stats.latency_max_ns,
            latency=tuple(stats.latency),
        )

    @property
    def pages_settled(self) -> int:
        """Lazy pages that nobody waits for any more, 0 to pages_total."""
        return self.pages_total - min(self.pages_missing, self.pages_total)

    def since(self, before: Statistics) -> Rates:
        """Return the rates from an earlier snapshot to this one; zero if no time passed."""
        seconds = self.elapsed - before.elapsed
        per_second = 1 / seconds if seconds > 0 else 0.0
        earlier = before.latency or (0,) * len(self.latency)
        recent = [now - then for now, then in zip(self.latency, earlier, strict=True)]
        p50, p99 = (percentile(recent, percent) for percent in (50, 99))
        return Rates(
            bytes=(self.pages_received - before.pages_received) * PAGE_SIZE * per_second,
            pages=(self.pages_received - before.pages_received) * per_second,
            faults=(self.faults - before.faults) * per_second,
            p50_us=None if p50 is None else p50 / 1000,
            p99_us=None if p99 is None else p99 / 1000,
        )

    @property
    def stall(self) -> float:
        """Seconds that faults waited, summed."""
        return self.latency_sum_ns / 1e9

    def latency_us(self, percent: float) -> float | None:
        """Return a percentile of the fault latency in microseconds; None without faults."""
        found = percentile(self.latency, percent)
        return None if found is None else found / 1000

    def with_state(self, state: State) -> Statistics:
        """Return the same counters in another state."""
        return dataclasses.replace(self, state=state)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the histogram as [low ns, count] of the buckets that are not empty."""
        found = dataclasses.asdict(self)
        found["state"] = self.state.value
        found["latency"] = [[bucket_edges(i)[0], n] for i, n in enumerate(self.latency) if n]
        for percent in (50, 90, 99):
            found[f"latency_p{percent}_us"] = self.latency_us(percent)
        found["latency_max_us"] = self.latency_max_ns / 1000 if self.faults else None
        return found
