"""The pager with a page server of ours: several runs in one request."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from criupy._uffd.pager_linux import Link, NoticeKind, ReplyFault
from native_lanes import both, ended, lazy, running
from native_peer import (
    ADD_F_PRESENT,
    GETV,
    GETV_PRESENT,
    Restore,
    Source,
    content,
    remote_image,
)
from native_target import MADV_DONTNEED, PAGE, Target
from test_native_uffd import usable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(usable()), reason=usable()),
    pytest.mark.usefixtures("no_descriptor_is_left"),
]


@pytest.fixture
def bulk(no_descriptor_is_left: None) -> Iterator[Source]:
    with Source() as source:
        yield source


@pytest.fixture
def urgent(no_descriptor_is_left: None) -> Iterator[Source]:
    with Source() as source:
        yield source


@pytest.fixture
def restore(no_descriptor_is_left: None) -> Iterator[Restore]:
    with Restore(window_pages=16) as restore:
        yield restore


EXTENTS = [(0, 3), (5, 1), (9, 4), (20, 2), (30, 1), (40, 8)]


def scattered(restore: Restore, target: Target, extents: Sequence[tuple[int, int]] = EXTENTS) -> int:
    addr, uffd = target.lazy(64)
    restore.pager.add_task(77, uffd, remote_image(77, [(addr + first * PAGE, nr) for first, nr in extents]))
    return addr


def expected(addr: int, extents: Sequence[tuple[int, int]] = EXTENTS) -> bytes:
    out = bytearray(64 * PAGE)
    for first, nr in extents:
        out[first * PAGE : (first + nr) * PAGE] = content(77, addr + first * PAGE, nr)
    return bytes(out)


def test_scattered_extents_come_with_one_request(restore: Restore, target: Target, bulk: Source) -> None:
    addr = scattered(restore, target)
    restore.link_lane(bulk)
    running(restore, bulk)
    task_id, runs = bulk.getv()
    # Sixteen pages: the last run is cut.
    cut = [*EXTENTS[:-1], (40, 5)]
    assert (task_id, runs) == (77, [(addr + first * PAGE, nr) for first, nr in cut])
    bulk.reply_all(task_id, runs)
    assert bulk.answer() == (3, addr + 45 * PAGE, 77)
    assert bulk.close() == "FIN"
    ended(restore)
    assert target.call("read", addr, 64 * PAGE) == expected(addr)
    stats = restore.pager.snapshot()
    assert (stats.nr_requests, stats.pages_received, stats.pages_background) == (2, 19, 19)


def test_what_is_there_or_asked_for_is_left_out(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 64)
    both(restore, bulk, urgent)
    for page in (2, 6):
        order = target.start("read", addr + page * PAGE, PAGE)
        urgent.answer()
        order.result()
    assert target.call("madvise", addr + 9 * PAGE, PAGE, MADV_DONTNEED) == 0
    # Asked for, and not here: the background goes on behind the fault.
    order = target.start("read", addr + 4 * PAGE, PAGE)
    request = urgent.get()
    running(restore, bulk)
    task_id, runs = bulk.getv()
    assert runs == [(addr + first * PAGE, nr) for first, nr in ((5, 1), (7, 2), (10, 13))]
    bulk.reply_all(task_id, runs)
    urgent.reply(request)
    assert order.result() == content(77, addr + 4 * PAGE)
    bulk.serve()
    urgent.serve()
    ended(restore)
    assert bulk.joined() == "FIN"
    wanted = bytearray(content(77, addr, 64))
    wanted[9 * PAGE : 10 * PAGE] = bytes(PAGE)
    assert target.call("read", addr, 64 * PAGE) == wanted
    assert sum(nr for runs in bulk.runs for _, nr in runs) + sum(nr for nr, *_ in bulk.requests) == 60 - 16


def test_a_run_that_fills_a_request_is_a_get(restore: Restore, target: Target, bulk: Source) -> None:
    addr = lazy(restore, target, 64)
    restore.link_lane(bulk)
    bulk.serve()
    restore.finish()
    ended(restore)
    assert bulk.joined() == "FIN"
    assert bulk.requests == [(16, addr + first * PAGE, 77) for first in range(0, 64, 16)]
    assert not bulk.runs


def test_a_stock_source_is_never_asked_for_several_runs(
    restore: Restore, target: Target, bulk: Source
) -> None:
    addr = scattered(restore, target)
    restore.link(bulk)
    bulk.serve()
    restore.finish()
    ended(restore)
    assert bulk.joined() == "FIN"
    assert bulk.requests == [(nr, addr + first * PAGE, 77) for first, nr in EXTENTS]
    assert bulk.said == [0x1023]


def test_no_more_runs_than_a_request_may_have(target: Target, bulk: Source) -> None:
    with Restore(window_pages=1000, request_pages=300) as restore:
        addr, uffd = target.lazy(600)
        places = [(addr + 2 * page * PAGE, 1) for page in range(300)]
        restore.pager.add_task(77, uffd, remote_image(77, places))
        restore.link_lane(bulk)
        running(restore, bulk)
        first, second = bulk.getv(), bulk.getv()
        assert (first[1], second[1]) == (places[:256], places[256:])
        bulk.reply_all(*first)
        bulk.reply_all(*second)
        assert bulk.close() == "FIN"
        ended(restore)
        got = target.call("read", addr, 600 * PAGE)
        for page in range(0, 600, 2):
            assert got[page * PAGE : (page + 1) * PAGE] == content(77, addr + page * PAGE)
            assert got[(page + 1) * PAGE : (page + 2) * PAGE] == bytes(PAGE)


def test_two_tasks_are_asked_for_apart(restore: Restore, bulk: Source) -> None:
    with Target.spawn() as one, Target.spawn() as two:
        places = []
        for pid, task in ((11, one), (12, two)):
            addr, uffd = task.lazy(8)
            extents = [(addr, 2), (addr + 4 * PAGE, 2)]
            restore.pager.add_task(pid, uffd, remote_image(pid, extents))
            places.append((pid, task, addr, extents))
        restore.link_lane(bulk)
        running(restore, bulk)
        asked = [bulk.getv(), bulk.getv()]
        assert sorted(asked) == sorted((pid, extents) for pid, _, _, extents in places)
        for one_of_them in asked:
            bulk.reply_all(*one_of_them)
        assert bulk.close() == "FIN"
        ended(restore)
        for pid, task, addr, _ in places:
            assert task.call("read", addr, 8 * PAGE) == (
                content(pid, addr, 2) + bytes(2 * PAGE) + content(pid, addr + 4 * PAGE, 2) + bytes(2 * PAGE)
            )


def test_forked_and_dropped_while_several_runs_are_in_flight(
    restore: Restore, target: Target, bulk: Source
) -> None:
    extents = [(0, 4), (6, 4), (12, 8)]
    addr = scattered(restore, target, extents)
    restore.link_lane(bulk)
    running(restore, bulk)
    asked = bulk.getv()
    child = target.fork()
    assert target.call("madvise", addr + 2 * PAGE, 6 * PAGE, MADV_DONTNEED) == 0
    assert child.call("munmap", addr + 13 * PAGE, 2 * PAGE) == 0
    restore.until(lambda stats: stats.nr_events_remove == stats.nr_events_unmap == 1)
    bulk.reply_all(*asked)
    assert child.call("read", addr, 13 * PAGE) == expected(addr, extents)[: 13 * PAGE]
    assert child.call("read", addr + 15 * PAGE, PAGE) == content(77, addr + 15 * PAGE)
    bulk.serve()
    ended(restore)
    assert bulk.joined() == "FIN"
    wanted = bytearray(expected(addr, extents))
    wanted[2 * PAGE : 8 * PAGE] = bytes(6 * PAGE)
    assert target.call("read", addr, 64 * PAGE) == wanted


def test_several_runs_wait_together_for_a_task_that_cannot_take_them(
    restore: Restore, target: Target, bulk: Source
) -> None:
    """While an event is unread, for want of a descriptor, the kernel takes no page."""
    addr = scattered(restore, target)
    restore.link_lane(bulk)
    running(restore, bulk)
    asked = bulk.getv()
    waiting = target.start("read", addr, PAGE)
    restore.until(lambda stats: stats.nr_faults == 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    orders = target.prepare_fork()
    taken = [os.dup(0)]
    while taken[-1] < max(int(fd.name) for fd in Path("/proc/self/fd").iterdir()) - 1:
        taken.append(os.dup(0))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1, limits[1]))
        target.begin_fork()
        restore.until(lambda _: any(n.kind == NoticeKind.NO_DESCRIPTOR for n in restore.notices))
        bulk.reply_all(*asked)
        stats = restore.until(lambda stats: stats.nr_again > 20)
        assert (stats.pages_received, stats.pages_background) == (16, 0)
        # It is kept, and not asked for again.
        assert (stats.nr_requests, stats.nr_outstanding) == (1, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
    child = target.end_fork(orders)
    bulk.serve()
    assert waiting.result() == content(77, addr)
    ended(restore)
    assert bulk.joined() == "FIN"
    assert not bulk.runs
    for task in (target, child):
        assert task.call("read", addr, 64 * PAGE) == expected(addr)


@pytest.mark.parametrize(
    ("cmd", "nr", "runs", "id", "fault"),
    [
        (ADD_F_PRESENT, 16, 6, 77, ReplyFault.COMMAND),
        (GETV, 16, 6, 77, ReplyFault.COMMAND),
        (GETV_PRESENT, 16, 5, 77, ReplyFault.ADDRESS),
        (GETV_PRESENT, 16, 6, 78, ReplyFault.ID),
        (GETV_PRESENT, 17, 6, 77, ReplyFault.COUNT),
        (GETV_PRESENT, 15, 6, 77, ReplyFault.COUNT),
        (GETV_PRESENT, 0, 6, 77, ReplyFault.COUNT),
    ],
)
def test_a_bad_answer_to_several_runs_ends_the_lane(
    restore: Restore,
    target: Target,
    bulk: Source,
    urgent: Source,
    cmd: int,
    nr: int,
    runs: int,
    id: int,
    fault: ReplyFault,
) -> None:
    addr = scattered(restore, target)
    both(restore, bulk, urgent)
    running(restore, bulk)
    bulk.getv()
    bulk.sock.sendall(bulk.header(cmd, nr, runs, id) + b"x" * 100)
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert (stats.link_error, stats.reply_fault, stats.urgent_link) == (errno.EPROTO, fault, Link.OPEN)
    bad = stats.bad_reply
    assert (bad.cmd, bad.nr_pages, bad.vaddr, bad.dst_id) == (cmd, nr, runs, id)
    assert (stats.bad_reply_offset, stats.pages_received) == (0, 0)
    order = target.start("read", addr + 41 * PAGE, PAGE)
    urgent.answer()
    assert order.result() == content(77, addr + 41 * PAGE)


def test_a_bad_answer_on_the_urgent_lane(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 4)
    both(restore, bulk, urgent)
    first = target.start("read", addr + PAGE, PAGE)
    urgent.answer()
    first.result()
    order = target.start("read", addr, PAGE)
    urgent.get()
    urgent.sock.sendall(urgent.header(ADD_F_PRESENT, 2, addr, 77))
    stats = restore.until(lambda stats: stats.urgent_link == Link.LOST)
    assert (stats.urgent_error, stats.link, stats.link_error) == (errno.EPROTO, Link.OPEN, 0)
    assert (stats.reply_fault, stats.bad_reply_offset) == (ReplyFault.COUNT, 32 + PAGE)
    assert bulk.answer() == (1, addr, 77)
    assert order.result() == content(77, addr)


@pytest.mark.parametrize("where", [0, 20, 32, 32 + 3 * PAGE + 100])
def test_a_source_that_closes_inside_several_runs(
    restore: Restore, target: Target, bulk: Source, where: int
) -> None:
    """At a border, inside the header, behind it, inside the second run: its whole pages count."""
    addr = scattered(restore, target)
    restore.link_lane(bulk)
    running(restore, bulk)
    task_id, runs = bulk.getv()
    whole = bulk.header(GETV_PRESENT, 16, 6, 77) + b"".join(content(77, *run) for run in runs)
    bulk.sock.sendall(whole[:where])
    bulk.sock.close()
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    # a reset where it has not read what was asked for since
    assert stats.link_error in (errno.EPIPE, errno.ECONNRESET)
    assert (stats.pages_received, stats.nr_outstanding) == (max(0, where - 32) // PAGE, 0)
    restore.pager.drop_link()
    with Source() as again:
        restore.link_lane(again)
        again.serve()
        ended(restore)
        assert again.joined() == "FIN"
        assert target.call("read", addr, 64 * PAGE) == expected(addr)
        assert task_id == 77
