"""Statistics of dumps and restores."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

import images_writer as w
from criupy.errors import ImageError
from criupy.images import DumpStats, RestoreStats, read_dump_stats, read_restore_stats

DUMP = {field: 1000 + field for field in range(1, 15)}
RESTORE = {field: 2000 + field for field in range(1, 6)}

Reader = Callable[[Path], object]
each_kind = pytest.mark.parametrize(
    ("name", "content", "reader"),
    [
        ("stats-dump", w.dump_stats(DUMP), read_dump_stats),
        ("stats-restore", w.restore_stats(RESTORE), read_restore_stats),
    ],
    ids=["dump", "restore"],
)


def test_dump_statistics(tmp_path: Path) -> None:
    (tmp_path / "stats-dump").write_bytes(w.dump_stats(DUMP))
    assert read_dump_stats(tmp_path) == DumpStats(
        freezing_us=1001,
        frozen_us=1002,
        memdump_us=1003,
        memwrite_us=1004,
        irmap_resolve_us=1008,
        pages_scanned=1005,
        pages_skipped_parent=1006,
        pages_written=1007,
        pages_lazy=1009,
        page_pipes=1010,
        page_pipe_bufs=1011,
        shpages_scanned=1012,
        shpages_skipped_parent=1013,
        shpages_written=1014,
    )


def test_restore_statistics(tmp_path: Path) -> None:
    (tmp_path / "stats-restore").write_bytes(w.restore_stats(RESTORE))
    assert read_restore_stats(str(tmp_path)) == RestoreStats(
        forking_us=2003,
        restore_us=2004,
        pages_compared=2001,
        pages_skipped_cow=2002,
        pages_restored=2005,
    )


def test_what_older_criu_did_not_count(tmp_path: Path) -> None:
    (tmp_path / "stats-dump").write_bytes(w.dump_stats(dict.fromkeys(range(1, 8), 0)))
    found = read_dump_stats(tmp_path)
    assert found.pages_written == 0
    assert {
        found.irmap_resolve_us,
        found.pages_lazy,
        found.page_pipes,
        found.page_pipe_bufs,
        found.shpages_scanned,
        found.shpages_skipped_parent,
        found.shpages_written,
    } == {None}
    (tmp_path / "stats-restore").write_bytes(w.restore_stats(dict.fromkeys(range(1, 5), 0)))
    assert read_restore_stats(tmp_path).pages_restored is None


@pytest.mark.parametrize("field", range(1, 8))
def test_dump_statistics_that_lack_something(tmp_path: Path, field: int) -> None:
    path = tmp_path / "stats-dump"
    path.write_bytes(w.dump_stats({number: value for number, value in DUMP.items() if number != field}))
    with pytest.raises(ImageError, match=r"expected the field \w+ in every statistics message") as caught:
        read_dump_stats(tmp_path)
    assert (caught.value.path, caught.value.offset) == (str(path), 8)


@pytest.mark.parametrize("field", range(1, 5))
def test_restore_statistics_that_lack_something(tmp_path: Path, field: int) -> None:
    path = tmp_path / "stats-restore"
    path.write_bytes(w.restore_stats({number: value for number, value in RESTORE.items() if number != field}))
    with pytest.raises(ImageError, match=r"expected the field \w+ in every statistics message") as caught:
        read_restore_stats(tmp_path)
    assert (caught.value.path, caught.value.offset) == (str(path), 8)


def test_the_other_kind_of_statistics(tmp_path: Path) -> None:
    (tmp_path / "stats-dump").write_bytes(w.restore_stats(RESTORE))
    (tmp_path / "stats-restore").write_bytes(w.dump_stats(DUMP))
    with pytest.raises(ImageError, match="expected statistics of a dump, the image has none") as caught:
        read_dump_stats(tmp_path)
    assert caught.value.offset == 8
    with pytest.raises(ImageError, match="expected statistics of a restore, the image has none"):
        read_restore_stats(tmp_path)


@each_kind
def test_every_truncation_is_noticed(tmp_path: Path, name: str, content: bytes, reader: Reader) -> None:
    path = tmp_path / name
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError) as caught:
            reader(tmp_path)
        assert caught.value.path == str(path)
        assert caught.value.offset is not None
        assert caught.value.offset <= length


@each_kind
def test_every_flipped_magic_bit_is_noticed(
    tmp_path: Path, name: str, content: bytes, reader: Reader
) -> None:
    for bit in range(64):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ImageError, match="expected the magic") as caught:
            reader(tmp_path)
        assert caught.value.offset == bit // 32 * 4


@each_kind
def test_what_is_no_statistics(tmp_path: Path, name: str, content: bytes, reader: Reader) -> None:
    path = tmp_path / name
    with pytest.raises(ImageError, match=r"No such file.*criu had as its work directory"):
        reader(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="the file is empty"):
        reader(tmp_path)
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ImageError, match="gzip-compressed"):
        reader(tmp_path)
    path.write_bytes(w.core())
    with pytest.raises(ImageError, match="found 0x54564319: this is no service image") as caught:
        reader(tmp_path)
    assert caught.value.offset == 0
    path.write_bytes(content + w.record(b""))
    with pytest.raises(ImageError, match="more follows") as caught:
        reader(tmp_path)
    assert caught.value.offset == len(content)
    path.write_bytes(content[:8] + w.record(b"\x0f"))
    with pytest.raises(ImageError, match="does not parse") as caught:
        reader(tmp_path)
    assert caught.value.offset == 8
    path.unlink()
    path.mkdir()
    with pytest.raises(ImageError, match="this is a directory"):
        reader(tmp_path)
