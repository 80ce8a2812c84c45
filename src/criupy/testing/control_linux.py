"""The control file through which a workload is told what to do.

One file, mapped by the workload and by us. The structures are those of `workload.h`.
"""

from __future__ import annotations

import enum
import mmap
import os
import stat
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import trio

from criupy.errors import CriupyError

__all__ = [
    "Command",
    "Control",
    "Gate",
    "Order",
    "RestorerState",
    "Result",
    "Touch",
    "Worker",
    "WorkloadError",
]

CONTROL_MAGIC: Final = 0x5957_5243
CONTROL_VERSION: Final = 1
ERROR_SIZE: Final = 160
HISTOGRAM_SIZE: Final = 256
STALL_NS: Final = 2000
CONTROL_SIZE: Final = 256
SLOT_SIZE: Final = 2440
RESULT_SIZE: Final = 128

CONTROL_OFFSETS: Final = {
    "magic": 0,
    "version": 4,
    "nr_tasks": 8,
    "nr_threads": 12,
    "nr_children": 16,
    "nr_samples": 20,
    "slots_offset": 24,
    "slot_size": 32,
    "samples_offset": 40,
    "file_size": 48,
    "uffd_features": 56,
    "user_mode_only": 64,
    "nr_ready": 68,
    "nr_announced": 72,
    "nr_registered": 76,
    "gate": 80,
    "restorer_state": 84,
    "failed": 88,
    "error": 92,
}
SLOT_OFFSETS: Final = {
    "issued": 0,
    "finished": 4,
    "stop": 8,
    "command": 12,
    "arg": 16,
    "status": 80,
    "pid": 84,
    "heartbeat": 88,
    "result": 96,
    "nr_samples": 224,
    "histogram": 232,
    "error": 2280,
}
_POLL_SHORT = 0.0005
_POLL_LONG = 0.005


class WorkloadError(CriupyError):
    """A workload failed, refused a command, or ended while it was needed."""


class Command(enum.IntEnum):
    """What a worker can do, as numbered in workload.h."""

    NONE = 0
    VERIFY = 1
    TOUCH = 2
    WRITE = 3
    READ_BY_SYSCALL = 4
    RESIDENT = 5
    DISCARD = 6
    MOVE = 7
    UNMAP = 8
    PROTECT = 9
    FORK = 10
    FORK_MANY = 11
    WAIT = 12
    REAP_ZOMBIE = 13
    EXIT = 14


class Order(enum.IntEnum):
    """The order in which pages are touched.

    HOT repeats random pages: nine of ten touches are in the tenth that begins in the middle of the range.
    """

    SEQUENTIAL = 0
    RANDOM = 1
    HOT = 2


class Touch(enum.IntFlag):
    """How pages are touched.

    SAMPLE_FAULTS keeps samples only of touches that lasted longer than STALL_NS and met a page fault.
    """

    WHOLE_PAGE = 1
    EVERY_PAGE = 2
    UNTIL_STOPPED = 4
    SAMPLE_FAULTS = 8


class Gate(enum.IntEnum):
    """What the stand-in restorer does once everything is registered."""

    WAIT = 0
    FINISH = 1
    ABANDON = 2


class RestorerState(enum.IntEnum):
    """How far the stand-in restorer is."""

    NONE = 0
    CONNECTED = 1
    REGISTERED = 2
    FINISHED = 3
    VETOED = 4
    ABANDONED = 5


@dataclass(frozen=True, slots=True)
class Result:
    """What a command found: counts in pages, times in ns of CLOCK_MONOTONIC.

    `wrong` pages hold neither what they should nor zeros; `zero` pages are all zero where data should
    be; `poisoned` raised SIGBUS, `unmapped` SIGSEGV; `refused` gave EFAULT to a system call.
    """

    checked: int
    wrong: int
    zero: int
    poisoned: int
    unmapped: int
    refused: int
    first_bad: int
    first_bad_address: int
    value: int
    touches: int
    total_ns: int
    stalls: int
    stall_ns: int
    max_ns: int
    started_ns: int
    ended_ns: int

    @property
    def is_good(self) -> bool:
        """Whether every page looked at held exactly what it should."""
        return not (self.wrong or self.zero or self.poisoned or self.unmapped or self.refused)

    @property
    def seconds(self) -> float:
        """How long the command took."""
        return (self.ended_ns - self.started_ns) / 1e9


_RESULT = struct.Struct(f"@{len(fields(Result))}Q")


def bucket_start(bucket: int) -> int:
    """Return the lowest latency in ns that a bucket of a histogram counts."""
    octave, quarter = divmod(bucket, 4)
    return bucket if bucket < 8 else (4 + quarter) << (octave - 2)


class Control:
    """The mapped control file of one workload.

    `gone` is asked while waiting: it returns why a process can never answer again, or None.
    """

    def __init__(self, path: Path, gone: Callable[[int], str | None] | None = None) -> None:
        self.path = path
        self.gone = gone
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        if self.get("magic") != CONTROL_MAGIC or self.get("version") != CONTROL_VERSION:
            self._map.close()
            raise WorkloadError(f"{path}: not a control file of this version of criupy-workload")

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def copy(self, path: Path, gone: Callable[[int], str | None] | None = None) -> Control:
        """Copy the file, to be put over the original for a process restored elsewhere on this machine.

        Source and restored process then obey, and answer in, different files.
        """
        # CRIU compares the mode of a mapped file with that at the dump
        mode = stat.S_IMODE(self.path.stat().st_mode)
        path.touch()
        path.chmod(mode)
        path.write_bytes(self._map)
        return Control(path, gone)

    def get(self, name: str) -> int:
        """Read a number of the header."""
        return self.load(CONTROL_OFFSETS[name], wide=name in _WIDE)

    @property
    def error(self) -> str:
        """Why the workload could not start."""
        return self.text(CONTROL_OFFSETS["error"])

    @property
    def gate(self) -> Gate:
        """What the stand-in restorer is to do."""
        return Gate(self.get("gate"))

    @gate.setter
    def gate(self, value: Gate) -> None:
        self.store(CONTROL_OFFSETS["gate"], value)

    @property
    def restorer_state(self) -> RestorerState:
        """How far the stand-in restorer is."""
        return RestorerState(self.get("restorer_state"))

    def worker(self, task: int = 0, thread: int = 0) -> Worker:
        """Return the worker that is a thread of a task; thread 0 is the main one."""
        if not (0 <= task < self.get("nr_tasks") and 0 <= thread < self.get("nr_threads")):
            raise ValueError(f"no thread {thread} of task {task}")
        return Worker(self, task * self.get("nr_threads") + thread)

    def child(self, index: int = 0) -> Worker:
        """Return the worker that a forked child becomes."""
        if not 0 <= index < self.get("nr_children"):
            raise ValueError(f"no child {index}: the workload was started with {self.get('nr_children')}")
        return Worker(self, self.get("nr_tasks") * self.get("nr_threads") + index)

    def load(self, offset: int, *, wide: bool = False) -> int:
        """Read the number of 4 or, when `wide`, 8 bytes at an offset."""
        # native mode ("@") copies a whole word at once; "=" would go byte by byte and could be seen half done
        value: int
        (value,) = struct.unpack_from("@Q" if wide else "@I", self._map, offset)
        return value

    def store(self, offset: int, value: int) -> None:
        """Write a number of 4 bytes."""
        struct.pack_into("@I", self._map, offset, value)

    def text(self, offset: int) -> str:
        """Read an error text."""
        return self.read(offset, ERROR_SIZE).split(b"\0", 1)[0].decode(errors="replace")

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes."""
        return self._map[offset : offset + length]

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes, in no particular order."""
        self._map[offset : offset + len(data)] = data


_WIDE = frozenset({"slots_offset", "slot_size", "samples_offset", "file_size", "uffd_features"})


class Worker:
    """One worker of a workload: give it a command, wait, read what it found.

    Pages are named by their original index, which stays the same when memory moves; a range of 0 pages means
    all of them.
    """

    def __init__(self, control: Control, index: int) -> None:
        self._control = control
        self._index = index
        self._base = control.get("slots_offset") + index * control.get("slot_size")

    def _get(self, name: str) -> int:
        return self._control.load(self._base + SLOT_OFFSETS[name])

    @property
    def slot(self) -> int:
        """The number by which `fork` names a child."""
        return self._index

    @property
    def pid(self) -> int:
        """The process that last took this slot, as it sees itself."""
        return self._get("pid")

    @property
    def heartbeat(self) -> int:
        """A count that grows while the process runs."""
        return self._control.load(self._base + SLOT_OFFSETS["heartbeat"], wide=True)

    @property
    def is_idle(self) -> bool:
        """Whether it has done all it was told."""
        return self._get("issued") == self._get("finished")

    @property
    def result(self) -> Result:
        """What the last command found, or the current one so far."""
        return Result(*_RESULT.unpack(self._control.read(self._base + SLOT_OFFSETS["result"], RESULT_SIZE)))

    @property
    def samples(self) -> array[int]:
        """Nanoseconds of the touches of the last `touch`, as far as there was room for them."""
        room = self._control.get("nr_samples")
        start = self._control.get("samples_offset") + self._index * room * 4
        count = self._control.load(self._base + SLOT_OFFSETS["nr_samples"], wide=True)
        found = array("I")
        found.frombytes(self._control.read(start, count * 4))
        return found

    @property
    def histogram(self) -> array[int]:
        """Counts of touches in four buckets an octave; `bucket_start` says where each begins."""
        start = self._base + SLOT_OFFSETS["histogram"]
        found = array("Q")
        found.frombytes(self._control.read(start, HISTOGRAM_SIZE * 8))
        return found

    def issue(self, command: Command, *arguments: int) -> None:
        """Give a command without waiting; a frozen process obeys it when it runs again."""
        if not self.is_idle:
            raise WorkloadError(f"worker {self._index} is still busy with its last command")
        control, base = self._control, self._base
        padded = [*arguments, *(0 for _ in range(8 - len(arguments)))]
        control.write(base + SLOT_OFFSETS["arg"], struct.pack("@8Q", *padded))
        control.store(base + SLOT_OFFSETS["stop"], 0)
        control.store(base + SLOT_OFFSETS["command"], command)
        control.store(base + SLOT_OFFSETS["issued"], (self._get("issued") + 1) & 0xFFFF_FFFF)

    def stop(self) -> None:
        """Ask a `touch` to end."""
        self._control.store(self._base + SLOT_OFFSETS["stop"], 1)

    async def wait(self) -> Result:
        """Wait for the command given last and return what it found.

        Raises WorkloadError when it failed, or when the process ended.
        """
        pause = _POLL_SHORT
        while not self.is_idle:
            await trio.sleep(pause)
            pause = min(pause * 1.2, _POLL_LONG)
            reason = self._control.gone(self.pid) if self._control.gone and self.pid else None
            if reason and not self.is_idle:
                raise WorkloadError(f"worker {self._index} cannot answer: {reason}")
        status: int
        (status,) = struct.unpack("@i", self._control.read(self._base + SLOT_OFFSETS["status"], 4))
        if status < 0:
            text = self._control.text(self._base + SLOT_OFFSETS["error"])
            name = Command(self._get("command")).name.lower()
            raise WorkloadError(f"worker {self._index}, {name}: {text or os.strerror(-status)}")
        return self.result

    async def run(self, command: Command, *arguments: int) -> Result:
        """Give a command and wait for what it finds."""
        self.issue(command, *arguments)
        return await self.wait()

    async def verify(self, first: int = 0, nr: int = 0) -> Result:
        """Look at every byte."""
        return await self.run(Command.VERIFY, first, nr)

    def start_touching(
        self,
        order: Order = Order.RANDOM,
        *,
        first: int = 0,
        nr: int = 0,
        count: int = 0,
        seed: int = 1,
        pause_ns: int = 0,
        flags: Touch | int = 0,
        duration_ns: int = 0,
    ) -> None:
        """Touch pages and time each touch, without waiting for the end.

        Every page once, or `count` touches, or until `stop` is called, or for `duration_ns`.
        """
        self.issue(Command.TOUCH, order, first, nr, count, seed, pause_ns, flags, duration_ns)

    async def touch(
        self, order: Order = Order.RANDOM, *, first: int = 0, nr: int = 0, count: int = 0
    ) -> Result:
        """Touch pages and time each touch."""
        self.start_touching(order, first=first, nr=nr, count=count)
        return await self.wait()

    async def write(self, first: int, nr: int, generation: int) -> Result:
        """Fill pages with another generation of the pattern."""
        return await self.run(Command.WRITE, first, nr, generation)

    async def read_by_syscall(self, first: int = 0, nr: int = 0) -> Result:
        """Have the kernel copy pages, and look at every byte of the copies."""
        return await self.run(Command.READ_BY_SYSCALL, first, nr)

    async def resident(self, first: int = 0, nr: int = 0) -> int:
        """Count the pages that are present."""
        return (await self.run(Command.RESIDENT, first, nr)).value

    async def discard(self, first: int, nr: int) -> Result:
        """Discard pages with MADV_DONTNEED: they are to read as zeros from now on."""
        return await self.run(Command.DISCARD, first, nr)

    async def move(self, first: int, nr: int, address: int) -> Result:
        """Move pages to a fixed new place with mremap."""
        return await self.run(Command.MOVE, first, nr, address)

    async def unmap(self, first: int, nr: int) -> Result:
        """Unmap, in one system call when the range lies in one area."""
        return await self.run(Command.UNMAP, first, nr)

    async def protect(self, first: int, nr: int, *, step: int = 1, writable: bool = False) -> Result:
        """Protect every second `step` pages, which splits or joins the kernel's VMAs."""
        return await self.run(Command.PROTECT, first, nr, step, int(writable))

    async def fork(self, child: Worker) -> int:
        """Fork a child that becomes the worker `child`; return its pid."""
        return (await self.run(Command.FORK, child.slot)).value

    async def fork_many(self, count: int) -> Result:
        """Fork children that each look at every byte and exit; `value` counts those that ended well."""
        return await self.run(Command.FORK_MANY, count)

    async def wait_child(self, pid: int) -> int:
        """Reap a child and return its wait status."""
        return (await self.run(Command.WAIT, pid)).value

    async def reap_zombie(self) -> int:
        """Reap the zombie of the first task and return its wait status."""
        return (await self.run(Command.REAP_ZOMBIE)).value

    async def exit(self, status: int = 0) -> None:
        """End the process with an exit status."""
        await self.run(Command.EXIT, status)
