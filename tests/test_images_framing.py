"""Heads, sizes and truncation, the same for every image."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import images_writer as w
from criupy.errors import ImageError
from criupy.images import (
    frame_size,
    read_inventory,
    read_mm,
    read_pagemap,
    read_pagemap_style,
    read_pstree,
    read_task_state,
)

Reader = Callable[[Path], object]

#: File, its content, its reader, and whether a cut between two records goes unnoticed there.
IMAGES: list[tuple[str, bytes, Reader, bool]] = [
    ("inventory.img", w.inventory(), read_inventory, False),
    ("pstree.img", w.pstree([(7, 0), (8, 7)]), read_pstree, True),
    ("core-7.img", w.core(), lambda d: read_task_state(d, 7), False),
    ("mm-7.img", w.mm([w.vma_body(0x1000, 0x3000)]), lambda d: read_mm(d, 7), False),
    ("pagemap-7.img", w.pagemap([w.Run(0x1000, 1), w.Run(0x3000, 2)]), lambda d: read_pagemap(d, 7), True),
]
each_image = pytest.mark.parametrize(
    ("name", "content", "reader", "borders"), IMAGES, ids=[name for name, *_ in IMAGES]
)


def record_starts(content: bytes, start: int) -> list[int]:
    starts = [start]
    while starts[-1] < len(content):
        starts.append(starts[-1] + 4 + struct.unpack_from("<I", content, starts[-1])[0])
    return starts


@each_image
def test_whole_image_is_read(
    tmp_path: Path, name: str, content: bytes, reader: Reader, borders: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    assert reader(tmp_path)
    assert reader(Path(os.path.relpath(tmp_path)))


@each_image
def test_every_truncation_is_noticed(
    tmp_path: Path, name: str, content: bytes, reader: Reader, borders: bool
) -> None:
    path = tmp_path / name
    magics = 4 if name == "inventory.img" else 8
    complete = set(record_starts(content, magics)[1:]) if borders else set()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length in complete:
            # A cut right after a record is a shorter image.
            reader(tmp_path)
            continue
        with pytest.raises(ImageError) as caught:
            reader(tmp_path)
        assert caught.value.path == str(path)
        assert caught.value.offset is not None
        assert caught.value.offset <= length


@each_image
def test_every_flipped_magic_bit_is_noticed(
    tmp_path: Path, name: str, content: bytes, reader: Reader, borders: bool
) -> None:
    path = tmp_path / name
    for bit in range(32 if name == "inventory.img" else 64):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ImageError, match=r"expected the magic|expected a .* image") as caught:
            reader(tmp_path)
        assert caught.value.offset in (bit // 32 * 4, 0)


@each_image
def test_absurd_size_is_refused_without_reading(
    tmp_path: Path, name: str, content: bytes, reader: Reader, borders: bool
) -> None:
    start = 4 if name == "inventory.img" else 8
    damaged = content[:start] + b"\xff\xff\xff\xff" + content[start + 4 :]
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ImageError, match=r"at most .* its size says 4294967295") as caught:
        reader(tmp_path)
    assert caught.value.offset == start


@each_image
def test_missing_file(tmp_path: Path, name: str, content: bytes, reader: Reader, borders: bool) -> None:
    with pytest.raises(ImageError, match=r"No such file.*directory that criu dump wrote to") as caught:
        reader(tmp_path)
    assert caught.value.path == str(tmp_path / name)
    with pytest.raises(ImageError, match="No such file"):
        reader(tmp_path / "nowhere")


@each_image
def test_no_regular_file(tmp_path: Path, name: str, content: bytes, reader: Reader, borders: bool) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ImageError, match="a directory"):
        reader(tmp_path)
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ImageError, match="no regular file"):
        reader(tmp_path)


@each_image
def test_not_an_image_at_all(
    tmp_path: Path, name: str, content: bytes, reader: Reader, borders: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="the file is empty"):
        reader(tmp_path)
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ImageError, match="gzip-compressed: unpack it"):
        reader(tmp_path)
    path.write_bytes(struct.pack("<II", 0x55105940, 0x57093306) + content[8:])
    with pytest.raises(ImageError, match="service images"):
        reader(tmp_path)


@each_image
def test_damaged_message(tmp_path: Path, name: str, content: bytes, reader: Reader, borders: bool) -> None:
    start = 4 if name == "inventory.img" else 8
    # A tag with wire type 7, which does not exist.
    (tmp_path / name).write_bytes(content[:start] + w.record(b"\x0f"))
    with pytest.raises(ImageError, match="does not parse") as caught:
        reader(tmp_path)
    assert caught.value.offset == start


@pytest.mark.parametrize("name", ["inventory.img", "core-7.img", "mm-7.img"])
def test_single_message_images_end_after_it(tmp_path: Path, name: str) -> None:
    content, reader = next((c, r) for n, c, r, _ in IMAGES if n == name)
    (tmp_path / name).write_bytes(content + w.record(b""))
    with pytest.raises(ImageError, match="more follows") as caught:
        reader(tmp_path)
    assert caught.value.offset == len(content)


def test_image_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "mm-7.img").write_bytes(w.core())
    with pytest.raises(ImageError, match="the start of a core image"):
        read_mm(tmp_path, 7)


@pytest.mark.parametrize("pid", [0, -1, 1 << 23])
def test_pid_that_nobody_has(tmp_path: Path, pid: int) -> None:
    for reader in (read_mm, read_pagemap, read_pagemap_style, read_task_state):
        with pytest.raises(ValueError, match="expected 1 to 4194304"):
            reader(tmp_path, pid)


def test_frame_size(tmp_path: Path) -> None:
    w.write_dump(tmp_path, 7, [w.Run(0x1000, 1)], [], "old")
    assert frame_size(tmp_path) == 24
    w.write_dump(tmp_path, 7, [w.Run(0x1000, 1)], [], "new")
    assert frame_size(tmp_path) == 32
    w.write_dump(tmp_path, 7, [], [])
    assert frame_size(tmp_path) is None


def test_frame_size_skips_zombies_and_empty_tasks(tmp_path: Path) -> None:
    w.write_dump(tmp_path, 9, [w.Run(0x1000, 1)], [], "old")
    (tmp_path / "pstree.img").write_bytes(w.pstree([(7, 0), (8, 7), (9, 7)]))
    (tmp_path / "core-7.img").write_bytes(w.core(state=2))
    (tmp_path / "core-8.img").write_bytes(w.core(state=3))
    (tmp_path / "pagemap-8.img").write_bytes(w.pagemap([]))
    assert frame_size(tmp_path) == 24
    (tmp_path / "pagemap-8.img").unlink()
    with pytest.raises(ImageError, match="No such file"):
        frame_size(tmp_path)


def test_frame_size_wants_one_dumper(tmp_path: Path) -> None:
    w.write_dump(tmp_path, 8, [w.Run(0x1000, 1)], [], "old")
    w.write_dump(tmp_path, 7, [w.Run(0x1000, 1)], [], "new")
    (tmp_path / "pstree.img").write_bytes(w.pstree([(7, 0), (8, 7)]))
    with pytest.raises(ImageError, match=r"new page counts as in pagemap-7.img, found old ones"):
        frame_size(tmp_path)
