"""What a post-copy restore takes from a dump: lazy extents and the frame size of its dumper."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, compress
from operator import mul
from pathlib import Path
from typing import Final, Literal, TypeAlias

from criupy.errors import ImageError
from criupy.images._framing import StrPath
from criupy.images._pagemap import (
    PageFlags,
    Pagemap,
    PagemapStyle,
    entry_offset,
    flag_mask,
    one_style,
    pagemap_path,
    read_pagemap_style,
)
from criupy.images._tasks import PAGE_SHIFT, Mm, TaskState, read_pstree, read_task_state

FrameSize: TypeAlias = Literal[24, 32]

#: Page index of an extent whose bytes are not in the pages image.
NO_PAGE_INDEX: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class LazyExtents:
    """Memory of one task to be filled lazily, as parallel arrays in address order.

    ``starts`` are dump-time addresses (array 'Q'), ``nr_pages`` counts ('Q').
    ``page_indices`` ('Q') is the index of the first page in the pages image;
    an extent that only the source has (a live lazy dump) is 0 in ``present``
    ('B') and has NO_PAGE_INDEX. ``vma_indices`` ('I') is the index into
    ``Mm.vmas`` of the one VMA that holds the extent.
    """

    path: Path
    starts: array[int]
    nr_pages: array[int]
    page_indices: array[int]
    vma_indices: array[int]
    present: array[int]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def total_pages(self) -> int:
        return sum(self.nr_pages)

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (start, nr_pages, page index, VMA index, present) per extent."""
        return zip(self.starts, self.nr_pages, self.page_indices, self.vma_indices, self.present, strict=True)


@dataclass(frozen=True, slots=True)
class LazyEntries:
    """The LAZY entries of a pagemap, as parallel arrays that mean what those of LazyExtents do."""

    starts: array[int]
    nr_pages: array[int]
    page_indices: array[int]
    present: array[int]


def lazy_entries(pagemap: Pagemap) -> LazyEntries:
    """Take the LAZY entries of a pagemap as they are."""
    lazy = flag_mask(pagemap, PageFlags.LAZY)
    has_bytes = flag_mask(pagemap, PageFlags.PRESENT)
    first_pages = accumulate(map(mul, pagemap.nr_pages, has_bytes), initial=0)
    starts = array("Q", compress(pagemap.starts, lazy))
    nr_pages = array("Q", compress(pagemap.nr_pages, lazy))
    present = array("B", compress(has_bytes, lazy))
    page_indices = array("Q", compress(first_pages, lazy))
    if not any(present):
        page_indices = array("Q", (NO_PAGE_INDEX,)) * len(present)
    elif not all(present):
        pairs = zip(page_indices, present, strict=True)
        page_indices = array("Q", (index if there else NO_PAGE_INDEX for index, there in pairs))
    return LazyEntries(starts, nr_pages, page_indices, present)


def lazy_extents(pagemap: Pagemap, mm: Mm) -> LazyExtents:
    """Take the LAZY entries of a pagemap, split at VMA borders.

    Raise an ImageError for an entry that leaves the VMAs: a page server asked
    for it might hang, and nothing could be installed there.
    """
    return split_entries(pagemap, mm, lazy_entries(pagemap))


def split_entries(pagemap: Pagemap, mm: Mm, entries: LazyEntries) -> LazyExtents:
    """Split entries, which are used up, at VMA borders; ``pagemap`` is where they are from."""
    starts, nr_pages, page_indices, present = (
        entries.starts,
        entries.nr_pages,
        entries.page_indices,
        entries.present,
    )
    out = LazyExtents(pagemap.path, array("Q"), array("Q"), array("Q"), array("I"), array("B"))

    # Entries and VMAs both ascend. Whole runs of entries go over as slices;
    # only one that crosses a border is cut, and its rest stays in its place
    # as the first entry for the VMA after.
    position = 0
    for vma_index, vma in enumerate(mm.vmas):
        if position == len(starts):
            break
        if starts[position] < vma.start:
            raise _outside(pagemap, mm, starts[position])
        stop = bisect_left(starts, vma.end, position)
        if stop == position:
            continue
        out.starts.extend(starts[position:stop])
        out.nr_pages.extend(nr_pages[position:stop])
        out.page_indices.extend(page_indices[position:stop])
        out.present.extend(present[position:stop])
        out.vma_indices.extend(array("I", (vma_index,)) * (stop - position))
        last = stop - 1
        inside = (vma.end - starts[last]) >> PAGE_SHIFT
        position = stop
        if nr_pages[last] > inside:
            out.nr_pages[-1] = inside
            starts[last] = vma.end
            nr_pages[last] -= inside
            if present[last]:
                page_indices[last] += inside
            position = last
    if position != len(starts):
        raise _outside(pagemap, mm, starts[position])
    return out


def _outside(pagemap: Pagemap, mm: Mm, address: int) -> ImageError:
    index = bisect_right(pagemap.starts, address) - 1
    return ImageError(
        pagemap.path,
        entry_offset(pagemap, index),
        f"expected lazy pages inside the VMAs of {mm.path.name}, {address:#x} is in none: "
        "the images are not of one dump",
    )


def frame_size(images_dir: StrPath) -> FrameSize | None:
    """Tell the page-server frame size in bytes of the CRIU that wrote a dump.

    CRIU 4.2 widened the page count both in the pagemap and in the frame, so
    the former tells the latter. That is right for a live source (``criu dump
    --lazy-pages``); ``criu page-server`` speaks its own version's frames
    whatever the images. None when no task has a pagemap entry.
    """
    style = one_style(_styles(images_dir))
    if style is None:
        return None
    return 32 if style is PagemapStyle.NEW else 24


def _styles(images_dir: StrPath) -> Iterator[tuple[Path, PagemapStyle | None]]:
    for task in read_pstree(images_dir):
        if read_task_state(images_dir, task.pid) is not TaskState.DEAD:
            yield pagemap_path(images_dir, task.pid), read_pagemap_style(images_dir, task.pid)
