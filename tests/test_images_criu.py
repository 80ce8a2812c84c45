"""Images of real dumps, by whatever CRIUs are here."""

from __future__ import annotations

import mmap
import os
import subprocess
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
from real_dump import PAGE, RUNS, criu_binaries, criu_version, workload

pytestmark = [
    pytest.mark.criu,
    pytest.mark.skipif(os.geteuid() != 0, reason="criu dump needs root"),
    pytest.mark.skipif(
        not criu_binaries(), reason="no CRIU in CRIUPY_CRIU, in criupy's caches or on PATH: run make test"
    ),
]


@pytest.mark.parametrize("binary", criu_binaries(), ids=lambda path: path.parts[-3])
def test_images_of_a_real_dump(binary: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    # CRIU 4.1.1 fails to dump a process with guard pages.
    is_new = criu_version(binary) >= (4, 2)
    with workload(tmp_path, guards=is_new) as work:
        pid = work.pid
        dump = [binary, "dump", "--no-default-config", "-t", str(pid), "-D", images, "-o", "dump.log"]
        done = subprocess.run([*map(str, dump), "--leave-running", "-v4"], check=False)
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
        area = [vma for vma in mm.vmas if vma.start <= work.start and work.end <= vma.end]
        assert len(area) == 1
        assert area[0].status == VmaStatus.REGULAR | VmaStatus.ANON_PRIVATE
        assert area[0].prot == mmap.PROT_READ | mmap.PROT_WRITE
        assert area[0].madv & 1 << 15
        assert all(not vma.status & VmaStatus.GUARD for vma in mm.vmas)
        if work.guarded:
            with _framing.open_image(images, f"mm-{pid}.img", _framing.MM) as image:
                raw = _schema_pb2.Mm.FromString(image.read_only_record()[1])
            guard = (work.guard, work.guard + PAGE, VmaStatus.GUARD)
            assert guard in [(vma.start, vma.end, vma.status) for vma in raw.vmas]

        pagemap = read_pagemap(images, pid)
        mine = [
            (address, count, flags)
            for address, count, flags in zip(pagemap.starts, pagemap.nr_pages, pagemap.flags, strict=True)
            if work.start <= address < work.end
        ]
        assert mine == [(address, 1, PageFlags.LAZY | PageFlags.PRESENT) for address in work.written]
        assert check_pages(images, pagemap).stat().st_size == present_pages(pagemap) * PAGE

        found = lazy_extents(pagemap, mm)
        assert found.total_pages > RUNS
        pages = check_pages(images, pagemap).read_bytes()
        content = {}
        for address, _, index, _, present in found:
            assert present
            content[address] = pages[index * PAGE : (index + 1) * PAGE]
        for page, address in enumerate(work.written):
            assert content[address] == bytes([page + 1]) * PAGE
