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

__all__ = ["ServedTask", "load_tasks", "open_pages"]


@dataclass(frozen=True, slots=True)
class ServedTask:
    """The lazy pages of one dumped process, and the file that has them."""

    pid: int
    entries: LazyEntries
    pages: Path


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
    os.close(open_pages(pages))  # what is wrong with it is told now
    return ServedTask(pid, entries, pages)


def open_pages(path: Path) -> int:
    """Open a pages file; raise ImageError where that cannot be."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(path, None, f"expected a file that can be read: {error.strerror}") from error
