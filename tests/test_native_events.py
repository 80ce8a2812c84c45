"""Fork, remap, remove and unmap while pages are on their way."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from criupy._uffd.pager_linux import NoticeKind, Outcome, Phase
from native_peer import Restore, Source, content, remote_image
from native_target import (
    MADV_DONTNEED,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    PROT_READ,
    PROT_WRITE,
    Target,
)
from test_native_uffd import usable

pytestmark = [
    pytest.mark.skipif(bool(usable()), reason=usable()),
    pytest.mark.usefixtures("no_descriptor_is_left"),
]

MADV_WIPEONFORK = 18
GIB = 1 << 30
KERNEL = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


class Moving:
    """A target of 16 lazy pages whose background run has been asked for and not answered."""

    def __init__(
        self, restore: Restore, target: Target, source: Source, *, not_inherited: bytes | None = None
    ) -> None:
        self.restore, self.target, self.source = restore, target, source
        self.addr, uffd = target.lazy(16)
        extents = [(self.addr, 8), (self.addr + 8 * PAGE, 8)] if not_inherited else [(self.addr, 16)]
        restore.pager.add_task(77, uffd, remote_image(77, extents, not_inherited=not_inherited))
        restore.link(source)
        restore.finish()
        self.requests = [source.get() for _ in extents]

    def page(self, n: int) -> int:
        return self.addr + n * PAGE

    def data(self, n: int, nr: int = 1) -> bytes:
        return content(77, self.page(n), nr)

    def arrive(self) -> None:
        """Send what is asked for, let the pager finish, and see it close."""
        for request in self.requests:
            self.source.reply(request)
        self.source.serve()
        stats = self.restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert self.source.joined() == "FIN"
        assert (stats.outcome, stats.error, stats.pages_missing) == (Outcome.COMPLETE, 0, 0)
        assert stats.nr_outstanding == 0


@pytest.fixture
def moving(no_descriptor_is_left: None) -> Iterator[Moving]:
    with Target.spawn() as target, Source() as source, Restore() as restore:
        yield Moving(restore, target, source)


def test_fork_in_flight_serves_both_with_one_reply(moving: Moving) -> None:
    child = moving.target.fork()
    touches = [task.start("read", moving.addr, 16 * PAGE) for task in (moving.target, child)]
    moving.restore.until(lambda stats: stats.nr_faults == 2)
    moving.arrive()
    assert [touch.result() for touch in touches] == [moving.data(0, 16)] * 2
    assert len(moving.source.requests) == 1
    assert moving.restore.pager.snapshot().nr_forks == 1


def test_a_grandchild_diverges(moving: Moving) -> None:
    child = moving.target.fork()
    grandchild = child.fork()
    assert child.call("madvise", moving.page(2), 3 * PAGE, MADV_DONTNEED) == 0
    assert grandchild.call("munmap", moving.page(8), 4 * PAGE) == 0
    moving.arrive()
    assert moving.target.call("read", moving.addr, 16 * PAGE) == moving.data(0, 16)
    assert child.call("read", moving.addr, 16 * PAGE) == moving.data(0, 2) + bytes(3 * PAGE) + moving.data(
        5, 11
    )
    assert grandchild.call("read", moving.addr, 8 * PAGE) == moving.data(0, 8)
    assert grandchild.call("read", moving.page(12), 4 * PAGE) == moving.data(12, 4)


def test_what_a_child_does_not_inherit_reads_zeros(no_descriptor_is_left: None) -> None:
    with Target.spawn() as target, Source() as source, Restore(window_pages=64) as restore:
        moving = Moving(restore, target, source, not_inherited=b"\x00\x01")
        assert target.call("madvise", moving.page(8), 8 * PAGE, MADV_WIPEONFORK) == 0
        child = target.fork()
        moving.arrive()
        assert target.call("read", moving.addr, 16 * PAGE) == moving.data(0, 16)
        assert child.call("read", moving.addr, 16 * PAGE) == moving.data(0, 8) + bytes(8 * PAGE)


def test_a_child_that_dies_at_once(moving: Moving) -> None:
    child = moving.target.fork()
    child.orders.close()
    assert moving.target.call("wait", child.pid) == 0
    moving.target.children.remove(child)
    moving.arrive()
    assert moving.target.call("read", moving.addr, 16 * PAGE) == moving.data(0, 16)


def test_remap_in_flight(moving: Moving) -> None:
    place = moving.target.call("map", 16)
    moved = moving.target.call(
        "mremap", moving.page(4), 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place
    )
    assert moved == place
    touch = moving.target.start("read", place, 8 * PAGE)
    moving.arrive()
    assert touch.result() == moving.data(4, 8)
    assert moving.target.call("read", moving.addr, 4 * PAGE) == moving.data(0, 4)
    assert moving.target.call("read", moving.page(12), 4 * PAGE) == moving.data(12, 4)


def test_remap_there_and_home_again(moving: Moving) -> None:
    place = moving.target.call("map", 16)
    fixed = MREMAP_MAYMOVE | MREMAP_FIXED
    for a, b in ((moving.page(4), place), (place, moving.page(4))):
        assert moving.target.call("mremap", a, 8 * PAGE, 8 * PAGE, fixed, b) == b
    moving.arrive()
    assert moving.target.call("read", moving.addr, 16 * PAGE) == moving.data(0, 16)


def test_remap_over_lazy_pages(moving: Moving) -> None:
    to = moving.page(10)
    assert (
        moving.target.call("mremap", moving.page(2), 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to)
        == to
    )
    moving.arrive()
    assert moving.target.call("read", moving.addr, 2 * PAGE) == moving.data(0, 2)
    assert moving.target.call("read", moving.page(6), 10 * PAGE) == moving.data(6, 4) + moving.data(
        2, 4
    ) + moving.data(14, 2)


def test_remap_that_grows_reads_zeros_behind(moving: Moving) -> None:
    place = moving.target.call("map", 32)
    assert (
        moving.target.call(
            "mremap", moving.page(0), 16 * PAGE, 24 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place
        )
        == place
    )
    touch = moving.target.start("read", place, 24 * PAGE)
    moving.arrive()
    assert touch.result() == moving.data(0, 16) + bytes(8 * PAGE)


@pytest.mark.skipif(
    KERNEL < (6, 15),
    reason="before Linux 6.15 the event of an mremap that moves and shrinks tells the old length",
)
def test_remap_that_shrinks_leaves_neighbours_alone(moving: Moving) -> None:
    # 8..12 move onto 0..2, which is what is left of them; 2..8 must stay.
    assert (
        moving.target.call(
            "mremap", moving.page(8), 4 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, moving.page(0)
        )
        == moving.addr
    )
    moving.arrive()
    assert moving.target.call("read", moving.addr, 8 * PAGE) == moving.data(8, 2) + moving.data(2, 6)
    assert moving.target.call("read", moving.page(12), 4 * PAGE) == moving.data(12, 4)


def test_what_stays_behind_after_dontunmap_reads_zeros(moving: Moving) -> None:
    moved = moving.target.call("mremap", moving.addr, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP)
    assert moved != moving.addr
    touches = [moving.target.start("read", addr, 16 * PAGE) for addr in (moving.addr, moved)]
    moving.arrive()
    assert [touch.result() for touch in touches] == [bytes(16 * PAGE), moving.data(0, 16)]


def test_remap_after_fork_is_one_sided(moving: Moving) -> None:
    child = moving.target.fork()
    place = child.call("map", 16)
    assert (
        child.call("mremap", moving.addr, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place
    )
    moving.arrive()
    assert moving.target.call("read", moving.addr, 16 * PAGE) == moving.data(0, 16)
    assert child.call("read", place, 16 * PAGE) == moving.data(0, 16)


def test_dropped_in_flight_reads_zeros(moving: Moving) -> None:
    waiting = moving.target.start("read", moving.page(5), PAGE)
    moving.restore.until(lambda stats: stats.nr_faults == 1)
    assert moving.target.call("madvise", moving.page(4), 8 * PAGE, MADV_DONTNEED) == 0
    # Who waited for one of them does not wait for the source any more.
    assert waiting.result() == bytes(PAGE)
    moving.arrive()
    assert moving.target.call("read", moving.addr, 16 * PAGE) == (
        moving.data(0, 4) + bytes(8 * PAGE) + moving.data(12, 4)
    )
    assert moving.restore.pager.snapshot().pages_dropped == 8


def test_dropped_after_it_came_reads_zeros(moving: Moving) -> None:
    addr, uffd = moving.target.lazy(1)
    moving.restore.pager.add_task(78, uffd, remote_image(78, [(addr, 1)]))
    moving.source.reply(moving.requests.pop())
    assert moving.target.call("read", moving.page(3), PAGE) == moving.data(3)
    assert moving.target.call("madvise", moving.addr, 16 * PAGE, MADV_DONTNEED) == 0
    assert moving.target.call("read", moving.addr, 16 * PAGE) == bytes(16 * PAGE)
    moving.arrive()
    assert moving.target.call("read", addr, PAGE) == content(78, addr)


def test_unmapped_in_flight(moving: Moving) -> None:
    assert moving.target.call("munmap", moving.page(4), 8 * PAGE) == 0
    assert moving.target.call("map", 8, moving.page(4)) == moving.page(4)
    moving.arrive()
    assert moving.target.call("read", moving.addr, 16 * PAGE) == (
        moving.data(0, 4) + bytes(8 * PAGE) + moving.data(12, 4)
    )


@pytest.mark.parametrize("gap", [1, 7, 8, 15])
def test_a_border_moves_without_an_event(moving: Moving, gap: int) -> None:
    assert moving.target.call("mprotect", moving.page(gap), PAGE, PROT_READ) == 0
    touch = moving.target.start("read", moving.addr, 16 * PAGE)
    moving.arrive()
    assert touch.result() == moving.data(0, 16)
    assert moving.target.call("mprotect", moving.page(gap), PAGE, PROT_READ | PROT_WRITE) == 0


def test_every_other_page_is_a_mapping(moving: Moving) -> None:
    for n in range(0, 16, 2):
        assert moving.target.call("mprotect", moving.page(n), PAGE, PROT_READ) == 0
    moving.arrive()
    assert moving.target.call("read", moving.addr, 16 * PAGE) == moving.data(0, 16)


def test_guard_pages_come_and_go(moving: Moving) -> None:
    addr, uffd = moving.target.lazy(1)
    moving.restore.pager.add_task(78, uffd, remote_image(78, [(addr, 1)]))
    moving.source.reply(moving.requests.pop())
    assert moving.target.call("read", moving.addr, 16 * PAGE) == moving.data(0, 16)
    got, error = moving.target.start("madvise", moving.page(4), PAGE, MADV_GUARD_INSTALL).outcome()
    if got:
        pytest.skip(f"MADV_GUARD_INSTALL (Linux 6.13): {os.strerror(error)}")
    assert moving.target.call("madvise", moving.page(4), PAGE, MADV_GUARD_REMOVE) == 0
    touch = moving.target.call("read", moving.addr, 16 * PAGE)
    assert touch == moving.data(0, 4) + bytes(PAGE) + moving.data(5, 11)
    moving.arrive()


def test_4_gib_unmapped_and_dropped_in_one_call(no_descriptor_is_left: None) -> None:
    nr = 9 * GIB // PAGE
    with Target.spawn() as target, Source() as source, Restore() as restore:
        addr, uffd = target.lazy(nr)
        restore.pager.add_task(77, uffd, remote_image(77, [(addr, nr)]))
        restore.link(source)
        restore.watch()
        assert target.call("munmap", addr + GIB, 4 * GIB) == 0
        assert target.call("madvise", addr + 5 * GIB, 4 * GIB - 4 * PAGE, MADV_DONTNEED) == 0
        assert target.call("madvise", addr, GIB - 4 * PAGE, MADV_DONTNEED) == 0
        assert restore.until(lambda stats: stats.pages_missing == 8).pages_dropped == nr - 8
        source.serve()
        restore.criu.sendall(b"FTSR")
        restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert source.joined() == "FIN"
        for start in (addr + GIB - 4 * PAGE, addr + 9 * GIB - 4 * PAGE):
            assert target.call("read", start, 4 * PAGE) == content(77, start, 4)
        assert target.call("read", addr + 5 * GIB, 4 * PAGE) == bytes(4 * PAGE)


def test_a_fork_without_a_free_descriptor_waits(moving: Moving) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    orders = moving.target.prepare_fork()
    taken = [os.dup(0)]
    # No number below the last one is free now, and none above it is allowed.
    while taken[-1] < max(int(fd.name) for fd in Path("/proc/self/fd").iterdir()) - 1:
        taken.append(os.dup(0))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1, limits[1]))
        moving.target.begin_fork()
        moving.restore.until(
            lambda _: any(n.kind == NoticeKind.NO_DESCRIPTOR for n in moving.restore.notices)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
    child = moving.target.end_fork(orders)
    moving.arrive()
    for task in (moving.target, child):
        assert task.call("read", moving.addr, 16 * PAGE) == moving.data(0, 16)
