"""What a restore needs from the checkpoint images, read before criu asks for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from criupy.errors import ImageError
from criupy.images import (
    LazyExtents,
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

    ``extents`` is its lazy memory, ``not_inherited`` a byte per extent that is
    1 where a forked child does not get it; both None for a zombie, which has
    no memory. ``pages`` is the file with the page contents, None when they are
    to come from a page server.
    """

    pid: int
    extents: LazyExtents | None
    not_inherited: bytes | None
    pages: Path | None


def load_tasks(images_dir: str | os.PathLike[str], *, local: bool) -> dict[int, DumpedTask]:
    """Read every task of the dump, by pid; ``local`` when the pages must be here, too.

    Raises ImageError for anything that is not as CRIU writes it.
    """
    read_inventory(images_dir)
    return {entry.pid: _load(images_dir, entry.pid, local=local) for entry in read_pstree(images_dir)}


def _load(images_dir: str | os.PathLike[str], pid: int, *, local: bool) -> DumpedTask:
    if is_zombie(images_dir, pid):
        return DumpedTask(pid, None, None, None)
    pagemap = read_pagemap(images_dir, pid)
    mm = read_mm(images_dir, pid)
    extents = lazy_extents(pagemap, mm)
    # Not DONTFORK: a child that lacks the VMA answers ENOENT by itself, and one
    # that has it, because MADV_DOFORK came after the restore, needs the bytes.
    by_vma = bytes(1 if vma.madv & MadvBits.WIPEONFORK else 0 for vma in mm.vmas)
    not_inherited = bytes(map(by_vma.__getitem__, extents.vma_indices))
    if not local:
        return DumpedTask(pid, extents, not_inherited, None)
    if not all(extents.present):
        raise ImageError(
            pagemap.path,
            None,
            "its lazy pages are not in the images: this is a lazy dump, "
            "whose source serves them (--page-server --address HOST --port PORT)",
        )
    return DumpedTask(pid, extents, not_inherited, check_pages(images_dir, pagemap))
