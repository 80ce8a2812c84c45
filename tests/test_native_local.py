"""The pager with a pages file instead of a source."""

from __future__ import annotations

import errno
import os
import struct
from array import array
from pathlib import Path

import pytest

from criupy._uffd.image_linux import Image
from criupy._uffd.pager_linux import NoticeKind, Outcome, Phase
from criupy.errors import UffdError
from native_peer import Restore
from native_target import MADV_DONTNEED, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE, Target
from test_native_uffd import needs_poison, usable

pytestmark = [
    pytest.mark.skipif(bool(usable()), reason=usable()),
    pytest.mark.usefixtures("no_descriptor_is_left"),
]


def pages_file(path: Path, nr_pages: int) -> Path:
    path.write_bytes(b"".join(struct.pack("<QQ", 5, page) * (PAGE // 16) for page in range(nr_pages)))
    return path


def file_data(first: int, nr: int) -> bytes:
    return b"".join(struct.pack("<QQ", 5, page) * (PAGE // 16) for page in range(first, first + nr))


def local_image(addr: int, path: Path, extents: list[tuple[int, int, int]]) -> Image:
    """Extents of (page of the mapping, nr, page of the file)."""
    image = Image(
        77,
        array("Q", [addr + first * PAGE for first, _, _ in extents]),
        array("Q", [nr for _, nr, _ in extents]),
        array("Q", [data for _, _, data in extents]),
    )
    image.attach(path)
    return image


def test_local_images(tmp_path: Path) -> None:
    path = pages_file(tmp_path / "pages-1.img", 700)
    with Target.spawn() as target, Restore() as restore:
        addr, uffd = target.lazy(1024)
        restore.pager.add_task(77, uffd, local_image(addr, path, [(0, 300, 400), (300, 1, 0), (400, 399, 1)]))
        early = target.start("read", addr + 299 * PAGE, 2 * PAGE)
        assert early.result() == file_data(699, 1) + file_data(0, 1)
        assert target.call("read", addr + 350 * PAGE, PAGE) == bytes(PAGE)
        restore.finish()
        stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert (stats.outcome, stats.pages_received, stats.pages_demand) == (Outcome.COMPLETE, 700, 2)
        assert target.call("read", addr, 300 * PAGE) == file_data(400, 300)
        assert target.call("read", addr + 400 * PAGE, 399 * PAGE) == file_data(1, 399)


def test_local_images_forked_and_moved(tmp_path: Path) -> None:
    path = pages_file(tmp_path / "pages-1.img", 64)
    with Target.spawn() as target, Restore() as restore:
        addr, uffd = target.lazy(64)
        restore.pager.add_task(77, uffd, local_image(addr, path, [(0, 64, 0)]))
        restore.watch()
        place = target.call("map", 64)
        assert target.call("read", addr + 9 * PAGE, PAGE) == file_data(9, 1)
        child = target.fork()
        assert child.call("mremap", addr, 32 * PAGE, 32 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place
        assert target.call("madvise", addr, 16 * PAGE, MADV_DONTNEED) == 0
        assert child.call("read", place + 30 * PAGE, PAGE) == file_data(30, 1)
        restore.criu.sendall(b"FTSR")
        restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert child.call("read", place, 32 * PAGE) == file_data(0, 32)
        assert child.call("read", addr + 32 * PAGE, 32 * PAGE) == file_data(32, 32)
        assert target.call("read", addr, 64 * PAGE) == bytes(16 * PAGE) + file_data(16, 48)


@needs_poison
def test_a_pages_file_that_shrinks_under_a_copier(tmp_path: Path) -> None:
    path = pages_file(tmp_path / "pages-1.img", 64)
    with Target.spawn() as target, Restore() as restore:
        addr, uffd = target.lazy(64)
        restore.pager.add_task(77, uffd, local_image(addr, path, [(0, 64, 0)]))
        os.truncate(path, 16 * PAGE)
        restore.finish()
        assert restore.until(lambda stats: stats.error != 0).error == errno.ENODATA
        restore.pager.poison()
        assert restore.obeyed().pages_poisoned == 64
        restore.pager.end(reset=False)
        restore.until(lambda stats: stats.phase == Phase.ENDED)


def test_local_images_of_a_forked_task_keep_nothing_waiting(tmp_path: Path) -> None:
    """What no copier takes is installed by the pager, and it looks up between two pieces."""
    path = tmp_path / "pages-1.img"
    path.touch()
    os.truncate(path, 4096 * PAGE)
    with Target.spawn() as target, Restore() as restore:
        addr, uffd = target.lazy(4096)
        restore.pager.add_task(77, uffd, local_image(addr, path, [(0, 4096, 0)]))
        restore.watch()
        target.fork()
        restore.criu.sendall(b"FTSR")
        seen = set()
        while (stats := restore.obeyed()).phase != Phase.ENDED:
            seen.add(stats.pages_missing)
            restore.pager.probe()
        # More than that of all, and that of none.
        assert len(seen - {0}) > 2, seen


def test_an_image_that_is_gone_still_tells_its_size(tmp_path: Path) -> None:
    image = local_image(0x10000, pages_file(tmp_path / "pages-1.img", 5), [(0, 5, 0)])
    image.close()
    image.close()
    assert (image.nr_pages, image.nr_extents) == (5, 1)


def test_a_pages_file_too_short_for_its_pagemap(tmp_path: Path) -> None:
    path = pages_file(tmp_path / "pages-1.img", 4)
    with pytest.raises(UffdError) as caught:
        local_image(0x10000, path, [(0, 5, 0)])
    assert caught.value.errno == errno.ENODATA


@needs_poison
def test_a_pages_file_that_shrinks_means_no_zeros(tmp_path: Path) -> None:
    path = pages_file(tmp_path / "pages-1.img", 64)
    with Target.spawn() as target, Restore() as restore:
        addr, uffd = target.lazy(64)
        restore.pager.add_task(77, uffd, local_image(addr, path, [(0, 64, 0)]))
        assert target.call("read", addr, PAGE) == file_data(0, 1)
        os.truncate(path, 16 * PAGE)
        touch = target.start("write_to_pipe", addr + 40 * PAGE, PAGE)
        assert restore.until(lambda stats: stats.error != 0).error == errno.ENODATA
        assert not touch.done()
        restore.finish()
        restore.until(lambda stats: stats.phase == Phase.RUNNING)
        restore.pager.poison()
        assert restore.obeyed().pages_poisoned == 63
        assert touch.outcome() == (None, errno.EFAULT)
        assert target.call("read", addr, PAGE) == file_data(0, 1)
        restore.pager.end(reset=False)
        restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert [n.kind for n in restore.notices if n.kind != NoticeKind.NOT_LOCKED] == []
