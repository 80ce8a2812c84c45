"""How much memory a dump has, and of what kind: areas, pages, shared memory."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from types import MappingProxyType
from typing import Final

from criupy.errors import ImageError
from criupy.images._framing import StrPath, regular_file_size
from criupy.images._pagemap import (
    PageFlags,
    Pagemap,
    PagemapStyle,
    check_pages,
    pagemap_path,
    pages_path,
    read_pagemap,
    read_shared_pagemap,
)
from criupy.images._tasks import Mm, Vma, VmaStatus, read_mm

_SHARED_NAME: Final = re.compile(r"pagemap-shmem-(0|[1-9][0-9]{0,19})\.img")

# CRIU has a status for stacks but does not set it (4.2); the main stack can be known by its
# mmap(2) flag, which has this value on all of CRIU's architectures but MIPS.
_MAP_GROWSDOWN: Final = 0x100


class VmaKind(enum.Enum):
    """What an area is for, each area being of one kind."""

    ANONYMOUS = "anonymous"
    HEAP = "heap"
    #: The main thread's; those of other threads are anonymous memory like any.
    STACK = "stack"
    SHADOW_STACK = "shadow stack"
    AIO_RING = "AIO ring"
    FILE_PRIVATE = "private file"
    FILE_SHARED = "shared file"
    #: A memfd. CRIU dumps anonymous shared memory as one, too, where it can.
    MEMFD = "memfd"
    ANONYMOUS_SHARED = "shared anonymous"
    SYSV = "System V"
    SOCKET = "socket"
    #: A device's, dumped by a plugin of CRIU's.
    DEVICE = "device"
    #: What the kernel maps by itself: vdso, vvar, vsyscall, uprobes.
    KERNEL = "kernel"
    OTHER = "other"


# The first that fits counts: a heap is anonymous as well, System V memory shared.
_KINDS: Final = (
    (VmaStatus.VDSO | VmaStatus.VVAR | VmaStatus.VSYSCALL | VmaStatus.UPROBES, VmaKind.KERNEL),
    (VmaStatus.STACK, VmaKind.STACK),
    (VmaStatus.SHSTK, VmaKind.SHADOW_STACK),
    (VmaStatus.AIORING, VmaKind.AIO_RING),
    (VmaStatus.EXT_PLUGIN, VmaKind.DEVICE),
    (VmaStatus.SYSVIPC, VmaKind.SYSV),
    (VmaStatus.MEMFD, VmaKind.MEMFD),
    (VmaStatus.SOCKET, VmaKind.SOCKET),
    (VmaStatus.HEAP, VmaKind.HEAP),
    (VmaStatus.FILE_PRIVATE, VmaKind.FILE_PRIVATE),
    (VmaStatus.FILE_SHARED, VmaKind.FILE_SHARED),
    (VmaStatus.ANON_SHARED, VmaKind.ANONYMOUS_SHARED),
    (VmaStatus.ANON_PRIVATE, VmaKind.ANONYMOUS),
)


def vma_kind(vma: Vma) -> VmaKind:
    """Tell what an area is for."""
    for status, kind in _KINDS:
        if vma.status & status:
            if kind is VmaKind.ANONYMOUS and vma.flags & _MAP_GROWSDOWN:
                return VmaKind.STACK
            return kind
    return VmaKind.OTHER


@dataclass(frozen=True, slots=True)
class AreaTotals:
    """Memory areas of one kind: how many, and their length in bytes, mapped pages or not."""

    count: int
    length: int


@dataclass(frozen=True, slots=True)
class PageTotals:
    """A pagemap, added up. Each page is counted in one of ``present``, ``at_source`` and ``in_parent``.

    ``present`` pages have their bytes in this dump. ``at_source`` are those
    of a lazy dump that only its source has. ``in_parent`` have theirs in the
    images that the dump is based on. ``lazy``, of the first two, are those
    that may be filled after the restore. ``file_length`` is that of
    ``pages-{pages_id}.img`` in bytes, 0 where there is none to be had.
    """

    entries: int
    present: int
    at_source: int
    in_parent: int
    lazy: int
    pages_id: int
    file_length: int
    style: PagemapStyle | None

    @property
    def total(self) -> int:
        """All pages that the pagemap knows of."""
        return self.present + self.at_source + self.in_parent


@dataclass(frozen=True, slots=True)
class TaskMemory:
    """The memory of a task; ``pages`` is None when there is no pagemap in this directory.

    That is so where a page server took the memory: its directory has the pagemap.
    """

    areas: Mapping[VmaKind, AreaTotals]
    pages: PageTotals | None


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """A piece of shared memory, named by the ``shmid`` that CRIU gave it (an inode or System V number)."""

    shmid: int
    pages: PageTotals


def area_totals(mm: Mm) -> Mapping[VmaKind, AreaTotals]:
    """Add up the areas of a task by kind, in the order of VmaKind, without kinds that it has none of."""
    found: dict[VmaKind, AreaTotals] = {}
    for vma in mm.vmas:
        kind = vma_kind(vma)
        before = found.get(kind, AreaTotals(0, 0))
        found[kind] = AreaTotals(before.count + 1, before.length + vma.end - vma.start)
    return MappingProxyType({kind: found[kind] for kind in VmaKind if kind in found})


def page_totals(images_dir: StrPath, pagemap: Pagemap) -> PageTotals:
    """Add up a pagemap, and check that its pages image is as long as it says."""
    flags = pagemap.flags.tobytes()
    by_flags = {
        value: sum(compress(pagemap.nr_pages, flags.translate(bytes(byte == value for byte in range(256)))))
        for value in set(flags)
    }

    def count(flag: PageFlags) -> int:
        return sum(pages for value, pages in by_flags.items() if value & flag)

    present, lazy, in_parent = map(count, (PageFlags.PRESENT, PageFlags.LAZY, PageFlags.PARENT))
    total = sum(by_flags.values())
    # CRIU makes a pages image with its first page.
    file_length = 0
    if present or pages_path(images_dir, pagemap.pages_id).exists():
        file_length = regular_file_size(check_pages(images_dir, pagemap), "pages")
    return PageTotals(
        len(pagemap),
        present,
        total - present - in_parent,
        in_parent,
        lazy,
        pagemap.pages_id,
        file_length,
        pagemap.style,
    )


def read_task_memory(images_dir: StrPath, pid: int) -> TaskMemory:
    """Add up the memory of a task that is no zombie, from its mm, pagemap and pages images."""
    areas = area_totals(read_mm(images_dir, pid))
    # A broken link is an image that somebody meant to be there: for read_pagemap to refuse.
    if not os.path.lexists(pagemap_path(images_dir, pid)):
        return TaskMemory(areas, None)
    return TaskMemory(areas, page_totals(images_dir, read_pagemap(images_dir, pid)))


def read_shared_memory(images_dir: StrPath) -> tuple[SharedMemory, ...]:
    """Add up every ``pagemap-shmem-SHMID.img`` there is, in the order of the numbers."""
    try:
        names = [path.name for path in Path(images_dir).iterdir()]
    except OSError as error:
        raise ImageError(images_dir, None, f"expected a directory of images: {error.strerror}") from error
    shmids = sorted(int(match[1]) for name in names if (match := _SHARED_NAME.fullmatch(name)))
    return tuple(
        SharedMemory(shmid, page_totals(images_dir, read_shared_pagemap(images_dir, shmid)))
        for shmid in shmids
    )
