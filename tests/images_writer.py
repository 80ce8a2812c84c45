"""A writer of checkpoint images that shares nothing with the reader under test."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMON = 0x54564319
SERVICE = 0x55105940
MAGICS = {
    "inventory": 0x58313116,
    "pstree": 0x50273030,
    "core": 0x55053847,
    "mm": 0x57492820,
    "pagemap": 0x56084025,
    "statistics": 0x57093306,
}


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def nested(field: int, body: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(body)) + body


def record(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def head(kind: str) -> bytes:
    first = SERVICE if kind == "statistics" else COMMON
    words = (MAGICS[kind],) if kind == "inventory" else (first, MAGICS[kind])
    return struct.pack(f"<{len(words)}I", *words)


def image(kind: str, bodies: Iterable[bytes]) -> bytes:
    return head(kind) + b"".join(map(record, bodies))


@dataclass(frozen=True)
class Run:
    """A pagemap entry; the fields that are None are not written."""

    vaddr: int | None
    nr_pages: int
    flags: int | None = 6
    in_parent: bool | None = None

    def body(self, style: str) -> bytes:
        out = b"" if self.vaddr is None else number(1, self.vaddr)
        out += number(2, self.nr_pages if style == "old" else 0)
        out += b"" if self.in_parent is None else number(3, self.in_parent)
        out += b"" if self.flags is None else number(4, self.flags)
        return out if style == "old" else out + number(5, self.nr_pages)


def pagemap(runs: Iterable[Run], style: str = "new", pages_id: int = 1) -> bytes:
    return image("pagemap", [number(1, pages_id), *(run.body(style) for run in runs)])


def vma_body(
    start: int, end: int, status: int = 0x201, madv: int = 0, prot: int = 3, flags: int = 0x22
) -> bytes:
    body = number(1, start) + number(2, end) + number(3, 0) + number(4, 0) + number(5, prot)
    # fd is a sint64: -1 is 1 in zigzag.
    body += number(6, flags) + number(7, status) + number(8, 1)
    return body + number(9, madv) if madv else body


def mm(vmas: Iterable[bytes]) -> bytes:
    """Write an mm image with the required fields before the VMAs, as CRIU does."""
    fixed = b"".join(number(field, 0x1000) for field in range(1, 13))
    auxv = b"".join(number(13, value) for value in range(4))
    return image("mm", [fixed + auxv + b"".join(nested(14, vma) for vma in vmas) + number(15, 1)])


def guard(start: int, end: int) -> bytes:
    """Write what CRIU 4.2 does for a range of guard pages."""
    return vma_body(start, end, status=1 << 16, prot=0, flags=0)


def pstree(tasks: Sequence[tuple[int, int]], threads: Sequence[int] = ()) -> bytes:
    """Write a process tree; every task has these threads beside its own."""
    bodies = [
        number(1, pid)
        + number(2, ppid)
        + number(3, pid)
        + number(4, pid)
        + b"".join(number(5, tid) for tid in (pid, *threads))
        for pid, ppid in tasks
    ]
    return image("pstree", bodies)


def registers(stack_pointer: int | None, machine: str = "x86") -> bytes:
    """Write what a core has of its thread's registers."""
    sp = {"x86": 20, "aarch64": 2}[machine]
    body = b"" if stack_pointer is None else number(sp, stack_pointer)
    return nested(2, nested(2, body)) if machine == "x86" else nested(2, b"") + nested(8, nested(3, body))


def core(
    state: int = 1, name: bytes | None = b"name", exit_code: int = 0, thread_info: bytes = nested(2, b"")
) -> bytes:
    task = number(1, state) + number(2, exit_code) + number(3, 0) + number(4, 0) + number(5, 0)
    task += b"" if name is None else nested(6, name)
    return image("core", [number(1, 1) + thread_info + nested(3, task)])


def thread_core(name: bytes | None = b"thread", thread_info: bytes = nested(2, b"")) -> bytes:
    thread = number(1, 0) + number(2, 0) + (b"" if name is None else nested(13, name))
    return image("core", [number(1, 1) + thread_info + nested(5, thread)])


def inventory(version: int = 2, run_id: bytes | None = b"run", *, pre_dump: bool = False) -> bytes:
    body = number(1, version) + number(2, 1) + (number(9, 1) if pre_dump else b"")
    return image("inventory", [body + (nested(13, run_id) if run_id else b"")])


def dump_stats(values: Mapping[int, int]) -> bytes:
    """Write ``stats-dump`` from values by field number."""
    return image("statistics", [nested(1, b"".join(number(*item) for item in values.items()))])


def restore_stats(values: Mapping[int, int]) -> bytes:
    """Write ``stats-restore`` from values by field number."""
    return image("statistics", [nested(2, b"".join(number(*item) for item in values.items()))])


def write_dump(
    directory: Path, pid: int, runs: Sequence[Run], vmas: Iterable[bytes], style: str = "new"
) -> None:
    """Write a dump of one task, with a pages image as long as the runs need."""
    (directory / "inventory.img").write_bytes(inventory())
    (directory / "pstree.img").write_bytes(pstree([(pid, 0)]))
    (directory / f"core-{pid}.img").write_bytes(core())
    (directory / f"mm-{pid}.img").write_bytes(mm(vmas))
    (directory / f"pagemap-{pid}.img").write_bytes(pagemap(runs, style))
    pages = sum(run.nr_pages for run in runs if run.flags is not None and run.flags & 4)
    with (directory / "pages-1.img").open("wb") as file:
        file.truncate(pages * 4096)
