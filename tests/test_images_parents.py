"""Pages of parents: followed through the chain and made lazy, checked against a model page by page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import images_writer as w
from criupy.errors import ImageError
from criupy.images import (
    FILE_SHIFT,
    LAZY_PARENTS,
    NO_PAGE_INDEX,
    LazyParents,
    lazy_parents,
    original_images,
    read_dump,
    read_pagemap,
    read_pstree,
    write_lazy_parents,
)
from criupy.images._parents import _follow

PAGE = 4096
PID = 7
PARENT, LAZY, PRESENT = 1, 2, 4

Level = Sequence[tuple[int, int, int]]
"""Entries of (page, count, flags)."""


def write_level(directory: Path, level: Level, style: str = "new", parent: str | None = None) -> None:
    directory.mkdir()
    (directory / f"pagemap-{PID}.img").write_bytes(
        w.pagemap([w.Run(page * PAGE, nr, flags) for page, nr, flags in level], style)
    )
    with (directory / "pages-1.img").open("wb") as file:
        file.truncate(sum(nr for _, nr, flags in level if flags & PRESENT) * PAGE)
    if parent is not None:
        (directory / "parent").symlink_to(f"../{parent}")


def write_chain(
    root: Path,
    levels: Sequence[Level],
    vmas: Iterable[bytes] = (w.vma_body(PAGE, 1000 * PAGE),),
    style: str = "new",
    sp: int = 999 * PAGE + 8,
) -> Path:
    """Write a dump, the first of the levels, and its parents behind it; return the dump's directory."""
    for number, level in enumerate(levels):
        write_level(root / str(number), level, style, str(number + 1) if number + 1 < len(levels) else None)
    top = root / "0"
    (top / "inventory.img").write_bytes(w.inventory())
    (top / "pstree.img").write_bytes(w.pstree([(PID, 0)]))
    (top / f"core-{PID}.img").write_bytes(w.core(thread_info=w.registers(sp)))
    (top / f"mm-{PID}.img").write_bytes(w.mm(vmas))
    return top


def made_lazy(top: Path, *, local: bool = False) -> LazyParents:
    (task,) = read_pstree(top)
    return lazy_parents(top, task, local=local)


def entries_of(memory: LazyParents) -> list[tuple[int, int, int]]:
    pagemap = memory.pagemap
    return [
        (start // PAGE, nr, flags)
        for start, nr, flags in zip(pagemap.starts, pagemap.nr_pages, pagemap.flags, strict=True)
    ]


def test_a_chain(tmp_path: Path) -> None:
    """Each page from the nearest that has it."""
    top = write_chain(
        tmp_path,
        [
            [(1, 4, 2), (5, 10, 1), (20, 2, 4), (30, 2, 1)],
            [(4, 3, 6), (7, 4, 1), (11, 1, 4), (30, 1, 1)],
            [(1, 5, 6), (6, 20, 6), (30, 2, 6)],
        ],
    )
    found = _follow(top, PID, read_pagemap(top, PID))
    assert found.files == (tmp_path / "1/pages-1.img", tmp_path / "2/pages-1.img")
    assert list(found) == [
        (5 * PAGE, 2, 0, 1, 1),
        (7 * PAGE, 4, 1, 6, 1),
        (11 * PAGE, 1, 0, 3, 0),
        (30 * PAGE, 1, 1, 25, 1),
    ]
    memory = made_lazy(top)
    assert entries_of(memory) == [
        (1, 4, 2), (5, 6, 2), (11, 4, 1), (20, 2, 4), (30, 1, 2), (31, 1, 1),
    ]  # fmt: skip
    assert list(memory.extents()) == [
        (1 * PAGE, 4, NO_PAGE_INDEX, 0, 0),
        (5 * PAGE, 2, 1, 0, 1),
        (7 * PAGE, 4, 1 << FILE_SHIFT | 6, 0, 1),
        (30 * PAGE, 1, 1 << FILE_SHIFT | 25, 0, 1),
    ]


def test_a_full_dump_has_pages_of_its_own(tmp_path: Path) -> None:
    top = write_chain(tmp_path, [[(1, 2, 4), (3, 2, 6), (5, 2, 1)], [(5, 2, 6)]])
    memory = made_lazy(top, local=True)
    assert memory.files == (tmp_path / "1/pages-1.img", top / "pages-1.img")
    assert list(memory.extents()) == [(3 * PAGE, 2, 1 << FILE_SHIFT | 2, 0, 1), (5 * PAGE, 2, 0, 0, 1)]


@pytest.mark.parametrize(
    ("vma", "is_lazy"),
    [
        (w.vma_body(PAGE, 9 * PAGE), True),
        (w.vma_body(PAGE, 9 * PAGE, flags=0x122), True),  # a stack
        (w.vma_body(PAGE, 9 * PAGE, flags=0x2022), False),  # locked
        (w.vma_body(PAGE, 9 * PAGE, flags=0x40022), False),  # huge pages
        (w.vma_body(PAGE, 9 * PAGE, flags=0x02), False),  # a file
        (w.vma_body(PAGE, 9 * PAGE, flags=0x21), False),  # shared
        (w.vma_body(PAGE, 9 * PAGE, status=1 << 3 | 1), False),  # vdso
        (w.vma_body(PAGE, 9 * PAGE, status=1 << 12 | 1), False),  # vvar
        (w.vma_body(PAGE, 9 * PAGE, status=1 << 2 | 1), False),  # vsyscall
    ],
)
def test_what_an_area_has_become(tmp_path: Path, vma: bytes, *, is_lazy: bool) -> None:
    """The last dump tells, not the one whose pages they are."""
    top = write_chain(tmp_path, [[(2, 3, 1)], [(2, 3, 6)]], [vma])
    assert entries_of(made_lazy(top)) == [(2, 3, 2 if is_lazy else 1)]


@pytest.mark.parametrize("machine", ["x86", "aarch64"])
def test_pages_of_stack_pointers_stay(tmp_path: Path, machine: str) -> None:
    top = write_chain(tmp_path, [[(1, 9, 1)], [(1, 9, 6)]])
    (top / "pstree.img").write_bytes(w.pstree([(PID, 0)], threads=[8]))
    (top / f"core-{PID}.img").write_bytes(w.core(thread_info=w.registers(3 * PAGE, machine)))
    (top / "core-8.img").write_bytes(w.thread_core(thread_info=w.registers(7 * PAGE - 1, machine)))
    memory = made_lazy(top)
    assert entries_of(memory) == [(1, 2, 2), (3, 1, 1), (4, 2, 2), (6, 1, 1), (7, 3, 2)]
    assert [(start // PAGE, nr, index) for start, nr, index, _, _ in memory.extents()] == [
        (1, 2, 0), (4, 2, 3), (7, 3, 6),
    ]  # fmt: skip


def test_unknown_registers(tmp_path: Path) -> None:
    top = write_chain(tmp_path, [[(1, 9, 1)], [(1, 9, 6)]])
    (top / f"core-{PID}.img").write_bytes(w.core())
    with pytest.raises(ImageError, match="x86-64 or aarch64"):
        made_lazy(top)


def test_a_parent_that_lacks_the_task(tmp_path: Path) -> None:
    top = write_chain(tmp_path, [[(1, 9, 1)], []])
    (tmp_path / f"1/pagemap-{PID}.img").unlink()
    assert entries_of(made_lazy(top)) == [(1, 9, 1)]


def test_a_parent_without_its_pages(tmp_path: Path) -> None:
    top = write_chain(tmp_path, [[(1, 9, 1)], [(1, 9, 6)]])
    os.truncate(tmp_path / "1/pages-1.img", 8 * PAGE)
    with pytest.raises(ImageError, match=r"1/pages-1.img.*truncated"):
        made_lazy(top)


levels_of_pages = st.lists(
    st.dictionaries(st.integers(1, 40), st.sampled_from([1, 2, 4, 6]), max_size=30), min_size=1, max_size=4
)


def as_entries(pages: dict[int, int], cuts: set[int]) -> list[tuple[int, int, int]]:
    entries: list[tuple[int, int, int]] = []
    for page, flags in sorted(pages.items()):
        if entries and page not in cuts and entries[-1][2] == flags and sum(entries[-1][:2]) == page:
            entries[-1] = (entries[-1][0], entries[-1][1] + 1, flags)
        else:
            entries.append((page, 1, flags))
    return entries


@settings(deadline=None)
@given(
    levels=levels_of_pages,
    cuts=st.sets(st.integers(1, 40)),
    borders=st.sets(st.integers(2, 40), max_size=5),
    locked=st.sets(st.integers(0, 5)),
    stack=st.integers(1, 40),
    style=st.sampled_from(["old", "new"]),
)
def test_against_a_model_of_single_pages(
    levels: list[dict[int, int]],
    cuts: set[int],
    borders: set[int],
    locked: set[int],
    stack: int,
    style: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("chain")
    ends = [1, *sorted(borders), 41]
    areas = list(pairwise(ends))
    flags = [0x2022 if i in locked else 0x22 for i in range(len(areas))]
    vmas = [w.vma_body(a * PAGE, b * PAGE, flags=f) for (a, b), f in zip(areas, flags, strict=True)]
    top = write_chain(root, [as_entries(pages, cuts) for pages in levels], vmas, style, stack * PAGE + 9)

    expected_flags = dict(levels[0])
    expected: dict[int, tuple[Path, int] | None] = {p: None for p, f in levels[0].items() if f & LAZY}
    for page in (page for page, flag in levels[0].items() if flag == PARENT):
        area = next(i for i, (a, b) in enumerate(areas) if a <= page < b)
        number = next((n for n, pages in enumerate(levels) if pages.get(page) != PARENT), None)
        if number is None or levels[number].get(page) != LAZY | PRESENT:
            continue
        if page == stack or area in locked:
            continue
        expected_flags[page] = LAZY
        index = sum(p < page for p, f in levels[number].items() if f & PRESENT)
        expected[page] = root / str(number) / "pages-1.img", index

    new = root / "new"
    write_lazy_parents(top, new)
    written = read_pagemap(new, PID)
    got_flags = {
        start // PAGE + i: flag
        for start, nr, flag in zip(written.starts, written.nr_pages, written.flags, strict=True)
        for i in range(nr)
    }
    assert got_flags == expected_flags
    memory = made_lazy(top)
    assert (written.starts, written.nr_pages, written.flags, written.style, written.pages_id) == (
        memory.pagemap.starts,
        memory.pagemap.nr_pages,
        memory.pagemap.flags,
        read_pagemap(top, PID).style,
        1,
    )
    got: dict[int, tuple[Path, int] | None] = {}
    for start, nr, index, area, present in memory.extents():
        assert areas[area][0] * PAGE <= start < start + nr * PAGE <= areas[area][1] * PAGE
        for i in range(nr):
            low = index & ((1 << FILE_SHIFT) - 1)
            got[start // PAGE + i] = (memory.files[index >> FILE_SHIFT], low + i) if present else None
    assert got == expected
    assert {path for path, _ in filter(None, got.values())} == set(memory.files)


# ---- the directory -----------------------------------------------------------------


def test_a_directory_to_restore_from(tmp_path: Path) -> None:
    top = write_chain(tmp_path, [[(1, 4, 2), (5, 10, 1)], [(5, 9, 6)]], style="old")
    for name in ("dump.log", "stats-restore", "daemon.pid"):
        (top / name).write_text("text")
    (top / "descriptors.json").write_text("[]")
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*") if path.is_file()}
    new = tmp_path / "new"
    assert write_lazy_parents(top, new) == 9
    links = {path.name: str(path.readlink()) for path in new.iterdir() if path.is_symlink()}
    names = ("core-7.img", "inventory.img", "mm-7.img", "pages-1.img", "pstree.img", "descriptors.json")
    assert links == {"parent": "../1"} | {name: f"../0/{name}" for name in names}
    assert {path.name for path in new.iterdir()} == {*links, "pagemap-7.img", LAZY_PARENTS}
    assert before == {path: path.read_bytes() for path in before}
    assert original_images(new).samefile(top)
    assert original_images(top) == top
    pages = read_dump(new).memory[PID].pages
    assert pages is not None
    assert (pages.at_source, pages.in_parent) == (13, 1)
    assert read_dump(new).parents == (tmp_path / "1",)


def test_a_directory_elsewhere_behind_links(tmp_path: Path) -> None:
    top = write_chain(tmp_path, [[(1, 4, 1)], [(1, 4, 6)]])
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    write_lazy_parents(top, tmp_path / "link/new")
    assert (tmp_path / "link/new/pstree.img").samefile(top / "pstree.img")
    assert (tmp_path / "link/new/parent").samefile(tmp_path / "1")


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    top = write_chain(tmp_path, [[(1, 4, 1)], [(1, 4, 6)]])
    (tmp_path / "there").mkdir()
    with pytest.raises(ImageError, match="expected to make this directory: File exists"):
        write_lazy_parents(top, tmp_path / "there")
    with pytest.raises(ImageError, match="expected a place outside of the dump"):
        write_lazy_parents(top, top / "new")
    os.truncate(tmp_path / "1/pages-1.img", 0)
    with pytest.raises(ImageError, match="truncated"):
        write_lazy_parents(top, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_when_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its marker it would pass for a dump."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    top = write_chain(tmp_path, [[(1, 4, 1)], [(1, 4, 6)]])
    monkeypatch.setattr("criupy.images._parents_writer.write_pagemap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_lazy_parents(top, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_once_is_enough(tmp_path: Path) -> None:
    top = write_chain(tmp_path, [[(1, 4, 1)], [(1, 4, 6)]])
    write_lazy_parents(top, tmp_path / "new")
    with pytest.raises(ImageError, match="already"):
        write_lazy_parents(tmp_path / "new", tmp_path / "newer")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "images": 3}', "\udcff"])
def test_a_marker_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / LAZY_PARENTS).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ImageError):
        original_images(tmp_path)


def test_a_marker_of_another_version(tmp_path: Path) -> None:
    (tmp_path / LAZY_PARENTS).write_text('{"version": 2, "images": "x"}')
    with pytest.raises(ImageError, match="make the directory anew"):
        original_images(tmp_path)
