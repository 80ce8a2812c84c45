"""Write checkpoint images for a workload, without CRIU and without criupy.images.

The writer is independent of our reader on purpose, so that one can test the other. Formats are CRIU's:
magics from criu/include/magic.h, fields from the schemas in images/.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from criupy.testing.spec import PAGE, Run, WorkloadSpec

__all__ = [
    "PE_LAZY",
    "PE_PARENT",
    "PE_PRESENT",
    "WrittenImages",
    "WrittenTask",
    "image",
    "pagemap_entry",
    "write_images",
]

IMG_COMMON_MAGIC = 0x5456_4319
INVENTORY_MAGIC = 0x5831_3116
PSTREE_MAGIC = 0x5027_3030
PAGEMAP_MAGIC = 0x5608_4025
CORE_MAGIC = 0x5505_3847
MM_MAGIC = 0x5749_2820

PE_PARENT = 1
PE_LAZY = 2
PE_PRESENT = 4

TASK_ALIVE = 1
TASK_DEAD = 2

# criu/include/image.h
VMA_REGULAR = 1 << 0
VMA_STACK = 1 << 1
VMA_ANON_PRIVATE = 1 << 9
VMA_GUARD = 1 << 16

_MAP_PRIVATE_ANONYMOUS = 0x22
_MAP_GROWSDOWN = 0x100
_PROT_READ_WRITE = 3
_MADV_DONTDUMP = 16

STACK_BASE = 0x7F_F000_0000
STACK_PAGES = 4
STACK_INDEX = 1 << 40
"""The stack's pages, which are never lazy, have indices from here on, so their bytes are nobody else's."""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """Encode a protobuf varint field."""
    return _varint(field << 3) + _varint(value)


def data(field: int, value: bytes) -> bytes:
    """Encode a protobuf length-delimited field: bytes, a string or a message."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def image(magic: int, messages: Iterable[bytes]) -> bytes:
    """Frame messages as an image file: both magics, then each message behind its 32-bit size."""
    # the inventory's own magic takes the place of the common one (criu/image.c)
    head = [magic] if magic == INVENTORY_MAGIC else [IMG_COMMON_MAGIC, magic]
    out = [struct.pack(f"<{len(head)}I", *head)]
    for message in messages:
        out += (struct.pack("<I", len(message)), message)
    return b"".join(out)


def pagemap_entry(start: int, nr_pages: int, flags: int, *, count: Literal["old", "new"]) -> bytes:
    """Encode a pagemap entry; from 4.2 on the count is in field 5 and the required field 2 is zero."""
    entry = number(1, start) + number(2, nr_pages if count == "old" else 0) + number(4, flags)
    return entry + number(5, nr_pages) if count == "new" else entry


def _vma(start: int, nr_pages: int, *, flags: int, status: int, madv: int = 0) -> bytes:
    entry = number(1, start) + number(2, start + nr_pages * PAGE) + number(3, 0) + number(4, 0)
    entry += number(5, _PROT_READ_WRITE) + number(6, flags) + number(7, status)
    entry += number(8, 1)  # fd: sint64 -1 in zigzag
    return entry + (number(9, madv) if madv else b"")


@dataclass(frozen=True, slots=True)
class WrittenTask:
    """The lazy pages of one task: one run per pagemap entry, in address order.

    `offsets` has the byte offset in `pages` of each run's first page.
    """

    pid: int
    task: int
    runs: tuple[Run, ...]
    offsets: tuple[int, ...]
    pages: Path


@dataclass(frozen=True, slots=True)
class WrittenImages:
    """Images on disk, and where the bytes of their lazy pages are."""

    directory: Path
    spec: WorkloadSpec
    style: Literal["lazy", "full"]
    count: Literal["old", "new"]
    tasks: tuple[WrittenTask, ...]

    @property
    def frame_size(self) -> Literal[24, 32]:
        """The page-server frame size of the dumper that writes such images."""
        return 32 if self.count == "new" else 24

    @property
    def pid_base(self) -> int:
        """The pid of the first task."""
        return self.tasks[0].pid


def _entries(runs: Iterable[Run], most: int) -> Iterator[Run]:
    """Join runs that touch, as a dumper does whether or not they are in one VMA, then cut long ones."""
    joined: list[Run] = []
    for run in runs:
        if joined and run.start == joined[-1].start + joined[-1].nr_pages * PAGE:
            last = joined.pop()
            joined.append(Run(last.start, last.first, last.nr_pages + run.nr_pages))
        else:
            joined.append(run)
    for run in joined:
        for n in range(0, run.nr_pages, most):
            yield Run(run.start + n * PAGE, run.first + n, min(most, run.nr_pages - n))


def _mm(spec: WorkloadSpec, *, guards: bool) -> bytes:
    required = b"".join(number(field, 0) for field in range(1, 13))
    status = VMA_REGULAR | VMA_ANON_PRIVATE
    vmas = [
        _vma(
            area.start,
            area.nr_pages,
            flags=_MAP_PRIVATE_ANONYMOUS,
            status=status,
            madv=area.dont_dump << _MADV_DONTDUMP,
        )
        for area in spec.task_areas()
    ]
    flags = _MAP_PRIVATE_ANONYMOUS | _MAP_GROWSDOWN
    vmas.append(_vma(STACK_BASE, STACK_PAGES, flags=flags, status=status | VMA_STACK))
    if guards:
        # criu 4.2 appends what MADV_GUARD_INSTALL covers behind the real ones, with no other field set
        area = spec.task_areas()[0]
        vmas.append(
            number(1, area.start)
            + number(2, area.start + PAGE)
            + b"".join(number(field, 0) for field in range(3, 7))
            + number(7, VMA_GUARD)
            + number(8, 0)
        )
    return required + b"".join(data(14, vma) for vma in vmas)


def _core(state: int) -> bytes:
    tc = number(1, state) + b"".join(number(field, 0) for field in range(2, 6)) + data(6, b"workload")
    return number(1, 1) + data(3, tc)


def _pstree_entry(pid: int, ppid: int, root: int) -> bytes:
    entry = number(1, pid) + number(2, ppid) + number(3, root) + number(4, root)
    return entry + number(5, pid)


def write_images(
    directory: Path,
    spec: WorkloadSpec,
    *,
    style: Literal["lazy", "full"] = "lazy",
    count: Literal["old", "new"] = "new",
    guards: bool | None = None,
    pid_base: int = 100,
    entry_pages: int = 1024,
    source_pages: Path | None = None,
) -> WrittenImages:
    """Write inventory, pstree, core, mm, pagemap and pages images of a workload.

    `style` is that of `criu dump --lazy-pages`, where pages-N.img lacks the lazy pages and they go to a file
    of their own (`source_pages`-N, by default beside the images), or of a full dump. `count` "old" is how
    dumpers before 4.2 write page counts. `guards` adds a guard VMA (by default when the count is new). Every
    task also has a stack whose pages are not lazy. Task k has pid `pid_base` + k. No pagemap entry is
    longer than `entry_pages`: a dumper fills pipes of 4 MiB and writes an entry for what is in one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    source_pages = source_pages or directory / "source-pages"
    guards = count == "new" if guards is None else guards
    runs = tuple(_entries(spec.runs(), entry_pages))
    inventory = number(1, 2) + number(2, 1) + number(4, 1)
    (directory / "inventory.img").write_bytes(image(INVENTORY_MAGIC, [inventory]))
    pstree = [
        _pstree_entry(pid_base + task, pid_base + (task - 1) // 2 if task else 0, pid_base)
        for task in range(spec.tree)
    ]
    zombie = pid_base + spec.tree
    if spec.zombie:
        pstree.append(_pstree_entry(zombie, pid_base, pid_base))
        (directory / f"core-{zombie}.img").write_bytes(image(CORE_MAGIC, [_core(TASK_DEAD)]))
    (directory / "pstree.img").write_bytes(image(PSTREE_MAGIC, pstree))
    tasks = []
    for task in range(spec.tree):
        pid, pages_id = pid_base + task, task + 1
        (directory / f"core-{pid}.img").write_bytes(image(CORE_MAGIC, [_core(TASK_ALIVE)]))
        (directory / f"mm-{pid}.img").write_bytes(image(MM_MAGIC, [_mm(spec, guards=guards)]))
        flags = PE_LAZY if style == "lazy" else PE_LAZY | PE_PRESENT
        entries = [pagemap_entry(run.start, run.nr_pages, flags, count=count) for run in runs]
        entries.append(pagemap_entry(STACK_BASE, STACK_PAGES, PE_PRESENT, count=count))
        (directory / f"pagemap-{pid}.img").write_bytes(image(PAGEMAP_MAGIC, [number(1, pages_id), *entries]))
        pages = directory / f"pages-{pages_id}.img"
        lazy = source_pages.with_name(f"{source_pages.name}-{pages_id}") if style == "lazy" else pages
        offsets = []
        with lazy.open("wb") as file:
            for run in runs:
                offsets.append(file.tell())
                file.writelines(spec.page(task, run.first + n) for n in range(run.nr_pages))
        with pages.open("ab" if style == "full" else "wb") as file:
            file.writelines(spec.page(task, STACK_INDEX + n) for n in range(STACK_PAGES))
        tasks.append(WrittenTask(pid, task, runs, tuple(offsets), lazy))
    return WrittenImages(directory, spec, style, count, tuple(tasks))
