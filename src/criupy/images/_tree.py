"""The process tree with its names, states and threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from criupy.images import _schema_pb2
from criupy.images._framing import ImageFile, StrPath
from criupy.images._tasks import (
    PstreeEntry,
    TaskState,
    check_tid,
    open_core,
    read_pstree,
    task_state,
)

#: Bytes of a name without its NUL (the kernel's and CRIU's TASK_COMM_LEN is 16).
NAME_MAX: Final = 15


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread; ``name`` is its comm, None when the dumper wrote none (CRIU before 3.11)."""

    tid: int
    name: str | None


@dataclass(frozen=True, slots=True)
class Task:
    """A process of the dump; ids are those of its own pid namespace.

    ``name`` is its comm as in ``/proc/PID/comm``; bytes that are not UTF-8 are
    surrogates, as ``os.fsdecode`` makes them. ``threads`` starts with the main
    thread and is empty for a zombie, which alone has an ``exit_status``: as in
    ``subprocess``, negative when a signal killed it. ``children`` are pids in
    the order of the dump.
    """

    pid: int
    ppid: int
    pgid: int
    sid: int
    name: str
    state: TaskState
    exit_status: int | None
    threads: tuple[Thread, ...]
    children: tuple[int, ...]

    @property
    def is_zombie(self) -> bool:
        """Whether it was dead when it was dumped; such a one has no memory images."""
        return self.state is TaskState.DEAD


def read_tasks(images_dir: StrPath) -> tuple[Task, ...]:
    """Read ``pstree.img`` and the cores: every process, the root first, parents before their children."""
    entries = read_pstree(images_dir)
    children: dict[int, list[int]] = {entry.pid: [] for entry in entries}
    for entry in entries[1:]:
        children[entry.ppid].append(entry.pid)
    return tuple(_read_task(images_dir, entry, children) for entry in entries)


def _read_task(images_dir: StrPath, entry: PstreeEntry, children: Mapping[int, list[int]]) -> Task:
    with open_core(images_dir, entry.pid) as (image, offset, message):
        state = task_state(image, offset, message)
        name = _name(image, offset, message.tc)
        if name is None:
            raise image.error(offset, "expected the core of a process with its name (comm)")
        exit_status = None
        if state is TaskState.DEAD:
            # A wait status, as in field 52 of /proc/PID/stat.
            number = message.tc.exit_code & 0x7F
            exit_status = -number if number else message.tc.exit_code >> 8 & 0xFF
    threads: list[Thread] = []
    if state is not TaskState.DEAD:
        threads = [Thread(entry.pid, name)]
        threads += [_read_thread(images_dir, entry, tid) for tid in entry.threads if tid != entry.pid]
    return Task(
        entry.pid,
        entry.ppid,
        entry.pgid,
        entry.sid,
        name,
        state,
        exit_status,
        tuple(threads),
        tuple(children[entry.pid]),
    )


def _read_thread(images_dir: StrPath, entry: PstreeEntry, tid: int) -> Thread:
    check_tid(images_dir, entry, tid)
    with open_core(images_dir, tid) as (image, offset, message):
        if not message.HasField("thread_core"):
            raise image.error(offset, "expected the core of a thread with its thread_core")
        return Thread(tid, _name(image, offset, message.thread_core))


def _name(
    image: ImageFile, offset: int, message: _schema_pb2.TaskCore | _schema_pb2.ThreadCore
) -> str | None:
    if not message.HasField("comm"):
        return None
    if len(message.comm) > NAME_MAX:
        raise image.error(
            offset, f"expected a name (comm) of at most {NAME_MAX} bytes, found {len(message.comm)}"
        )
    return message.comm.decode("utf-8", "surrogateescape")
