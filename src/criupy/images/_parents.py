"""What the parents of a dump hold, made lazy.

``criu restore --lazy-pages`` skips what the last dump calls lazy and reads the rest before
the process runs, with it all that the dump leaves to its parents (PE_PARENT). Most of that
could be lazy as well: a pre-dump marks what it takes of such memory LAZY and PRESENT
(criu/page-xfer.c, get_xfer_flags), and a lazy dump without a parent would have left it
out. So what is made here of a pagemap is what such a dump would have written, and the
daemon fills in the rest from the parents' images.

CRIU's conditions hold (criu/mem.c, generate_iovs; criu/include/vma.h): the memory is private,
anonymous, not locked and no huge page, which the last dump tells, and no stack pointer is in
the page. Whatever does not meet them, or is found in no parent, stays as it is, for
CRIU to read or to complain about.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Final, TypeAlias

from criupy.images._dump import parent_chain
from criupy.images._framing import StrPath
from criupy.images._lazy import NO_PAGE_INDEX, LazyEntries, LazyExtents, lazy_entries, split_entries
from criupy.images._pagemap import PageFlags, Pagemap, check_pages, flag_mask, pagemap_path, read_pagemap
from criupy.images._tasks import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Mm,
    PstreeEntry,
    Vma,
    VmaStatus,
    check_tid,
    open_core,
    read_mm,
)

#: In a page index, above the index in the file: which of the files.
FILE_SHIFT: Final = 48

# mmap(2) of the architectures whose registers are known here.
_MAP_PRIVATE: Final = 0x02
_MAP_ANONYMOUS: Final = 0x20
_MAP_LOCKED: Final = 0x2000
_MAP_HUGETLB: Final = 0x40000
_KERNELS: Final = VmaStatus.VDSO | VmaStatus.VVAR | VmaStatus.VSYSCALL

_PARENT: Final = PageFlags.PARENT.value
_LAZY: Final = PageFlags.LAZY.value
_PRESENT: Final = PageFlags.PRESENT.value

_Range: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _ParentPages:
    """Where the pages are that a pagemap leaves to its parents: parallel arrays in address order.

    ``starts`` and ``nr_pages`` are as in a Pagemap. ``files`` are pages images,
    ``file_indices`` ('H') tells which of them has the bytes and ``page_indices`` ('Q') where in
    it they begin; ``lazy`` ('B') is 1 where they may be filled lazily as far as the parent knows.
    """

    files: tuple[Path, ...]
    starts: array[int]
    nr_pages: array[int]
    file_indices: array[int]
    page_indices: array[int]
    lazy: array[int]

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (start, nr_pages, file index, page index, lazy) per run."""
        return zip(self.starts, self.nr_pages, self.file_indices, self.page_indices, self.lazy, strict=True)


@dataclass(frozen=True, slots=True)
class LazyParents:
    """The memory of a task, with what its parents hold made lazy.

    ``dumped`` is the pagemap of the dump, ``pagemap`` what to restore by; ``entries`` are its lazy pages.
    In the ``page_indices`` of those that are ``present`` the bits from FILE_SHIFT on are the index
    into ``files``; the others the source has.
    """

    dumped: Pagemap
    pagemap: Pagemap
    mm: Mm
    files: tuple[Path, ...]
    entries: LazyEntries

    def extents(self) -> LazyExtents:
        """Split the entries, which are used up, at VMA borders."""
        return split_entries(self.dumped, self.mm, self.entries)


def lazy_parents(images_dir: StrPath, task: PstreeEntry, *, local: bool = False) -> LazyParents:
    """Make the pages lazy that the parents of a dump hold of a task that is no zombie, where CRIU would.

    ``local`` tells that what the dump itself calls lazy has no other source than its own
    pages image, which is the last of the files then. Raise an ImageError for images that are damaged, and
    for those of an architecture whose registers are not known here.
    """
    pagemap = read_pagemap(images_dir, task.pid)
    mm = read_mm(images_dir, task.pid)
    held = _follow(images_dir, task.pid, pagemap)
    found: list[tuple[int, int, int, int]] = []
    if any(held.lazy):
        runs = [
            (start, start + (nr << PAGE_SHIFT)) for start, nr in zip(held.starts, held.nr_pages, strict=True)
        ]
        for i, _, low, high in _overlaps(runs, _lazy_areas(images_dir, task, mm)):
            if held.lazy[i]:
                page = held.page_indices[i] + ((low - runs[i][0]) >> PAGE_SHIFT)
                found.append((low, high, held.file_indices[i], page))
    # Those that hold nothing of this are left out.
    numbers = {index: number for number, index in enumerate(sorted({index for _, _, index, _ in found}))}
    files = tuple(held.files[index] for index in numbers)
    everything = [
        (low, (high - low) >> PAGE_SHIFT, numbers[index] << FILE_SHIFT | page, 1)
        for low, high, index, page in found
    ]
    own = lazy_entries(pagemap)
    for start, nr, index, is_here in zip(
        own.starts, own.nr_pages, own.page_indices, own.present, strict=True
    ):
        if local and is_here:
            everything.append((start, nr, len(files) << FILE_SHIFT | index, 1))
        else:
            everything.append((start, nr, NO_PAGE_INDEX, 0))
    if local and any(own.present):
        files += (check_pages(images_dir, pagemap),)
    everything.sort()
    starts, counts, indices, present = zip(*everything, strict=True) if everything else ((),) * 4
    entries = LazyEntries(array("Q", starts), array("Q", counts), array("Q", indices), array("B", present))
    return LazyParents(
        pagemap, _with_lazy(pagemap, [found_run[:2] for found_run in found]), mm, files, entries
    )


def _follow(images_dir: StrPath, pid: int, pagemap: Pagemap) -> _ParentPages:
    """Follow a task's PARENT entries through the chain of parents to where the bytes are.

    What no parent has is left out: CRIU refuses to restore such a dump.
    """
    wanted = [
        (start, start + (nr << PAGE_SHIFT))
        for start, nr, flags in zip(pagemap.starts, pagemap.nr_pages, pagemap.flags, strict=True)
        if flags == _PARENT
    ]
    files: list[Path] = []
    found: list[tuple[int, int, int, int, int]] = []
    for directory in parent_chain(images_dir) if wanted else ():
        if not wanted or not pagemap_path(directory, pid).exists():
            break
        parent = read_pagemap(directory, pid)
        ends = map(int.__add__, parent.starts, (nr << PAGE_SHIFT for nr in parent.nr_pages))
        entries = list(zip(parent.starts, ends, strict=True))
        first_pages = list(
            accumulate(map(mul, parent.nr_pages, flag_mask(parent, PageFlags.PRESENT)), initial=0)
        )
        further: list[_Range] = []
        nr_before = len(found)
        for _, j, low, high in _overlaps(wanted, entries):
            flags = parent.flags[j]
            if flags == _PARENT:
                further.append((low, high))
            elif flags & _PRESENT:
                index = first_pages[j] + ((low - entries[j][0]) >> PAGE_SHIFT)
                found.append((low, (high - low) >> PAGE_SHIFT, len(files), index, flags & _LAZY != 0))
        if len(found) > nr_before:
            files.append(check_pages(directory, parent))
        wanted = further
    found.sort()
    columns = zip(*found, strict=True) if found else ((),) * 5
    starts, nr_pages, file_indices, page_indices, lazy = columns
    return _ParentPages(
        tuple(files),
        array("Q", starts),
        array("Q", nr_pages),
        array("H", file_indices),
        array("Q", page_indices),
        array("B", lazy),
    )


def _overlaps(ones: Sequence[_Range], others: Sequence[_Range]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (index of one, index of the other, start, end) of what two ascending series have in common."""
    i = j = 0
    while i < len(ones) and j < len(others):
        one_start, one_end = ones[i]
        start, end = others[j]
        start = max(start, one_start)
        if one_end <= end:
            if start < one_end:
                yield i, j, start, one_end
            i += 1
        else:
            if start < end:
                yield i, j, start, end
            j += 1


def _with_lazy(pagemap: Pagemap, lazy: Sequence[_Range]) -> Pagemap:
    """Make these parts of PARENT entries lazy ones, each as long as it may be."""
    starts, nr_pages, all_flags = array("Q"), array("Q"), array("B")

    def put(start: int, end: int, flags: int) -> None:
        if start < end:
            starts.append(start)
            nr_pages.append((end - start) >> PAGE_SHIFT)
            all_flags.append(flags)

    position = 0
    for start, nr, flags in zip(pagemap.starts, pagemap.nr_pages, pagemap.flags, strict=True):
        end = start + (nr << PAGE_SHIFT)
        at = lazy_from = start
        while flags == _PARENT and position < len(lazy) and lazy[position][0] < end:
            low, high = lazy[position]
            if low > at:
                put(lazy_from, at, _LAZY)
                put(at, low, _PARENT)
                lazy_from = low
            at = high
            position += 1
        put(lazy_from, at, _LAZY)
        put(at, end, flags)
    return Pagemap(pagemap.path, pagemap.pages_id, starts, nr_pages, all_flags, pagemap.style)


def _lazy_areas(images_dir: StrPath, task: PstreeEntry, mm: Mm) -> list[_Range]:
    """Where CRIU lets pages be lazy: in such areas, but not where the stack pointers are."""
    tids = {task.pid, *task.threads}
    for tid in tids:
        check_tid(images_dir, task, tid)
    stacks = sorted({_stack_pointer(images_dir, tid) & -PAGE_SIZE for tid in tids})
    areas: list[_Range] = []
    for vma in filter(_can_be_lazy, mm.vmas):
        start = vma.start
        for page in stacks:
            if start <= page < vma.end:
                if start < page:
                    areas.append((start, page))
                start = page + PAGE_SIZE
        if start < vma.end:
            areas.append((start, vma.end))
    return areas


def _can_be_lazy(vma: Vma) -> bool:
    flags = vma.flags & (_MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_LOCKED | _MAP_HUGETLB)
    return flags == _MAP_PRIVATE | _MAP_ANONYMOUS and not vma.status & _KERNELS


def _stack_pointer(images_dir: StrPath, tid: int) -> int:
    with open_core(images_dir, tid) as (image, offset, message):
        for registers in (message.thread_info.gpregs, message.ti_aarch64.gpregs):
            if registers.HasField("sp"):
                return registers.sp
        raise image.error(
            offset,
            "expected registers of x86-64 or aarch64, others are not known: restore from the dump itself",
        )
