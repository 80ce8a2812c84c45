"""CRIU's checkpoint images, read and checked.

Every function that reads takes the images directory (of statistics, CRIU's
work directory), reads what its name says and raises ImageError with path,
offset and expectation when a file is not what CRIU writes. ``read_dump`` reads
everything but the pages; only ``write_pagemap``, ``write_marker`` and ``write_lazy_parents`` write.
Works on any system; needs no CRIU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from criupy.images._lazy import (
    NO_PAGE_INDEX,
    FrameSize,
    LazyEntries,
    LazyExtents,
    frame_size,
    lazy_entries,
    lazy_extents,
)
from criupy.images._marker import MARKER, RelayMarker, read_marker, write_marker
from criupy.images._original import LAZY_PARENTS, original_images
from criupy.images._pagemap import (
    PageFlags,
    Pagemap,
    PagemapStyle,
    check_pages,
    pagemap_path,
    pages_path,
    present_pages,
    read_pagemap,
    read_pagemap_style,
    read_shared_pagemap,
    shared_pagemap_path,
)
from criupy.images._tasks import (
    PAGE_SIZE,
    PID_MAX,
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

if TYPE_CHECKING:
    from criupy.images._dump import Dump, parent_chain, read_dump
    from criupy.images._memory import (
        AreaTotals,
        PageTotals,
        SharedMemory,
        TaskMemory,
        VmaKind,
        area_totals,
        page_totals,
        read_shared_memory,
        read_task_memory,
        vma_kind,
    )
    from criupy.images._pagemap_writer import write_pagemap
    from criupy.images._parents import FILE_SHIFT, LazyParents, lazy_parents
    from criupy.images._parents_writer import write_lazy_parents
    from criupy.images._stats import (
        DUMP_STATS,
        RESTORE_STATS,
        DumpStats,
        RestoreStats,
        read_dump_stats,
        read_restore_stats,
    )
    from criupy.images._tree import Task, Thread, read_tasks

__all__ = [
    "DUMP_STATS",
    "FILE_SHIFT",
    "LAZY_PARENTS",
    "MARKER",
    "NO_PAGE_INDEX",
    "PAGE_SIZE",
    "PID_MAX",
    "RESTORE_STATS",
    "AreaTotals",
    "Dump",
    "DumpStats",
    "FrameSize",
    "Inventory",
    "LazyEntries",
    "LazyExtents",
    "LazyParents",
    "MadvBits",
    "Mm",
    "PageFlags",
    "PageTotals",
    "Pagemap",
    "PagemapStyle",
    "PstreeEntry",
    "RelayMarker",
    "RestoreStats",
    "SharedMemory",
    "Task",
    "TaskMemory",
    "TaskState",
    "Thread",
    "Vma",
    "VmaKind",
    "VmaStatus",
    "area_totals",
    "check_pages",
    "frame_size",
    "is_zombie",
    "lazy_entries",
    "lazy_extents",
    "lazy_parents",
    "original_images",
    "page_totals",
    "pagemap_path",
    "pages_path",
    "parent_chain",
    "present_pages",
    "read_dump",
    "read_dump_stats",
    "read_inventory",
    "read_marker",
    "read_mm",
    "read_pagemap",
    "read_pagemap_style",
    "read_pstree",
    "read_restore_stats",
    "read_shared_memory",
    "read_shared_pagemap",
    "read_task_memory",
    "read_task_state",
    "read_tasks",
    "shared_pagemap_path",
    "vma_kind",
    "write_lazy_parents",
    "write_marker",
    "write_pagemap",
]

# Whoever serves a dump needs none of these, and a restore waits until it is ready to.
_LATER: Final = {
    "Dump": "_dump",
    "parent_chain": "_dump",
    "read_dump": "_dump",
    "AreaTotals": "_memory",
    "PageTotals": "_memory",
    "SharedMemory": "_memory",
    "TaskMemory": "_memory",
    "VmaKind": "_memory",
    "area_totals": "_memory",
    "page_totals": "_memory",
    "read_shared_memory": "_memory",
    "read_task_memory": "_memory",
    "vma_kind": "_memory",
    "write_pagemap": "_pagemap_writer",
    "FILE_SHIFT": "_parents",
    "LazyParents": "_parents",
    "lazy_parents": "_parents",
    "write_lazy_parents": "_parents_writer",
    "DUMP_STATS": "_stats",
    "RESTORE_STATS": "_stats",
    "DumpStats": "_stats",
    "RestoreStats": "_stats",
    "read_dump_stats": "_stats",
    "read_restore_stats": "_stats",
    "Task": "_tree",
    "Thread": "_tree",
    "read_tasks": "_tree",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(importlib.import_module(f"criupy.images.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
