"""The pager with a source that has some pages, and pages files that have the others."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest

from criupy._uffd.image_linux import Image
from criupy._uffd.pager_linux import Link, Outcome, Phase
from criupy.errors import UffdError
from criupy.images import FILE_SHIFT, NO_PAGE_INDEX
from native_peer import Restore, Source, content
from native_target import MADV_DONTNEED, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE, Target
from test_native_uffd import needs_poison, usable

pytestmark = [
    pytest.mark.skipif(bool(usable()), reason=usable()),
    pytest.mark.usefixtures("no_descriptor_is_left"),
]

TASK = 77
REMOTE = -1


@pytest.fixture
def source(no_descriptor_is_left: None) -> Iterator[Source]:
    with Source() as source:
        yield source


@pytest.fixture
def restore(no_descriptor_is_left: None) -> Iterator[Restore]:
    with Restore(window_pages=16) as restore:
        yield restore


def mixed(
    restore: Restore,
    target: Target,
    directory: Path,
    counts: list[int],
    sources: list[int],
    nr_files: int = 2,
) -> int:
    """Map memory and give its parts, so many pages each, to the source or to a file by number."""
    addr, uffd = target.lazy(sum(counts))
    starts = [addr + first * PAGE for first in accumulate(counts[:-1], initial=0)]
    paths = [directory / f"pages-{n}.img" for n in range(nr_files)]
    data = []
    files = [path.open("wb") for path in paths]
    for start, nr, where in zip(starts, counts, sources, strict=True):
        if where == REMOTE:
            data.append(NO_PAGE_INDEX)
            continue
        data.append(where << FILE_SHIFT | files[where].tell() // PAGE)
        files[where].write(content(TASK, start, nr))
    for file in files:
        file.close()
    image = Image(TASK, array("Q", starts), array("Q", counts), array("Q", data))
    for path in paths:
        image.attach(path)
    restore.pager.add_task(TASK, uffd, image)
    return addr


def pages_asked(source: Source) -> list[int]:
    return sorted(address // PAGE + i for nr_pages, address, _ in source.requests for i in range(nr_pages))


def test_each_page_from_where_it_is(tmp_path: Path, target: Target, source: Source, restore: Restore) -> None:
    counts, sources = [3, 40, 5, 7, 1, 30], [REMOTE, 0, 1, REMOTE, 0, REMOTE]
    addr = mixed(restore, target, tmp_path, counts, sources)
    restore.link(source)
    source.serve()
    for page in (0, 3, 42, 45, 48, 55, 56, 85):
        assert target.call("read", addr + page * PAGE, PAGE) == content(TASK, addr + page * PAGE)
    restore.finish()
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert target.call("read", addr, 86 * PAGE) == content(TASK, addr, 86)
    assert source.joined() == "FIN"
    remote = [*range(3), *range(48, 55), *range(56, 86)]
    assert pages_asked(source) == [addr // PAGE + page for page in remote]
    assert (stats.outcome, stats.link) == (Outcome.COMPLETE, Link.CLOSED)
    assert (stats.pages_total, stats.pages_received, stats.pages_missing) == (86, 86, 0)
    assert (stats.local_total, stats.local_received, stats.local_missing) == (46, 46, 0)
    assert stats.pages_demand + stats.pages_background == 86


def test_files_are_read_while_the_source_thinks(
    tmp_path: Path, target: Target, source: Source, restore: Restore
) -> None:
    addr = mixed(restore, target, tmp_path, [20, 300, 20], [REMOTE, 0, REMOTE], 1)
    restore.link(source)
    restore.finish()
    first = source.get()
    assert first == (16, addr, TASK)
    # The window is full; what is here comes meanwhile, asked for or not.
    stats = restore.until(lambda stats: not stats.local_missing)
    assert (stats.pages_missing, stats.pages_background) == (40, 300)
    assert stats.phase == Phase.RUNNING
    source.reply(first)
    source.serve()
    restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert target.call("read", addr, 340 * PAGE) == content(TASK, addr, 340)
    assert source.joined() == "FIN"


def test_what_the_source_has_comes_first(
    tmp_path: Path, target: Target, source: Source, restore: Restore
) -> None:
    """The first request goes out before a page of a file is in place, though that is lower in memory."""
    addr = mixed(restore, target, tmp_path, [4096, 16], [0, REMOTE], 1)
    restore.link(source)
    restore.finish()
    assert source.get() == (16, addr + 4096 * PAGE, TASK)
    assert restore.pager.snapshot().local_missing > 0
    source.reply((16, addr + 4096 * PAGE, TASK))
    assert source.close() == "FIN"
    restore.until(lambda stats: stats.phase == Phase.ENDED)


def test_forked_and_moved(tmp_path: Path, target: Target, source: Source, restore: Restore) -> None:
    addr = mixed(restore, target, tmp_path, [16, 16, 16, 16], [REMOTE, 0, 1, REMOTE])
    restore.link(source)
    source.serve()
    restore.watch()
    place = target.call("map", 64)
    child = target.fork()
    # Over the border of two kinds, and of two files.
    assert (
        child.call("mremap", addr + 8 * PAGE, 32 * PAGE, 32 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place)
        == place
    )
    assert target.call("madvise", addr + 12 * PAGE, 8 * PAGE, MADV_DONTNEED) == 0
    assert child.call("read", place + 9 * PAGE, PAGE) == content(TASK, addr + 17 * PAGE)
    restore.criu.sendall(b"FTSR")
    restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert child.call("read", addr, 8 * PAGE) == content(TASK, addr, 8)
    assert child.call("read", place, 32 * PAGE) == content(TASK, addr + 8 * PAGE, 32)
    assert child.call("read", addr + 40 * PAGE, 24 * PAGE) == content(TASK, addr + 40 * PAGE, 24)
    assert target.call("read", addr, 12 * PAGE) == content(TASK, addr, 12)
    assert target.call("read", addr + 12 * PAGE, 8 * PAGE) == bytes(8 * PAGE)
    assert target.call("read", addr + 20 * PAGE, 44 * PAGE) == content(TASK, addr + 20 * PAGE, 44)
    assert source.joined() == "FIN"


def test_a_link_that_is_lost_when_all_has_come(
    tmp_path: Path, target: Target, source: Source, restore: Restore
) -> None:
    addr = mixed(restore, target, tmp_path, [2, 300], [REMOTE, 0], 1)
    restore.link(source)
    for page in range(2):
        order = target.start("read", addr + page * PAGE, PAGE)
        source.answer()
        assert order.result() == content(TASK, addr + page * PAGE)
    source.sock.close()
    restore.until(lambda stats: stats.link == Link.LOST)
    restore.finish()
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.pages_poisoned, stats.local_received) == (Outcome.COMPLETE, 0, 300)
    assert target.call("read", addr, 302 * PAGE) == content(TASK, addr, 302)


@needs_poison
def test_a_link_that_is_lost_takes_nothing_that_is_here(
    tmp_path: Path, target: Target, source: Source, restore: Restore
) -> None:
    counts, sources = [20, 30, 20, 500], [REMOTE, 0, REMOTE, 1]
    addr = mixed(restore, target, tmp_path, counts, sources)
    restore.link(source)
    restore.finish()
    first = source.get()
    source.reply(first)
    restore.until(lambda stats: stats.pages_missing <= 554)
    source.sock.close()
    restore.until(lambda stats: stats.link == Link.LOST)
    restore.pager.give_up()
    restore.pager.poison()
    stats = restore.obeyed()
    assert (stats.pages_poisoned, stats.nr_live, stats.local_received) == (24, 0, 530)
    assert target.call("read", addr, 16 * PAGE) == content(TASK, addr, 16)
    assert target.start("write_to_pipe", addr + 16 * PAGE, PAGE).outcome() == (None, errno.EFAULT)
    for first_page, nr in ((20, 30), (70, 500)):
        start = addr + first_page * PAGE
        assert target.call("read", start, nr * PAGE) == content(TASK, start, nr)
    restore.pager.end(reset=False)
    restore.until(lambda stats: stats.phase == Phase.ENDED)


@needs_poison
def test_a_file_that_shrinks_means_no_zeros(
    tmp_path: Path, target: Target, source: Source, restore: Restore
) -> None:
    addr = mixed(restore, target, tmp_path, [16, 64], [REMOTE, 0], 1)
    restore.link(source)
    os.truncate(tmp_path / "pages-0.img", 16 * PAGE)
    source.serve()
    restore.finish()
    assert restore.until(lambda stats: stats.error != 0).error == errno.ENODATA
    restore.pager.poison()
    stats = restore.obeyed()
    assert stats.pages_poisoned >= 64
    assert target.start("write_to_pipe", addr + 40 * PAGE, PAGE).outcome() == (None, errno.EFAULT)
    restore.pager.end(reset=False)
    restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert source.joined()


def test_a_task_without_all_its_files(tmp_path: Path, restore: Restore) -> None:
    data = array("Q", [0, 1 << FILE_SHIFT])
    image = Image(TASK, array("Q", [0x10000, 0x20000]), array("Q", [1, 1]), data)
    path = tmp_path / "pages"
    path.write_bytes(bytes(PAGE))
    image.attach(path)
    with pytest.raises(UffdError) as caught:
        restore.pager.add_task(TASK, -1, image)
    assert caught.value.errno == errno.EINVAL
    image.close()
