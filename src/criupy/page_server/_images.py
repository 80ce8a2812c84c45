"""What a page server gives out, read from the checkpoint images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from criupy.errors import ImageError
from criupy.images import (
    LazyEntries,
    check_pages,
    is_zombie,
    lazy_entries,
    read_inventory,
    read_pagemap,
    read_pstree,
)

__all__ = ["ServedTask", "load_tasks"]


@dataclass(frozen=True, slots=True)
class ServedTask:
    """The lazy pages of one dumped process, and the file that has them, as it was then."""

    pid: int
    entries: LazyEntries
    pages: Path
    seen: tuple[int, ...]

    def open(self) -> int:
        """Open the pages file; raise ImageError where that cannot be, or where it is another by now."""
        fd = _open_pages(self.pages)
        if _look(fd) != self.seen:
            os.close(fd)
            raise ImageError(self.pages, None, "it has changed since its pagemap was read")
        return fd


def load_tasks(images_dir: str | os.PathLike[str]) -> Iterator[ServedTask]:
    """Read the tasks of a dump one after the other, zombies left out.

    Raises ImageError for anything that is not as CRIU writes it, and for a
    lazy dump, whose pages are elsewhere.
    """
    read_inventory(images_dir)
    for entry in read_pstree(images_dir):
        if not is_zombie(images_dir, entry.pid):
            yield _load(images_dir, entry.pid)


def _load(images_dir: str | os.PathLike[str], pid: int) -> ServedTask:
    pagemap = read_pagemap(images_dir, pid)
    entries = lazy_entries(pagemap)
    if not all(entries.present):
        raise ImageError(
            pagemap.path,
            None,
            "its lazy pages are not in the images: this is a lazy dump, whose source serves them itself",
        )
    pages = check_pages(images_dir, pagemap)
    fd = _open_pages(pages)  # what is wrong with it is told now
    try:
        return ServedTask(pid, entries, pages, _look(fd))
    finally:
        os.close(fd)


def _look(fd: int) -> tuple[int, ...]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open_pages(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(path, None, f"expected a file that can be read: {error.strerror}") from error
