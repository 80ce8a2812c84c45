"""A process to dump with a real CRIU, and the CRIUs there are."""

from __future__ import annotations

import functools
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from criupy.testing.criu_linux import caches

PAGE = mmap.PAGESIZE
RUNS = 50


@functools.cache
def criu_binaries() -> list[Path]:
    """List the CRIUs to test with: CRIUPY_CRIU, else those in criupy's caches, else the system's."""
    if listed := os.environ.get("CRIUPY_CRIU"):
        return [Path(name) for name in listed.split(":") if name]
    found = [path for cache in caches() for path in sorted(cache.glob("criu-*/bin/criu"))]
    # The system's may be too old to start on this kernel.
    if not found and (name := shutil.which("criu")):
        started = subprocess.run([name, "check"], capture_output=True, check=False).returncode == 0
        found = [Path(name)] if started else []
    return found


def criu_version(criu: Path) -> tuple[int, int]:
    """Ask a CRIU for its major and minor version."""
    out = subprocess.run([criu, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = out.split("Version:")[1].split()[0].split(".")[:2]
    return int(major), int(minor)


# Every second page of an anonymous area is written, so the pagemap is known
# by hand; guard pages are asked for where the kernel has them; one child is dead.
_PROGRAM = f"""
import ctypes, mmap, os, sys, time
if os.fork() == 0:
    os._exit(3)
area = mmap.mmap(-1, {2 * RUNS + 8} * {PAGE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(15)  # MADV_NOHUGEPAGE
for page in range({RUNS}):
    area[2 * page * {PAGE} : (2 * page + 1) * {PAGE}] = bytes([page + 1]) * {PAGE}
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
guarded = -1
if sys.argv[2] == "guards":
    place = ctypes.c_void_p(start + {2 * RUNS + 2} * {PAGE})
    guarded = ctypes.CDLL(None).madvise(place, ctypes.c_size_t({PAGE}), 102)  # MADV_GUARD_INSTALL
with open(sys.argv[1] + ".tmp", "w") as out:
    print(start, guarded, file=out)
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(1000)
"""


@dataclass(frozen=True)
class Workload:
    """The process: RUNS single pages are written in its area, page i at ``written[i]`` with byte i+1."""

    process: subprocess.Popen[bytes]
    start: int
    guarded: bool

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def end(self) -> int:
        return self.start + (2 * RUNS + 8) * PAGE

    @property
    def guard(self) -> int:
        return self.start + (2 * RUNS + 2) * PAGE

    @property
    def written(self) -> list[int]:
        return [self.start + 2 * page * PAGE for page in range(RUNS)]


@contextmanager
def workload(directory: Path, *, guards: bool) -> Iterator[Workload]:
    """Run the process until the end of the block."""
    said = directory / "said"
    with (directory / "stdio").open("w+") as stdio:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, said, "guards" if guards else "none"],
            stdin=subprocess.DEVNULL,
            stdout=stdio,
            stderr=stdio,
            start_new_session=True,
        )
    try:
        while not said.exists():
            assert process.poll() is None, (directory / "stdio").read_text()
            time.sleep(0.01)
        start, guarded = map(int, said.read_text().split())
        yield Workload(process, start, guarded == 0)
    finally:
        process.kill()
        process.wait()
