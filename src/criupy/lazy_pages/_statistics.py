"""What a restore has cost so far, as numbers."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from criupy._uffd._native import Stats

__all__ = ["Events", "State", "Statistics", "bucket_edges", "percentile"]

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
    """Return the latency in ns that ``percent`` of the counted faults stayed below; None without any.

    Exact to 1/16: the middle of the bucket that holds it.
    """
    total = sum(histogram)
    if not total:
        return None
    wanted = total * percent / 100
    seen = 0
    bucket = 0
    for bucket, count in enumerate(histogram):
        seen += count
        if count and seen >= wanted:
            break
    low, high = bucket_edges(bucket)
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class Events:
    """How often the tasks changed their memory while pages were missing (userfaultfd events)."""

    fork: int = 0
    remap: int = 0
    remove: int = 0
    unmap: int = 0


@dataclass(frozen=True, slots=True)
class Statistics:
    """The counters of one restore at one moment. Counts are pages of 4096 bytes, times seconds.

    ``elapsed`` runs from the start of the daemon, ``drain`` from
    restore-finished to the last wanted page (None before it). ``latency`` is
    the histogram of fault latencies, from the fault being read to its page
    being in place; see bucket_edges.
    """

    state: State = State.WAITING
    elapsed: float = 0.0
    drain: float | None = None
    tasks: int = 0
    tasks_gone: int = 0
    forks: int = 0
    pages_total: int = 0
    pages_missing: int = 0
    pages_received: int = 0
    pages_demand: int = 0
    pages_background: int = 0
    pages_dropped: int = 0
    pages_zero: int = 0
    pages_poisoned: int = 0
    bytes_received: int = 0
    requests: int = 0
    faults: int = 0
    events: Events = field(default_factory=Events)
    latency_sum_ns: int = 0
    latency_max_ns: int = 0
    latency: tuple[int, ...] = ()

    @classmethod
    def from_pager(cls, stats: Stats, state: State, now_ns: int) -> Statistics:
        """Take over a snapshot of the pager; ``now_ns`` is CLOCK_MONOTONIC."""
        drain = None
        if stats.finished_ns and stats.drained_ns:
            drain = (stats.drained_ns - stats.finished_ns) / 1e9
        return cls(
            state=state,
            elapsed=((stats.ended_ns or now_ns) - stats.created_ns) / 1e9,
            drain=drain,
            tasks=stats.nr_tasks,
            tasks_gone=stats.nr_gone,
            forks=stats.nr_forks,
            pages_total=stats.pages_total,
            pages_missing=stats.pages_missing,
            pages_received=stats.pages_received,
            pages_demand=stats.pages_demand,
            pages_background=stats.pages_background,
            pages_dropped=stats.pages_dropped,
            pages_zero=stats.pages_zero,
            pages_poisoned=stats.pages_poisoned,
            bytes_received=stats.bytes_received,
            requests=stats.nr_requests,
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
        found["latency_p50_us"] = self.latency_us(50)
        found["latency_p99_us"] = self.latency_us(99)
        return found
