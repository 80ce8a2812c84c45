"""What a restore needs from the checkpoint images, read before criu asks for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from criupy._uffd.image_linux import Image
from criupy.errors import ImageError
from criupy.images import (
    LazyExtents,
    MadvBits,
    Mm,
    PstreeEntry,
    check_pages,
    is_zombie,
    lazy_entries,
    lazy_extents,
    original_images,
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
    tells whether the dump's own images have the contents of all its lazy pages.
    """

    pid: int
    image: Image | None
    is_whole: bool = True


def load_tasks(images_dir: str | os.PathLike[str], *, local: bool) -> dict[int, DumpedTask]:
    """Read every task of the dump, by pid; ``local`` when the pages must be here, too.

    In a directory that ``write_lazy_parents`` made, what parents hold is here in any
    case. Raises ImageError for anything that is not as CRIU, or that, writes it.
    """
    read_inventory(images_dir)
    original = original_images(images_dir)
    found = {}
    for entry in read_pstree(images_dir):
        if is_zombie(images_dir, entry.pid):
            found[entry.pid] = DumpedTask(entry.pid, None)
        elif original == Path(images_dir):
            found[entry.pid] = _load(images_dir, entry.pid, local=local)
        else:
            found[entry.pid] = _load_with_parents(images_dir, original, entry, local=local)
    return found


def _load(images_dir: str | os.PathLike[str], pid: int, *, local: bool) -> DumpedTask:
    pagemap = read_pagemap(images_dir, pid)
    mm = read_mm(images_dir, pid)
    extents = lazy_extents(pagemap, mm)
    not_inherited = _not_inherited(mm, extents)
    is_whole = all(extents.present)
    if not local:
        return DumpedTask(pid, Image(pid, extents.starts, extents.nr_pages, None, not_inherited), is_whole)
    if not is_whole:
        raise _lazy_dump(pagemap.path)
    pages = check_pages(images_dir, pagemap)
    image = Image(pid, extents.starts, extents.nr_pages, extents.page_indices, not_inherited)
    _attach(image, pages)
    return DumpedTask(pid, image)


def _load_with_parents(
    images_dir: str | os.PathLike[str], original: Path, entry: PstreeEntry, *, local: bool
) -> DumpedTask:
    from criupy.images import lazy_parents  # seldom needed

    memory = lazy_parents(original, entry, local=local)
    made, expected = read_pagemap(images_dir, entry.pid), memory.pagemap
    # CRIU goes by the one, the pager by the other.
    if (made.starts, made.nr_pages, made.flags) != (expected.starts, expected.nr_pages, expected.flags):
        raise ImageError(
            made.path,
            None,
            f"expected what criupy lazy-parents makes of {original}: one of the two has changed, "
            "make the directory anew",
        )
    is_whole = all(lazy_entries(memory.dumped).present)
    if local and not is_whole:
        raise _lazy_dump(memory.dumped.path)
    extents = memory.extents()
    not_inherited = _not_inherited(memory.mm, extents)
    image = Image(entry.pid, extents.starts, extents.nr_pages, extents.page_indices, not_inherited)
    for pages in memory.files:
        _attach(image, pages)
    return DumpedTask(entry.pid, image, is_whole)


def _not_inherited(mm: Mm, extents: LazyExtents) -> bytes | None:
    # Not DONTFORK: a child that lacks the VMA answers ENOENT by itself, and one
    # that has it, because MADV_DOFORK came after the restore, needs the bytes.
    by_vma = bytes(1 if vma.madv & MadvBits.WIPEONFORK else 0 for vma in mm.vmas)
    return bytes(map(by_vma.__getitem__, extents.vma_indices)) if any(by_vma) else None


def _lazy_dump(path: Path) -> ImageError:
    return ImageError(
        path,
        None,
        "its lazy pages are not in the images: this is a lazy dump, "
        "whose source serves them (--page-server --address HOST --port PORT)",
    )


def _attach(image: Image, pages: Path) -> None:
    try:
        image.attach(pages)
    except OSError as error:
        raise ImageError(pages, None, f"expected a file that can be read: {error.strerror}") from error
