"""What a restore needs from the checkpoint images, read before criu asks for it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from criupy._uffd.image_linux import Image
from criupy.errors import ImageError
from criupy.images import (
    MadvBits,
    check_pages,
    is_zombie,
    lazy_extents,
    read_inventory,
    read_mm,
    read_pagemap,
    read_pstree,
)

__all__ = ["DumpedTask", "load_tasks"]


@dataclass(frozen=True, slots=True)
class DumpedTask:
    """One process of the dump.

    ``image`` is its lazy memory, in the native part and nowhere else: there can be
    millions of extents. It is None for a zombie, which has no memory. ``is_whole``
    tells whether the images have the contents of all its pages.
    """

    pid: int
    image: Image | None
    is_whole: bool = True


def load_tasks(images_dir: str | os.PathLike[str], *, local: bool) -> dict[int, DumpedTask]:
    """Read every task of the dump, by pid; ``local`` when the pages must be here, too.

    Raises ImageError for anything that is not as CRIU writes it.
    """
    read_inventory(images_dir)
    return {entry.pid: _load(images_dir, entry.pid, local=local) for entry in read_pstree(images_dir)}


def _load(images_dir: str | os.PathLike[str], pid: int, *, local: bool) -> DumpedTask:
    if is_zombie(images_dir, pid):
        return DumpedTask(pid, None)
    pagemap = read_pagemap(images_dir, pid)
    mm = read_mm(images_dir, pid)
    extents = lazy_extents(pagemap, mm)
    # Not DONTFORK: a child that lacks the VMA answers ENOENT by itself, and one
    # that has it, because MADV_DOFORK came after the restore, needs the bytes.
    by_vma = bytes(1 if vma.madv & MadvBits.WIPEONFORK else 0 for vma in mm.vmas)
    not_inherited = bytes(map(by_vma.__getitem__, extents.vma_indices)) if any(by_vma) else None
    is_whole = all(extents.present)
    if not local:
        return DumpedTask(pid, Image(pid, extents.starts, extents.nr_pages, None, not_inherited), is_whole)
    if not is_whole:
        raise ImageError(
            pagemap.path,
            None,
            "its lazy pages are not in the images: this is a lazy dump, "
            "whose source serves them (--page-server --address HOST --port PORT)",
        )
    pages = check_pages(images_dir, pagemap)
    image = Image(pid, extents.starts, extents.nr_pages, extents.page_indices, not_inherited)
    try:
        image.attach(pages)
    except OSError as error:
        raise ImageError(pages, None, f"expected a file that can be read: {error.strerror}") from error
    return DumpedTask(pid, image)
