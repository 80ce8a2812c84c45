"""What a daemon keeps of a dump: at most 2 bytes a page and 64 bytes an extent."""

from __future__ import annotations

import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from criupy.images import PageFlags, PagemapStyle, write_pagemap
from criupy.testing.images import write_images
from criupy.testing.spec import PAGE, RESERVE_BASE, RESERVE_PAGES, WorkloadSpec

SLACK = 1 << 20

# Load a small dump, then the other; print what that one took when every byte of its state has been used.
PROGRAM = """
import sys
from pathlib import Path
from criupy._uffd.image_linux import check, ffi, lib
from criupy.lazy_pages._images_linux import load_tasks

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

small, large = sys.argv[1:]
load_tasks(small, local=True)
before = resident()
dumped = load_tasks(large, local=True)
out = ffi.new("struct criupy_space **")
for task in dumped.values():
    native = task.image._to_give()
    check("space", lib.criupy_space_create(out, native))
    lib.criupy_space_set(out[0], 0, task.image.nr_pages, 1)
    lib.criupy_image_set_requested(native, 0, task.image.nr_pages, 1)
print(resident() - before, sum(task.image.nr_extents for task in dumped.values()))
"""


def write_hollow(directory: Path, extents: int, pages: int) -> None:
    """Write images of a task with so many extents of so many pages each, whose pages file is a hole."""
    length = extents * (pages + 1) * PAGE
    room = RESERVE_PAGES * PAGE
    write_images(directory, WorkloadSpec(reserve=-(-length // room) * room), style="full")
    starts = array("Q", range(RESERVE_BASE, RESERVE_BASE + length, (pages + 1) * PAGE))
    flags = array("B", (int(PageFlags.LAZY | PageFlags.PRESENT),))
    with (directory / "pagemap-100.img").open("wb") as file:
        write_pagemap(file, 1, starts, array("Q", (pages,)) * extents, flags * extents, PagemapStyle.NEW)
    with (directory / "pages-1.img").open("wb") as file:
        file.truncate(extents * pages * PAGE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extents", "pages"), [(500_000, 1), (1, 4_000_000)], ids=["many extents", "many pages"]
)
def test_state(tmp_path: Path, extents: int, pages: int) -> None:
    write_images(tmp_path / "small", WorkloadSpec(), style="full")
    write_hollow(tmp_path / "large", extents, pages)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not done.stderr
    taken, found = map(int, done.stdout.split())
    assert found == extents
    assert pages * extents < taken <= 2 * pages * extents + 64 * extents + SLACK
