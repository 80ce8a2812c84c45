"""Images of real dumps, by whatever CRIUs are here."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from criupy.images import (
    PageFlags,
    TaskState,
    VmaStatus,
    _framing,
    _schema_pb2,
    check_pages,
    frame_size,
    is_zombie,
    lazy_extents,
    present_pages,
    read_inventory,
    read_mm,
    read_pagemap,
    read_pstree,
    read_task_state,
)

pytestmark = pytest.mark.criu

PAGE = mmap.PAGESIZE
RUNS = 50


def criu_binaries() -> list[Path]:
    if listed := os.environ.get("CRIUPY_CRIU"):
        return [Path(name) for name in listed.split(":") if name]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = [
        path for cache in (Path("/var/cache"), home) for path in sorted(cache.glob("criupy/criu-*/bin/criu"))
    ]
    if not found and (name := shutil.which("criu")):
        found = [Path(name)]
    return found


def version(criu: Path) -> tuple[int, int]:
    out = subprocess.run([criu, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = out.split("Version:")[1].split()[0].split(".")[:2]
    return int(major), int(minor)


# Every second page of an anonymous area is written, so the pagemap is known
# by hand; guard pages are asked for where the kernel has them; one child is dead.
PROGRAM = f"""
import ctypes, mmap, os, sys, time
if os.fork() == 0:
    os._exit(3)
area = mmap.mmap(-1, {2 * RUNS + 8} * {PAGE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(15)  # MADV_NOHUGEPAGE
for page in range({RUNS}):
    area[2 * page * {PAGE}] = 1
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
libc = ctypes.CDLL(None)
guarded = -1
if sys.argv[2] == "guards":
    place = ctypes.c_void_p(start + {2 * RUNS + 2} * {PAGE})
    guarded = libc.madvise(place, ctypes.c_size_t({PAGE}), 102)  # MADV_GUARD_INSTALL
with open(sys.argv[1] + ".tmp", "w") as out:
    print(start, guarded, file=out)
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(1000)
"""


@contextmanager
def workload(directory: Path, *, guards: bool) -> Iterator[tuple[int, int, bool]]:
    """Run the program; give its pid, its area's address and whether it has guard pages."""
    said = directory / "said"
    with (directory / "stdio").open("w+") as stdio:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, said, "guards" if guards else "none"],
            stdin=subprocess.DEVNULL,
            stdout=stdio,
            stderr=stdio,
            start_new_session=True,
        )
    try:
        while not said.exists():
            assert process.poll() is None, (directory / "stdio").read_text()
            os.sched_yield()
        start, guarded = map(int, said.read_text().split())
        yield process.pid, start, guarded == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


BINARIES = criu_binaries()


@pytest.fixture(params=[*BINARIES] or [None], ids=[path.parts[-3] for path in BINARIES] or ["none"])
def criu(request: pytest.FixtureRequest) -> Path:
    path: Path | None = request.param
    if path is None:
        pytest.skip("no CRIU in CRIUPY_CRIU, in criupy's cache or on PATH")
    if os.geteuid() != 0:
        pytest.skip("criu dump needs root")
    return path


def test_images_of_a_real_dump(criu: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    # CRIU 4.1.1 fails to dump a process with guard pages.
    is_new = version(criu) >= (4, 2)
    with workload(tmp_path, guards=is_new) as (pid, start, guarded):
        dump = [str(criu), "dump", "--no-default-config", "-t", str(pid), "-D", str(images), "-o", "dump.log"]
        done = subprocess.run([*dump, "--leave-running", "-v4"], check=False)
        assert done.returncode == 0, (images / "dump.log").read_text()[-3000:]

        assert frame_size(images) == (32 if is_new else 24)
        assert read_inventory(images).version == 2

        root, child = read_pstree(images)
        assert (root.pid, root.sid, root.pgid, root.threads) == (pid, pid, pid, (pid,))
        assert child.ppid == pid
        assert read_task_state(images, pid) is TaskState.ALIVE
        assert not is_zombie(images, pid)
        assert is_zombie(images, child.pid)
        assert not (images / f"pagemap-{child.pid}.img").exists()

        mm = read_mm(images, pid)
        end = start + (2 * RUNS + 8) * PAGE
        area = [vma for vma in mm.vmas if vma.start <= start and end <= vma.end]
        assert len(area) == 1
        assert area[0].status == VmaStatus.REGULAR | VmaStatus.ANON_PRIVATE
        assert area[0].prot == mmap.PROT_READ | mmap.PROT_WRITE
        assert area[0].madv & 1 << 15
        assert all(not vma.status & VmaStatus.GUARD for vma in mm.vmas)
        if guarded:
            with _framing.open_image(images, f"mm-{pid}.img", _framing.MM) as image:
                raw = _schema_pb2.Mm.FromString(image.read_only_record()[1])
            guard = start + (2 * RUNS + 2) * PAGE
            assert (guard, guard + PAGE, VmaStatus.GUARD) in [(v.start, v.end, v.status) for v in raw.vmas]

        pagemap = read_pagemap(images, pid)
        written = [start + 2 * page * PAGE for page in range(RUNS)]
        mine = [
            (address, count, flags)
            for address, count, flags in zip(pagemap.starts, pagemap.nr_pages, pagemap.flags, strict=True)
            if start <= address < end
        ]
        assert mine == [(address, 1, PageFlags.LAZY | PageFlags.PRESENT) for address in written]
        assert check_pages(images, pagemap).stat().st_size == present_pages(pagemap) * PAGE

        # The bytes behind an index are those of the process, which still runs.
        found = lazy_extents(pagemap, mm)
        assert found.total_pages > RUNS
        pages = check_pages(images, pagemap).read_bytes()
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for address, _, index, _, present in found:
                assert present
                if address in written:
                    memory.seek(address)
                    assert memory.read(PAGE) == pages[index * PAGE : (index + 1) * PAGE]
