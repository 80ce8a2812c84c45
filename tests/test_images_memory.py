"""Memory of a dump added up, chains of parents, and directories that hold no dump."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import images_writer as w
from criupy.errors import ImageError
from criupy.images import (
    AreaTotals,
    PagemapStyle,
    Vma,
    VmaKind,
    VmaStatus,
    page_totals,
    parent_chain,
    read_dump,
    read_pagemap,
    read_shared_memory,
    read_task_memory,
    vma_kind,
)
from criupy.images._tasks import MadvBits

PAGE = 4096

# Statuses as CRIU 4.1.1 and 4.2.1 write them, and one per bit that was not met.
KINDS = [
    (0x201, 0x22, VmaKind.ANONYMOUS),
    (0x201, 0x122, VmaKind.STACK),
    (0x203, 0x22, VmaKind.STACK),
    (0x221, 0x22, VmaKind.HEAP),
    (0x209, 0x22, VmaKind.KERNEL),  # vdso
    (0x1201, 0x22, VmaKind.KERNEL),  # vvar
    (0x204, 0x22, VmaKind.KERNEL),  # vsyscall
    (1 << 17, 0x02, VmaKind.KERNEL),
    (0x8201, 0x22, VmaKind.SHADOW_STACK),
    (1 << 13, 0x01, VmaKind.AIO_RING),
    (0x41, 0x02, VmaKind.FILE_PRIVATE),
    (0x81, 0x01, VmaKind.FILE_SHARED),
    (0x4081, 0x01, VmaKind.MEMFD),
    (0x4041, 0x02, VmaKind.MEMFD),
    (0x101, 0x21, VmaKind.ANONYMOUS_SHARED),
    (0x501, 0x21, VmaKind.SYSV),
    (0x801, 0x01, VmaKind.SOCKET),
    (0x81 | 1 << 27, 0x01, VmaKind.DEVICE),
    (0x1, 0x01, VmaKind.OTHER),
    (1 << 40, 0x01, VmaKind.OTHER),
]


@pytest.mark.parametrize(("status", "flags", "kind"), KINDS)
def test_kinds_of_areas(status: int, flags: int, kind: VmaKind) -> None:
    assert vma_kind(Vma(0, PAGE, 3, flags, VmaStatus(status), MadvBits(0))) is kind


def test_every_kind_is_met() -> None:
    assert {kind for _, _, kind in KINDS} == set(VmaKind)


def test_memory_of_a_task(tmp_path: Path) -> None:
    runs = [w.Run(0x1000, 2, 6), w.Run(0x3000, 3, 2), w.Run(0x6000, 4, 4), w.Run(0xA000, 5, 1)]
    vmas = [
        w.vma_body(0x1000, 0x10000),
        w.vma_body(0x10000, 0x12000, status=0x221),
        w.vma_body(0x20000, 0x21000),
        w.guard(0x1000, 0x2000),
    ]
    w.write_dump(tmp_path, 7, runs, vmas, "old")
    memory = read_task_memory(tmp_path, 7)
    assert dict(memory.areas) == {
        VmaKind.ANONYMOUS: AreaTotals(2, 0x10000),
        VmaKind.HEAP: AreaTotals(1, 0x2000),
    }
    assert list(memory.areas) == [VmaKind.ANONYMOUS, VmaKind.HEAP]
    pages = memory.pages
    assert pages is not None
    assert (pages.present, pages.at_source, pages.in_parent, pages.lazy, pages.total) == (6, 3, 5, 5, 14)
    assert (pages.entries, pages.pages_id, pages.file_length) == (4, 1, 6 * PAGE)
    assert pages.style is PagemapStyle.OLD


@given(st.lists(st.tuples(st.integers(1, 1 << 22), st.sampled_from([1, 2, 4, 6])), max_size=20))
def test_pages_are_counted_once(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("images")
    start = 0
    written = []
    for count, flags in runs:
        written.append(w.Run(start, count, flags))
        start += count * PAGE
    (directory / "pagemap-7.img").write_bytes(w.pagemap(written))
    with (directory / "pages-1.img").open("wb") as file:
        file.truncate(sum(count for count, flags in runs if flags & 4) * PAGE)
    pages = page_totals(directory, read_pagemap(directory, 7))
    assert pages.present == sum(count for count, flags in runs if flags & 4)
    assert pages.lazy == sum(count for count, flags in runs if flags & 2)
    assert pages.at_source == sum(count for count, flags in runs if flags == 2)
    assert pages.in_parent == sum(count for count, flags in runs if flags == 1)
    assert pages.total == sum(count for count, _ in runs)
    assert pages.entries == len(runs)


def test_pages_image_that_was_never_made(tmp_path: Path) -> None:
    """CRIU makes it with its first page."""
    w.write_dump(tmp_path, 7, [w.Run(0x1000, 2, 2), w.Run(0x3000, 1, 1)], [w.vma_body(0x1000, 0x9000)])
    (tmp_path / "pages-1.img").unlink()
    pages = read_task_memory(tmp_path, 7).pages
    assert pages is not None
    assert (pages.present, pages.file_length) == (0, 0)
    (tmp_path / "pagemap-7.img").write_bytes(w.pagemap([w.Run(0x1000, 1)]))
    with pytest.raises(ImageError, match="No such file") as caught:
        read_task_memory(tmp_path, 7)
    assert caught.value.path == str(tmp_path / "pages-1.img")


def test_pages_image_that_was_cut(tmp_path: Path) -> None:
    w.write_dump(tmp_path, 7, [w.Run(0x1000, 3)], [w.vma_body(0x1000, 0x9000)])
    os.truncate(tmp_path / "pages-1.img", 3 * PAGE - 1)
    with pytest.raises(ImageError, match=r"expected 12288 bytes as pagemap-7\.img says") as caught:
        read_dump(tmp_path)
    assert (caught.value.path, caught.value.offset) == (str(tmp_path / "pages-1.img"), 3 * PAGE - 1)


def test_pagemap_that_went_elsewhere(tmp_path: Path) -> None:
    w.write_dump(tmp_path, 7, [w.Run(0x1000, 3)], [w.vma_body(0x1000, 0x9000)])
    (tmp_path / "pagemap-7.img").unlink()
    assert read_task_memory(tmp_path, 7).pages is None
    (tmp_path / "pagemap-7.img").symlink_to("nowhere")
    with pytest.raises(ImageError, match="No such file"):
        read_task_memory(tmp_path, 7)


def test_shared_memory(tmp_path: Path) -> None:
    assert read_shared_memory(tmp_path) == ()
    largest = (1 << 64) - 1
    for pages_id, shmid in enumerate((1131, 9, largest), 1):
        runs = [w.Run(0, pages_id, 4), w.Run(0x100000, 1, 1)]
        (tmp_path / f"pagemap-shmem-{shmid}.img").write_bytes(w.pagemap(runs, pages_id=pages_id))
        (tmp_path / f"pages-{pages_id}.img").write_bytes(bytes(pages_id * PAGE))
    (tmp_path / "pagemap-shmem-x.img").write_bytes(b"")
    (tmp_path / "pagemap-shmem-9.img.old").write_bytes(b"")
    found = read_shared_memory(tmp_path)
    assert [(piece.shmid, piece.pages.present, piece.pages.in_parent) for piece in found] == [
        (9, 2, 1),
        (1131, 1, 1),
        (largest, 3, 1),
    ]
    (tmp_path / "pagemap-shmem-9.img").write_bytes(w.core())
    with pytest.raises(ImageError, match="the start of a core image") as caught:
        read_shared_memory(tmp_path)
    assert (caught.value.path, caught.value.offset) == (str(tmp_path / "pagemap-shmem-9.img"), 4)
    with pytest.raises(ImageError, match="No such file"):
        read_shared_memory(tmp_path / "nowhere")


def make_dump(directory: Path, style: str = "new") -> Path:
    directory.mkdir()
    w.write_dump(directory, 7, [w.Run(0x1000, 1)], [w.vma_body(0x1000, 0x9000)], style)
    return directory


def test_whole_dump(tmp_path: Path) -> None:
    images = make_dump(tmp_path / "images")
    (images / "pstree.img").write_bytes(w.pstree([(7, 0), (8, 7)]))
    (images / "core-8.img").write_bytes(w.core(state=2))
    (images / "pagemap-shmem-5.img").write_bytes(w.pagemap([]))
    dump = read_dump(str(images))
    assert dump.images_dir == images
    assert dump.inventory.run_id == "run"
    assert [task.pid for task in dump.tasks] == [7, 8]
    assert list(dump.memory) == [7]
    assert [piece.shmid for piece in dump.shared] == [5]
    assert dump.style is PagemapStyle.NEW
    assert dump.parents == ()


def test_images_of_two_dumpers(tmp_path: Path) -> None:
    images = make_dump(tmp_path / "images")
    (images / "pages-2.img").write_bytes(bytes(PAGE))
    (images / "pagemap-shmem-5.img").write_bytes(w.pagemap([w.Run(0, 1, 4)], "old", pages_id=2))
    with pytest.raises(ImageError, match=r"new page counts as in pagemap-7\.img, found old ones") as caught:
        read_dump(images)
    assert caught.value.path == str(images / "pagemap-shmem-5.img")


def test_chain_of_parents(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for directory in (first, second):
        directory.mkdir()
    make_dump(third)
    assert parent_chain(third) == ()
    (third / "parent").symlink_to("../second")
    (second / "parent").symlink_to(first)
    assert parent_chain(third) == (second.resolve(), first.resolve())
    assert parent_chain(os.path.relpath(third)) == parent_chain(third)
    assert read_dump(third).parents == parent_chain(third)

    # What a copy that follows links makes of it.
    (second / "parent").unlink()
    (second / "parent").mkdir()
    assert parent_chain(third) == (second.resolve(), (second / "parent").resolve())


def test_chains_that_lead_nowhere(tmp_path: Path) -> None:
    images = make_dump(tmp_path / "images")
    link = images / "parent"
    link.symlink_to("../gone")
    with pytest.raises(ImageError, match=r"No such file .*\(were they moved\?\)") as caught:
        read_dump(images)
    assert caught.value.path == str(link)
    (tmp_path / "gone").write_bytes(b"")
    with pytest.raises(ImageError, match="this is no directory"):
        read_dump(images)
    (tmp_path / "gone").unlink()
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "parent").symlink_to(images)
    with pytest.raises(ImageError, match=r"a chain with an end, .*images is in it already") as caught:
        read_dump(images)
    assert caught.value.path == str((tmp_path / "gone").resolve() / "parent")
    link.unlink()
    link.symlink_to("parent")
    with pytest.raises(ImageError, match="expected the images that these are based on"):
        read_dump(images)
    link.unlink()
    link.symlink_to(".")
    with pytest.raises(ImageError, match="is in it already"):
        read_dump(images)


def test_directories_without_a_dump(tmp_path: Path) -> None:
    images = tmp_path / "images"
    with pytest.raises(ImageError, match="expected a directory of images: No such file") as caught:
        read_dump(images)
    assert caught.value.path == str(images)
    images.write_bytes(b"")
    with pytest.raises(ImageError, match="this is a file"):
        read_dump(images)
    images.unlink()
    images.mkdir()
    with pytest.raises(ImageError, match="it is empty"):
        read_dump(images)
    (images / "dump.log").write_bytes(b"")
    with pytest.raises(ImageError, match="it has none"):
        read_dump(images)


def test_dump_that_is_not_finished(tmp_path: Path) -> None:
    images = make_dump(tmp_path / "images")
    (images / "inventory.img").unlink()
    with pytest.raises(ImageError, match="the dump is going on, or has failed") as caught:
        read_dump(images)
    assert caught.value.path == str(images / "inventory.img")


def test_only_what_a_page_server_wrote(tmp_path: Path) -> None:
    images = make_dump(tmp_path / "images")
    for name in ("inventory", "pstree", "core-7", "mm-7"):
        (images / f"{name}.img").unlink()
    with pytest.raises(ImageError, match="only pages as a page server writes them"):
        read_dump(images)


@pytest.mark.parametrize("flagged", [True, False])
def test_pre_dump(tmp_path: Path, flagged: bool) -> None:
    images = make_dump(tmp_path / "images")
    for name in ("pstree", "core-7", "mm-7"):
        (images / f"{name}.img").unlink()
    (images / "inventory.img").write_bytes(w.inventory(pre_dump=flagged))
    with pytest.raises(ImageError, match="this is a pre-dump, which has memory only") as caught:
        read_dump(images)
    assert caught.value.path == str(images / "pstree.img")


@pytest.mark.parametrize("name", ["pstree.img", "core-7.img", "mm-7.img", "pages-1.img"])
def test_images_that_are_missing(tmp_path: Path, name: str) -> None:
    images = make_dump(tmp_path / "images")
    (images / name).unlink()
    with pytest.raises(ImageError, match="No such file") as caught:
        read_dump(images)
    assert caught.value.path == str(images / name)
