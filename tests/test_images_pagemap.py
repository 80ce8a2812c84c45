"""Pagemaps: round trips, both styles, and everything that may be wrong with an entry."""

from __future__ import annotations

import io
import os
import tracemalloc
from array import array
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import images_writer as w
from criupy.errors import ImageError
from criupy.images import (
    Pagemap,
    PagemapStyle,
    _pagemap,
    _pagemap_writer,
    check_pages,
    pagemap_path,
    pages_path,
    present_pages,
    read_pagemap,
    shared_pagemap_path,
    write_pagemap,
)

PAGE = 4096
BASE = 0x7F0000000000


def write(directory: Path, content: bytes) -> Path:
    (directory / "pagemap-7.img").write_bytes(content)
    return directory


def record_offset(bodies: list[bytes], index: int) -> int:
    """Tell where record ``index`` starts; the head is record 0."""
    return 8 + sum(4 + len(body) for body in bodies[:index])


@st.composite
def runs(draw: st.DrawFn) -> list[w.Run]:
    out = []
    address = draw(st.integers(0, 1 << 40)) * PAGE
    for gap, count, flags in draw(
        st.lists(
            st.tuples(
                st.sampled_from([0, 1, 5, 1 << 20]),
                st.integers(1, 1 << 20),
                st.sampled_from([1, 2, 4, 6]),
            ),
            max_size=40,
        )
    ):
        address += gap * PAGE
        out.append(w.Run(address, count, flags))
        address += count * PAGE
    return out


@settings(deadline=None)
@given(runs=runs(), style=st.sampled_from(["old", "new"]), batch=st.integers(1, 5))
def test_round_trip(
    runs: list[w.Run], style: str, batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = write(tmp_path_factory.mktemp("images"), w.pagemap(runs, style, pages_id=3))
    with mock.patch.object(_pagemap, "_BATCH", batch):
        pagemap = read_pagemap(directory, 7)
    assert pagemap.path == directory / "pagemap-7.img"
    assert pagemap.pages_id == 3
    assert len(pagemap) == len(runs)
    assert (pagemap.starts.typecode, pagemap.nr_pages.typecode, pagemap.flags.typecode) == ("Q", "Q", "B")
    assert list(pagemap.starts) == [run.vaddr for run in runs]
    assert list(pagemap.nr_pages) == [run.nr_pages for run in runs]
    assert list(pagemap.flags) == [run.flags for run in runs]
    assert pagemap.style is (PagemapStyle(style) if runs else None)
    assert [_pagemap.entry_offset(pagemap, i) for i in range(len(runs))] == [
        record_offset([w.number(1, 3), *(run.body(style) for run in runs)], i + 1) for i in range(len(runs))
    ]


def test_quick_way_takes_what_criu_writes() -> None:
    """The slow way is right too, so only this notices when nothing is quick any more."""
    for style in PagemapStyle:
        bodies = [
            w.Run(BASE + i * 2 * PAGE, 1, flags).body(style.value) for i, flags in enumerate((1, 2, 4, 6))
        ]
        columns = _pagemap._decode_quickly(bodies, None, BASE)
        assert columns is not None
        assert columns.style is style


SPOILERS: list[tuple[str, bytes, str]] = [
    ("no address", w.number(2, 0) + w.number(4, 4) + w.number(5, 1), "expected the field vaddr"),
    (
        "no old count",
        w.number(1, BASE) + w.number(4, 4) + w.number(5, 1),
        "expected the field compat_nr_pages",
    ),
    ("unaligned", w.Run(BASE + 1, 1).body("new"), "page-aligned address, found 0x7f0000000001"),
    ("zero", w.Run(BASE, 0).body("new"), "the count is zero"),
    ("beyond", w.Run((1 << 64) - PAGE, 2).body("new"), "within 64-bit addresses"),
    ("far beyond", w.Run(BASE, (1 << 64) - 1).body("new"), "within 64-bit addresses"),
    ("overlap", w.Run(0x1000, 1).body("new"), "without overlap, 0x1000 is below 0x2000"),
    ("both counts", w.Run(BASE, 5).body("old") + w.number(5, 5), "found 5 in the old field and 5 in the new"),
    (
        "another style",
        w.Run(BASE, 5).body("old"),
        "as in the entries before, it is in the old",
    ),
    ("no flag", w.Run(BASE, 1, flags=0).body("new"), "found 0x0"),
    ("unknown flag", w.Run(BASE, 1, flags=12).body("new"), "found 0xc: damaged, or written by a newer CRIU"),
    ("lazy in parent", w.Run(BASE, 1, flags=3).body("new"), "found 0x3"),
    ("huge flags", w.Run(BASE, 1, flags=1 << 31).body("new"), "found 0x80000000"),
    ("parent twice", w.Run(BASE, 1, flags=4, in_parent=True).body("new"), "found 0x5"),
    (
        "compressed",
        w.Run(BASE, 1).body("new") + w.number(7, 5) + w.number(6, 300),
        "the unknown field 6, 7: written by a newer CRIU or with compressed pages",
    ),
    ("unknown bytes", w.Run(BASE, 1).body("new") + w.nested(9, b"x" * 200), "unknown field 9"),
    ("known number, other type", w.nested(1, b"") + w.Run(BASE, 1).body("new"), "unknown field 1"),
    ("too large", b"\x00" * 70000, "a message of at most 65536 bytes, its size says 70000"),
]


@pytest.mark.parametrize(("body", "expectation"), [s[1:] for s in SPOILERS], ids=[s[0] for s in SPOILERS])
@pytest.mark.parametrize("before", [1, 3, 4])
@pytest.mark.parametrize("after", [0, 1, 6])
def test_refusal_names_the_entry(
    tmp_path: Path, body: bytes, expectation: str, before: int, after: int
) -> None:
    """Wherever a bad entry lies in its batch, the offset is its own."""
    good = [w.Run((1 + i) * PAGE, 1).body("new") for i in range(before)]
    expectation = expectation.replace("below 0x2000", f"below {(1 + before) * PAGE:#x}")
    rest = [w.Run(BASE + (9 + i) * PAGE, 1).body("new") for i in range(after)]
    bodies = [w.number(1, 1), *good, body, *rest]
    write(tmp_path, w.image("pagemap", bodies))
    with mock.patch.object(_pagemap, "_BATCH", 4), pytest.raises(ImageError, match=expectation) as caught:
        read_pagemap(tmp_path, 7)
    assert caught.value.offset == record_offset(bodies, before + 1)


@settings(deadline=None, max_examples=400)
@given(
    bodies=st.lists(
        st.lists(
            st.tuples(
                st.integers(1, 6), st.sampled_from([0, 1, 2, 4, 6, PAGE, 5 * PAGE, BASE, (1 << 64) - 1])
            ),
            max_size=7,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_quick_and_careful_ways_agree(
    bodies: list[list[tuple[int, int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the quick way accepts, the careful one accepts as the same."""
    parts = [b"".join(w.number(field, value) for field, value in body) for body in bodies]
    quick = _pagemap._decode_quickly(parts, None, 0) if all(parts) else None
    directory = write(tmp_path_factory.mktemp("images"), w.image("pagemap", [w.number(1, 1), *parts]))
    with mock.patch.object(_pagemap, "_decode_quickly", return_value=None):
        if quick is not None:
            pagemap = read_pagemap(directory, 7)
            assert (list(pagemap.starts), list(pagemap.nr_pages), list(pagemap.flags), pagemap.style) == (
                quick.starts,
                quick.nr_pages,
                quick.flags,
                quick.style,
            )


@settings(deadline=None)
@given(data=st.binary(max_size=60), cut=st.booleans())
def test_any_bytes_give_a_pagemap_or_an_image_error(
    data: bytes, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = w.image("pagemap", [w.number(1, 1)]) + (data if cut else w.record(data))
    directory = write(tmp_path_factory.mktemp("images"), content)
    error = None
    try:
        read_pagemap(directory, 7)
    except ImageError as caught:
        error = caught
    if error is not None:
        assert error.offset is not None
        assert 14 <= error.offset <= len(content)
        assert "\n" not in str(error)


def test_old_images_without_flags(tmp_path: Path) -> None:
    content = w.pagemap(
        [
            w.Run(0x1000, 1, flags=None),
            w.Run(0x2000, 1, flags=None, in_parent=False),
            w.Run(0x3000, 1, flags=None, in_parent=True),
            w.Run(0x4000, 1, flags=1, in_parent=True),
            w.Run(0x5000, 1, flags=6),
        ],
        "old",
    )
    assert list(read_pagemap(write(tmp_path, content), 7).flags) == [4, 4, 1, 1, 6]


def test_unusual_but_valid_encoding(tmp_path: Path) -> None:
    """Fields in another order and padded varints are still protobuf."""
    shuffled = w.number(5, 2) + w.number(4, 4) + w.number(2, 0) + w.number(1, 0x1000)
    padded = w.number(1, 0x3000) + b"\x10\x80\x00" + w.number(4, 4) + b"\x28\x81\x00"
    pagemap = read_pagemap(write(tmp_path, w.image("pagemap", [w.number(1, 1), shuffled, padded])), 7)
    assert (list(pagemap.starts), list(pagemap.nr_pages)) == ([0x1000, 0x3000], [2, 1])


def test_last_page_of_the_address_space(tmp_path: Path) -> None:
    pagemap = read_pagemap(write(tmp_path, w.pagemap([w.Run((1 << 64) - PAGE, 1)])), 7)
    assert pagemap.starts[0] == (1 << 64) - PAGE


@pytest.mark.parametrize("flags", [0, 3, 5, 7, 8])
def test_flags_in_the_old_style_are_checked_too(tmp_path: Path, flags: int) -> None:
    with pytest.raises(ImageError, match=f"found {flags:#x}"):
        read_pagemap(write(tmp_path, w.pagemap([w.Run(0x1000, 1, flags)], "old")), 7)


@pytest.mark.parametrize(
    ("head", "expectation"),
    [
        (b"", "expected a head with pages_id"),
        (w.number(2, 1), "pagemap head as CRIU .* unknown field 2"),
        (w.Run(0x1000, 1).body("new"), "unknown field 2, 4, 5"),
    ],
)
def test_head_refusals(tmp_path: Path, head: bytes, expectation: str) -> None:
    with pytest.raises(ImageError, match=expectation) as caught:
        read_pagemap(write(tmp_path, w.image("pagemap", [head])), 7)
    assert caught.value.offset == 8


def test_pages_image(tmp_path: Path) -> None:
    write(tmp_path, w.pagemap([w.Run(0x1000, 2, 6), w.Run(0x9000, 8, 2), w.Run(0x20000, 1, 4)], pages_id=5))
    pagemap = read_pagemap(tmp_path, 7)
    assert present_pages(pagemap) == 3
    path = pages_path(tmp_path, 5)
    assert path == tmp_path / "pages-5.img"
    with pytest.raises(ImageError, match=r"pages-5.img: expected a readable pages image: No such file"):
        check_pages(tmp_path, pagemap)
    path.write_bytes(bytes(3 * PAGE - 1))
    with pytest.raises(ImageError, match=r"byte 12287: expected 12288 bytes as pagemap-7.img says"):
        check_pages(tmp_path, pagemap)
    path.write_bytes(bytes(3 * PAGE))
    assert check_pages(tmp_path, pagemap) == path
    path.unlink()
    path.mkdir()
    with pytest.raises(ImageError, match="no regular file"):
        check_pages(tmp_path, pagemap)


@pytest.mark.slow
def test_large_pagemap_needs_little_memory(tmp_path: Path) -> None:
    """Beyond the arrays there are only the objects of one batch."""
    count = 60_000
    write(tmp_path, w.pagemap(w.Run(BASE + i * 2 * PAGE, 1, 2) for i in range(count)))
    read_pagemap(tmp_path, 7)
    tracemalloc.start()
    try:
        pagemap = read_pagemap(tmp_path, 7)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(pagemap) == count
    # Arrays grow by an eighth at a time, and the old block lives while the new one is filled.
    assert peak < 17 * count * 2.5 + 2_000_000


# ---- writing -------------------------------------------------------------------------------------


def columns(runs: list[w.Run]) -> tuple[array[int], array[int], array[int]]:
    return (
        array("Q", [run.vaddr or 0 for run in runs]),
        array("Q", [run.nr_pages for run in runs]),
        array("B", [run.flags or 0 for run in runs]),
    )


@given(
    entries=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 2000), st.integers(0, (1 << 52) - (1 << 40) - 1)),
            st.one_of(st.integers(1, 300), st.integers(1, (1 << 32) - 1)),
            st.sampled_from([1, 2, 4, 6]),
        ),
        max_size=50,
    ),
    pages_id=st.integers(0, (1 << 32) - 1),
    style=st.sampled_from(["old", "new"]),
    batch=st.integers(1, 5),
)
def test_images_are_written_as_by_an_independent_writer(
    entries: list[tuple[int, int, int]], pages_id: int, style: str, batch: int
) -> None:
    runs = [w.Run(page * PAGE, count, flags) for page, count, flags in entries]
    file = io.BytesIO()
    with (
        mock.patch.object(_pagemap_writer, "_BATCH", batch),
        mock.patch.object(_pagemap_writer, "_MAX_RESTS", batch),
    ):
        write_pagemap(file, pages_id, *columns(runs), PagemapStyle(style))
    assert file.getvalue() == w.pagemap(runs, style, pages_id)


@given(runs=runs(), style=st.sampled_from(PagemapStyle))
def test_what_is_written_is_read(
    runs: list[w.Run], style: PagemapStyle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("images")
    path = pagemap_path(directory, 7)
    written = Pagemap(path, 3, *columns(runs), style if runs else None)
    with path.open("wb") as file:
        write_pagemap(file, 3, written.starts, written.nr_pages, written.flags, style)
    assert read_pagemap(directory, 7) == written


def test_a_count_that_the_old_style_has_no_room_for() -> None:
    runs = columns([w.Run(BASE, 1 << 32, 2)])
    write_pagemap(io.BytesIO(), 1, *runs, PagemapStyle.NEW)
    with pytest.raises(ValueError, match="4294967296"):
        write_pagemap(io.BytesIO(), 1, *runs, PagemapStyle.OLD)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [1, 1 << 40])
def test_writing_a_large_pagemap_needs_little_memory(counts: int) -> None:
    """Only one batch, and parts of so many entries, whether or not they are alike."""
    nr = 150_000
    starts = array("Q", range(BASE, BASE + nr * PAGE, PAGE))
    nr_pages = array("Q", [1 + i % counts for i in range(nr)])
    flags = array("B", [2]) * nr
    with Path(os.devnull).open("wb") as file:
        tracemalloc.start()
        try:
            write_pagemap(file, 1, starts, nr_pages, flags, PagemapStyle.NEW)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < (2_000_000 if counts == 1 else 18_000_000)


def test_names(tmp_path: Path) -> None:
    assert pagemap_path(tmp_path, 7) == tmp_path / "pagemap-7.img"
    assert shared_pagemap_path(tmp_path, 7) == tmp_path / "pagemap-shmem-7.img"
