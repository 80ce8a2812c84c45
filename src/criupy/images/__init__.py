"""CRIU's checkpoint images, read and checked.

Every function takes the images directory (of statistics, CRIU's work
directory), reads what its name says and raises ImageError with path, offset
and expectation when a file is not what CRIU writes. Works on any system; needs no CRIU.
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
from criupy.images._stats import (
    DUMP_STATS,
    RESTORE_STATS,
    DumpStats,
    RestoreStats,
    read_dump_stats,
    read_restore_stats,
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
from criupy.images._tree import Task, Thread, read_tasks

__all__ = [
    "DUMP_STATS",
    "NO_PAGE_INDEX",
    "PAGE_SIZE",
    "RESTORE_STATS",
    "DumpStats",
    "FrameSize",
    "Inventory",
    "LazyExtents",
    "MadvBits",
    "Mm",
    "PageFlags",
    "Pagemap",
    "PagemapStyle",
    "PstreeEntry",
    "RestoreStats",
    "Task",
    "TaskState",
    "Thread",
    "Vma",
    "VmaStatus",
    "check_pages",
    "frame_size",
    "is_zombie",
    "lazy_extents",
    "pages_path",
    "present_pages",
    "read_dump_stats",
    "read_inventory",
    "read_mm",
    "read_pagemap",
    "read_pagemap_style",
    "read_pstree",
    "read_restore_stats",
    "read_task_state",
    "read_tasks",
]
