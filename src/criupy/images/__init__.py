"""CRIU's checkpoint images, read and checked.

Every function takes the images directory, reads one file of it and raises
ImageError with path, offset and expectation when that file is not what CRIU
writes. Works on any system; needs no CRIU.
"""

from __future__ import annotations

from criupy.images._lazy import NO_PAGE_INDEX, FrameSize, LazyExtents, frame_size, lazy_extents
from criupy.images._pagemap import (
    PageFlags,
    Pagemap,
    PagemapStyle,
    check_pages,
    pages_path,
    present_pages,
    read_pagemap,
    read_pagemap_style,
)
from criupy.images._tasks import (
    PAGE_SIZE,
    Inventory,
    MadvBits,
    Mm,
    PstreeEntry,
    TaskState,
    Vma,
    VmaStatus,
    is_zombie,
    read_inventory,
    read_mm,
    read_pstree,
    read_task_state,
)

__all__ = [
    "NO_PAGE_INDEX",
    "PAGE_SIZE",
    "FrameSize",
    "Inventory",
    "LazyExtents",
    "MadvBits",
    "Mm",
    "PageFlags",
    "Pagemap",
    "PagemapStyle",
    "PstreeEntry",
    "TaskState",
    "Vma",
    "VmaStatus",
    "check_pages",
    "frame_size",
    "is_zombie",
    "lazy_extents",
    "pages_path",
    "present_pages",
    "read_inventory",
    "read_mm",
    "read_pagemap",
    "read_pagemap_style",
    "read_pstree",
    "read_task_state",
]
