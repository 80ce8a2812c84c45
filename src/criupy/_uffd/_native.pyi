"""Types of the cffi extension, in the part that Python uses.

``lib`` follows ``criupy.h``: every call returns ``>= 0`` or ``-errno``.
"""

from typing import Any, Protocol

from typing_extensions import Buffer

class Frame(Protocol):
    cmd: int
    nr_pages: int
    vaddr: int
    dst_id: int

class Stats(Protocol):
    """``struct criupy_stats``; times are nanoseconds of CLOCK_MONOTONIC, 0 for "not yet"."""

    phase: int
    outcome: int
    link: int
    link_error: int
    urgent_link: int
    urgent_error: int
    refused: int
    error: int
    close_status: int
    poison_error: int
    reply_fault: int
    bad_reply: Frame
    bad_reply_offset: int
    nr_obeyed: int
    created_ns: int
    finished_ns: int
    drained_ns: int
    ended_ns: int
    nr_tasks: int
    nr_forks: int
    nr_gone: int
    nr_live: int
    pages_total: int
    pages_missing: int
    pages_received: int
    local_total: int
    local_missing: int
    local_received: int
    pages_demand: int
    pages_background: int
    pages_existing: int
    pages_dropped: int
    pages_zero: int
    pages_poisoned: int
    bytes_received: int
    nr_requests: int
    nr_demand_requests: int
    nr_outstanding: int
    window_pages: int
    rtt_ns: int
    nr_faults: int
    nr_events_fork: int
    nr_events_remap: int
    nr_events_remove: int
    nr_events_unmap: int
    nr_again: int
    nr_notices_lost: int
    latency_sum_ns: int
    latency_max_ns: int
    latency: list[int]
    link_fault: Any
    urgent_fault: Any

class Notice(Protocol):
    kind: int
    error: int
    a: int
    b: int

class Served(Protocol):
    """``struct criupy_served``; times are nanoseconds of CLOCK_MONOTONIC, 0 for "not yet"."""

    serial: int
    reason: int
    error: int
    frame: Frame
    offset: int
    frame_size: int
    ended: int
    started_ns: int
    first_ns: int
    ended_ns: int
    nr_requests: int
    nr_pages: int
    bytes_received: int
    fault: Any

class UpstreamStats(Protocol):
    """``struct criupy_upstream_stats``."""

    state: int
    error: int
    close_status: int
    disk_error: int
    complete: int
    reply_fault: int
    bad_reply: Frame
    bad_reply_offset: int
    bytes_received: int
    nr_requests: int
    nr_urgent: int
    nr_outstanding: int
    pages_total: int
    pages_fetched: int
    pages_kept: int
    pages_evicted: int
    pages_given: int

class Asked(Protocol):
    """``struct criupy_question``."""

    serial: int
    frame: Frame
    frame_size: int
    nr_entries: int
    starts: Any
    nr_pages: Any
    flags: Any
    hello: Any

class _FFI(Protocol):
    NULL: Any
    def new(self, cdecl: str, init: Any = ...) -> Any: ...
    def cast(self, cdecl: str, value: int | Any) -> Any: ...
    def gc(self, cdata: Any, destructor: Any, size: int = ...) -> Any: ...
    def buffer(self, cdata: Any, size: int) -> Buffer: ...
    def string(self, cdata: Any, maxlen: int = ...) -> bytes: ...
    def from_buffer(self, cdecl: str, buffer: Buffer) -> Any: ...

ffi: _FFI
# The declarations themselves are in criupy.h; cffi checks each call against them.
lib: Any
