"""The tasks of a dump: inventory, process tree, task states, memory maps."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from criupy.errors import ImageError
from criupy.images import _framing, _schema_pb2
from criupy.images._framing import ImageFile, StrPath, open_image

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT

#: The kernel's PID_MAX_LIMIT on 64-bit machines (include/linux/threads.h).
PID_MAX: Final = 1 << 22

ADDRESS_END: Final = 1 << 64

_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the dump says of itself.

    ``run_id`` names the run of criu dump (from CRIU 4.1 on). A pre-dump
    (``is_pre_dump``; CRIU says so from 3.14 on) has memory only, no processes.
    """

    version: int
    run_id: str | None
    is_pre_dump: bool = False


@dataclass(frozen=True, slots=True)
class PstreeEntry:
    """One process of the tree, zombies included; ids are those of its own pid namespace.

    Of a zombie CRIU writes one thread id, which is whatever was in its memory.
    """

    pid: int
    ppid: int
    pgid: int
    sid: int
    threads: tuple[int, ...]


class TaskState(enum.IntEnum):
    """State of a task in its core image (CRIU: compel/include/uapi/task-state.h)."""

    ALIVE = 1
    DEAD = 2
    STOPPED = 3


class VmaStatus(enum.IntFlag, boundary=enum.KEEP):
    """What a VMA is (CRIU: criu/include/image.h); unknown bits are kept."""

    REGULAR = 1 << 0
    STACK = 1 << 1
    VSYSCALL = 1 << 2
    VDSO = 1 << 3
    HEAP = 1 << 5
    FILE_PRIVATE = 1 << 6
    FILE_SHARED = 1 << 7
    ANON_SHARED = 1 << 8
    ANON_PRIVATE = 1 << 9
    SYSVIPC = 1 << 10
    SOCKET = 1 << 11
    VVAR = 1 << 12
    AIORING = 1 << 13
    MEMFD = 1 << 14
    SHSTK = 1 << 15
    GUARD = 1 << 16
    UPROBES = 1 << 17
    EXT_PLUGIN = 1 << 27


class MadvBits(enum.IntFlag, boundary=enum.KEEP):
    """Advice in force on a VMA: bit N is madvise(2)'s advice number N; unknown bits are kept."""

    DONTFORK = 1 << 10
    WIPEONFORK = 1 << 18


@dataclass(frozen=True, slots=True)
class Vma:
    """A memory area ``[start, end)`` at dump time; prot and flags are mmap(2)'s."""

    start: int
    end: int
    prot: int
    flags: int
    status: VmaStatus
    madv: MadvBits


@dataclass(frozen=True, slots=True)
class Mm:
    """The memory areas of a task in address order, none overlapping another."""

    path: Path
    vmas: tuple[Vma, ...]


def check_pid(pid: int) -> None:
    """Refuse a pid that no task can have, with a ValueError."""
    if not 0 < pid <= PID_MAX:
        raise ValueError(f"pid {pid}: expected 1 to {PID_MAX}")


def parse_message(image: ImageFile, offset: int, data: bytes, message_type: type[_M]) -> _M:
    """Parse one record; ``offset`` is the record's."""
    try:
        return message_type.FromString(data)
    except DecodeError as error:
        raise image.error(
            offset, f"expected a {image.kind.name} message, this does not parse: the image is damaged"
        ) from error


def require(image: ImageFile, offset: int, message: Message, fields: Iterable[str]) -> None:
    """Insist on fields that CRIU always writes."""
    for field in fields:
        if not message.HasField(field):
            raise image.error(offset, f"expected the field {field} in every {image.kind.name} message")


def read_inventory(images_dir: StrPath) -> Inventory:
    """Read ``inventory.img``; images older than CRIU 2.0 are refused."""
    with open_image(images_dir, "inventory.img", _framing.INVENTORY) as image:
        offset, data = image.read_only_record()
        message = parse_message(image, offset, data, _schema_pb2.Inventory)
        require(image, offset, message, ("img_version",))
        # CRTOOLS_IMAGES_V1_1 in criu/include/magic.h; 1 had no common magic.
        if message.img_version != 2:
            raise image.error(
                offset, f"expected image version 2, found {message.img_version}: written by another CRIU era"
            )
        run_id = None
        if message.HasField("dump_criu_run_id"):
            run_id = message.dump_criu_run_id.decode("utf-8", "backslashreplace")
        return Inventory(message.img_version, run_id, message.HasField("pre_dump_mode"))


def read_pstree(images_dir: StrPath) -> tuple[PstreeEntry, ...]:
    """Read ``pstree.img``: every process of the dump, the root first, parents before their children."""
    entries: list[PstreeEntry] = []
    seen: set[int] = set()
    with open_image(images_dir, "pstree.img", _framing.PSTREE) as image:
        for offset, data in image.records():
            message = parse_message(image, offset, data, _schema_pb2.PstreeEntry)
            require(image, offset, message, ("pid", "ppid", "pgid", "sid"))
            if not 0 < message.pid <= PID_MAX:
                raise image.error(offset, f"expected a pid from 1 to {PID_MAX}, found {message.pid}")
            if message.pid in seen:
                raise image.error(offset, f"expected every pid once, {message.pid} is here again")
            if entries and message.ppid not in seen:
                # As criu restore has it. Whoever follows the parents cannot run in circles then.
                raise image.error(
                    offset,
                    f"expected the parent of process {message.pid} before it, "
                    f"{message.ppid} is none of the {len(entries)} processes before",
                )
            seen.add(message.pid)
            entries.append(
                PstreeEntry(message.pid, message.ppid, message.pgid, message.sid, tuple(message.threads))
            )
        if not entries:
            raise image.error(image.position, "expected at least one process, the image has none")
    return tuple(entries)


def pstree_offset(images_dir: StrPath, entry: PstreeEntry) -> int:
    """Find the byte offset of a process's entry by reading the image again; for error messages."""
    with open_image(images_dir, "pstree.img", _framing.PSTREE) as image:
        for offset, data in image.records():
            if parse_message(image, offset, data, _schema_pb2.PstreeEntry).pid == entry.pid:
                return offset
        raise image.error(image.position, "expected the entries read before: the image has changed")


def check_tid(images_dir: StrPath, entry: PstreeEntry, tid: int) -> None:
    """Refuse a thread id of a process that no thread can have."""
    if not 0 < tid <= PID_MAX:
        raise ImageError(
            Path(images_dir, "pstree.img"),
            pstree_offset(images_dir, entry),
            f"expected thread ids of 1 to {PID_MAX}, found {tid} in process {entry.pid}: it is damaged",
        )


@contextmanager
def open_core(images_dir: StrPath, tid: int) -> Iterator[tuple[ImageFile, int, _schema_pb2.Core]]:
    """Open ``core-TID.img`` as (the image, the offset of its message, the message)."""
    check_pid(tid)
    with open_image(images_dir, f"core-{tid}.img", _framing.CORE) as image:
        offset, data = image.read_only_record()
        yield image, offset, parse_message(image, offset, data, _schema_pb2.Core)


def task_state(image: ImageFile, offset: int, message: _schema_pb2.Core) -> TaskState:
    """Take the state of a process from its core."""
    if not message.HasField("tc") or not message.tc.HasField("task_state"):
        raise image.error(offset, "expected the core of a process with its task_state (a thread has none)")
    try:
        return TaskState(message.tc.task_state)
    except ValueError as error:
        raise image.error(
            offset, f"expected task_state alive, dead or stopped, found {message.tc.task_state}"
        ) from error


def read_task_state(images_dir: StrPath, pid: int) -> TaskState:
    """Read the state of a process from ``core-PID.img``."""
    with open_core(images_dir, pid) as core:
        return task_state(*core)


def is_zombie(images_dir: StrPath, pid: int) -> bool:
    """Tell whether a process was dead when it was dumped; such a one has no memory images."""
    return read_task_state(images_dir, pid) is TaskState.DEAD


def read_mm(images_dir: StrPath, pid: int) -> Mm:
    """Read the memory areas of a process from ``mm-PID.img``.

    From 4.2 on CRIU appends an entry per range of guard pages, lying over the
    real areas (criu/mem.c, collect_madv_guards); those are left out.
    """
    check_pid(pid)
    vmas: list[Vma] = []
    with open_image(images_dir, f"mm-{pid}.img", _framing.MM) as image:
        offset, data = image.read_only_record()
        message = parse_message(image, offset, data, _schema_pb2.Mm)
        end = 0
        for index, entry in enumerate(message.vmas):
            status = VmaStatus(entry.status)
            if status & VmaStatus.GUARD:
                continue
            where = f"VMA {index}"
            require(image, offset, entry, ("start", "end", "prot", "flags", "status"))
            if (entry.start | entry.end) % PAGE_SIZE:
                raise image.error(
                    offset, f"{where}: expected page-aligned borders, found {entry.start:#x}-{entry.end:#x}"
                )
            if entry.start >= entry.end:
                raise image.error(
                    offset, f"{where}: expected start below end, found {entry.start:#x}-{entry.end:#x}"
                )
            if entry.start < end:
                raise image.error(
                    offset,
                    f"{where}: expected ascending areas without overlap, "
                    f"{entry.start:#x} is below {end:#x}, the end of the one before",
                )
            end = entry.end
            vmas.append(Vma(entry.start, entry.end, entry.prot, entry.flags, status, MadvBits(entry.madv)))
        return Mm(image.path, tuple(vmas))
