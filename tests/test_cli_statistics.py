"""Statistics: the native histogram's edges, percentiles against sorted samples, snapshots, JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criupy.lazy_pages._statistics import Events, State, Statistics, bucket_edges, percentile

BUCKETS = 640
LAST = bucket_edges(BUCKETS - 1)[1]


def bucket_of(ns: int) -> int:
    """Search for the bucket, instead of computing it as the native side does."""
    return next(
        bucket for bucket in range(BUCKETS) if bucket_edges(bucket)[0] <= ns < bucket_edges(bucket)[1]
    )


def histogram(samples: list[int]) -> list[int]:
    counts = [0] * BUCKETS
    for ns in samples:
        counts[bucket_of(ns)] += 1
    return counts


def test_buckets_follow_each_other_without_gap() -> None:
    assert bucket_edges(0) == (0, 1)
    for bucket in range(BUCKETS - 1):
        assert bucket_edges(bucket)[1] == bucket_edges(bucket + 1)[0]
    assert LAST > 3600 * 10**9


@pytest.mark.parametrize(
    ("bucket", "edges"),
    [(15, (15, 16)), (16, (16, 17)), (31, (31, 32)), (32, (32, 34)), (47, (62, 64)), (48, (64, 68))],
)
def test_some_buckets(bucket: int, edges: tuple[int, int]) -> None:
    assert bucket_edges(bucket) == edges


def test_bucket_widths_are_a_sixteenth() -> None:
    for bucket in range(16, BUCKETS):
        low, high = bucket_edges(bucket)
        assert (high - low) * 16 <= low


@pytest.mark.skipif(sys.platform != "linux", reason="the native part is for Linux")
@given(st.integers(0, LAST - 1))
def test_the_native_side_counts_into_these_buckets(ns: int) -> None:
    native: Any = pytest.importorskip("criupy._uffd._native", reason="the native part is not built")
    low, high = bucket_edges(native.lib.criupy_histogram_bucket(ns))
    assert low <= ns < high


@given(st.lists(st.integers(0, LAST - 1), min_size=1, max_size=50), st.integers(0, 100))
def test_percentile_is_the_sample_to_a_sixteenth(samples: list[int], percent: int) -> None:
    found = percentile(histogram(samples), percent)
    rank = max(1, -(-len(samples) * percent // 100))  # the smallest number of samples that is enough
    exact = sorted(samples)[rank - 1]
    assert found is not None
    low, high = bucket_edges(bucket_of(exact))
    assert low <= found <= high
    assert abs(found - exact) <= max(1, exact / 16)


def test_no_faults_have_no_percentile() -> None:
    assert percentile([0] * BUCKETS, 50) is None
    assert percentile([], 99) is None
    assert Statistics().latency_us(50) is None


class Counters:
    """A snapshot of the pager as the native side gives it, with 0 for all that is not said."""

    def __init__(self, **values: Any) -> None:
        self.latency = [0] * BUCKETS
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> int:
        return 0


def snapshot(state: State = State.TRANSFERRING, *, now: int = 0, **values: Any) -> Statistics:
    counters: Any = Counters(**values)
    return Statistics.from_pager(counters, state, now)


def test_every_counter_arrives_at_its_own_field() -> None:
    names = {
        "nr_tasks": "tasks",
        "nr_gone": "tasks_gone",
        "nr_forks": "forks",
        "nr_requests": "requests",
        "nr_demand_requests": "demand_requests",
        "nr_faults": "faults",
        "latency_sum_ns": "latency_sum_ns",
        "latency_max_ns": "latency_max_ns",
        "bytes_received": "bytes_received",
    }
    kinds = (
        "total",
        "missing",
        "received",
        "demand",
        "background",
        "existing",
        "dropped",
        "zero",
        "poisoned",
    )
    names |= {f"pages_{kind}": f"pages_{kind}" for kind in kinds}
    values: dict[str, Any] = {native: 100 + at for at, native in enumerate(names)}
    found = snapshot(**values)
    assert {ours: getattr(found, ours) for ours in names.values()} == {
        ours: 100 + at for at, ours in enumerate(names.values())
    }
    found = snapshot(nr_events_fork=1, nr_events_remap=2, nr_events_remove=3, nr_events_unmap=4)
    assert found.events == Events(fork=1, remap=2, remove=3, unmap=4)


def test_times() -> None:
    second = 10**9
    waiting = snapshot(State.WAITING, created_ns=5 * second, now=7 * second)
    assert (waiting.elapsed, waiting.restored, waiting.drain) == (2, None, None)
    running = snapshot(created_ns=5 * second, finished_ns=6 * second, now=9 * second)
    assert (running.elapsed, running.restored, running.drain) == (4, 1, None)
    times = {"created_ns": 5 * second, "finished_ns": 6 * second, "drained_ns": 9 * second}
    ended = snapshot(State.COMPLETE, **times, ended_ns=10 * second, now=99 * second)
    assert (ended.elapsed, ended.restored, ended.drain) == (5, 1, 3)


def test_settled_pages_stay_within_the_total() -> None:
    assert snapshot(pages_total=10, pages_missing=4).pages_settled == 6
    assert snapshot(pages_total=10, pages_missing=14).pages_settled == 0  # after a fork
    assert Statistics().pages_settled == 0


def test_rates_are_of_what_came_between() -> None:
    slow, fast = histogram([1_000_000] * 10), histogram([1_000_000] * 10 + [1_000] * 100)
    before = snapshot(now=10**9, pages_received=100, nr_faults=10, latency=slow)
    after = snapshot(now=3 * 10**9, pages_received=300, nr_faults=110, latency=fast)
    rates = after.since(before)
    assert (rates.bytes, rates.pages, rates.faults) == (100 * 4096, 100, 50)
    assert rates.p50_us == pytest.approx(1, rel=1 / 16)
    assert rates.p99_us == pytest.approx(1, rel=1 / 16)
    assert after.latency_us(99) == pytest.approx(1000, rel=1 / 16)
    nothing = after.since(after)
    assert (nothing.bytes, nothing.faults, nothing.p50_us) == (0, 0, None)
    assert after.since(Statistics()).pages == 100


def test_json_holds_everything_and_reads_back() -> None:
    found = dataclasses.replace(
        snapshot(now=2 * 10**9, nr_faults=3, latency=histogram([5, 5, 10**6]), latency_max_ns=10**6),
        events=Events(fork=1),
    )
    read = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert {field.name for field in dataclasses.fields(Statistics)} <= read.keys()
    assert read["state"] == "transferring"
    assert read["events"] == {"fork": 1, "remap": 0, "remove": 0, "unmap": 0}
    assert read["latency"] == [[5, 2], [bucket_edges(bucket_of(10**6))[0], 1]]
    assert read["latency_p50_us"] == pytest.approx(0.0055)
    assert read["latency_p99_us"] == pytest.approx(1000, rel=1 / 16)
    assert read["latency_max_us"] == 1000
    assert json.loads(json.dumps(Statistics().to_json(), allow_nan=False))["latency_p50_us"] is None


def test_state_alone_can_change() -> None:
    found = snapshot(pages_total=5)
    assert found.with_state(State.FAILED) == dataclasses.replace(found, state=State.FAILED)
