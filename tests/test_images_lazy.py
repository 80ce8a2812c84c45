"""Lazy extents: LAZY entries, split at VMA borders, checked against a model page by page."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import images_writer as w
from criupy.errors import ImageError
from criupy.images import NO_PAGE_INDEX, LazyExtents, MadvBits, lazy_extents, read_mm, read_pagemap

PAGE = 4096


def extents(directory: Path, runs: list[w.Run], vmas: list[bytes]) -> LazyExtents:
    w.write_dump(directory, 7, runs, vmas)
    return lazy_extents(read_pagemap(directory, 7), read_mm(directory, 7))


def test_live_dump(tmp_path: Path) -> None:
    """Lazy pages have no bytes in the pages image, the others do."""
    runs = [w.Run(0x1000, 2, 2), w.Run(0x3000, 1, 4), w.Run(0x4000, 1, 2)]
    found = extents(tmp_path, runs, [w.vma_body(0x1000, 0x8000)])
    assert list(found) == [(0x1000, 2, NO_PAGE_INDEX, 0, 0), (0x4000, 1, NO_PAGE_INDEX, 0, 0)]
    assert found.total_pages == 3
    assert found.path == tmp_path / "pagemap-7.img"


def test_full_dump(tmp_path: Path) -> None:
    """Every PRESENT entry moves the index on, a PARENT one does not."""
    runs = [w.Run(0x1000, 2, 6), w.Run(0x3000, 1, 4), w.Run(0x4000, 5, 1), w.Run(0x9000, 1, 6)]
    found = extents(tmp_path, runs, [w.vma_body(0x1000, 0x8000), w.vma_body(0x8000, 0xA000)])
    assert list(found) == [(0x1000, 2, 0, 0, 1), (0x9000, 1, 3, 1, 1)]


def test_entry_over_several_areas_is_split(tmp_path: Path) -> None:
    vmas = [
        w.vma_body(0x1000, 0x2000),
        w.vma_body(0x2000, 0x5000, madv=1 << 18),
        w.guard(0x3000, 0x4000),
        w.vma_body(0x5000, 0x9000, madv=1 << 10),
    ]
    # CRIU writes the guards last.
    found = extents(
        tmp_path, [w.Run(0x1000, 6, 6), w.Run(0x8000, 1, 6)], [vmas[0], vmas[1], vmas[3], vmas[2]]
    )
    assert list(found) == [
        (0x1000, 1, 0, 0, 1),
        (0x2000, 3, 1, 1, 1),
        (0x5000, 2, 4, 2, 1),
        (0x8000, 1, 6, 2, 1),
    ]
    mm = read_mm(tmp_path, 7)
    assert [mm.vmas[index].madv for index in found.vma_indices] == [
        MadvBits(0),
        MadvBits.WIPEONFORK,
        MadvBits.DONTFORK,
        MadvBits.DONTFORK,
    ]


def test_nothing_lazy(tmp_path: Path) -> None:
    found = extents(tmp_path, [w.Run(0x1000, 6, 4)], [])
    assert (len(found), found.total_pages, list(found)) == (0, 0, [])


@pytest.mark.parametrize(
    ("bad", "address"),
    [
        (w.Run(0x0000, 1, 2), 0x0000),  # before all areas
        (w.Run(0x1000, 2, 2), 0x2000),  # over the end of the first into the gap
        (w.Run(0x3000, 1, 2), 0x3000),  # in the gap
        (w.Run(0x3000, 2, 2), 0x3000),  # from the gap into the second
        (w.Run(0x5000, 2, 2), 0x6000),  # over the end of the last
        (w.Run(0x9000, 1, 2), 0x9000),  # behind all areas
        (w.Run(0x1000, 1 << 40, 2), 0x2000),
    ],
)
def test_entry_outside_the_areas(tmp_path: Path, bad: w.Run, address: int) -> None:
    runs = [bad] if bad.vaddr == 0 else [w.Run(0, 1, 4), bad]
    w.write_dump(tmp_path, 7, [], [w.vma_body(0x1000, 0x2000), w.vma_body(0x4000, 0x6000)])
    (tmp_path / "pagemap-7.img").write_bytes(w.pagemap(runs))
    pagemap, mm = read_pagemap(tmp_path, 7), read_mm(tmp_path, 7)
    with pytest.raises(ImageError, match=f"inside the VMAs of mm-7.img, {address:#x} is in none") as caught:
        lazy_extents(pagemap, mm)
    assert caught.value.path == str(tmp_path / "pagemap-7.img")
    head_end = 8 + 4 + 2
    assert caught.value.offset == head_end + sum(4 + len(run.body("new")) for run in runs[:-1])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Make areas and runs inside them, in pages; runs may span areas that touch."""
    areas: list[tuple[int, int]] = []
    page = 1
    for gap, length in draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=6)
    ):
        areas.append((page + gap, page + gap + length))
        page += gap + length
    inside = {p for start, end in areas for p in range(start, end)}
    runs: list[tuple[int, int, int]] = []
    page = 1
    for gap, length, flags in draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.sampled_from([1, 2, 4, 6])), max_size=12)
    ):
        start = page + gap
        if inside.issuperset(range(start, start + length)):
            runs.append((start, length, flags))
            page = start + length
        else:
            page = start + 1
    return areas, runs


@settings(deadline=None)
@given(layout=layouts())
def test_against_a_model_of_single_pages(
    layout: tuple[list[tuple[int, int]], list[tuple[int, int, int]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    areas, runs = layout
    found = extents(
        tmp_path_factory.mktemp("images"),
        [w.Run(start * PAGE, length, flags) for start, length, flags in runs],
        [w.vma_body(start * PAGE, end * PAGE) for start, end in areas],
    )
    expected = {}
    index = 0
    for start, length, flags in runs:
        for page in range(start, start + length):
            if flags & 2:
                area = next(i for i, (low, high) in enumerate(areas) if low <= page < high)
                expected[page] = (index if flags & 4 else None, area)
            index += bool(flags & 4)
    got = {}
    previous_end = 0
    for start, length, first, area, present in found:
        assert start >= previous_end
        previous_end = start + length * PAGE
        assert length > 0
        for i in range(length):
            got[start // PAGE + i] = (first + i if present else None, area)
        if not present:
            assert first == NO_PAGE_INDEX
    assert got == expected
    assert found.total_pages == len(expected)
