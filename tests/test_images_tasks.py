"""Inventory, process tree, task states and memory maps."""

from __future__ import annotations

from pathlib import Path

import pytest

import images_writer as w
from criupy.errors import ImageError
from criupy.images import (
    MadvBits,
    TaskState,
    VmaStatus,
    is_zombie,
    read_inventory,
    read_mm,
    read_pstree,
    read_task_state,
)


def test_inventory(tmp_path: Path) -> None:
    (tmp_path / "inventory.img").write_bytes(w.inventory())
    inventory = read_inventory(tmp_path)
    assert (inventory.version, inventory.run_id) == (2, "run")
    (tmp_path / "inventory.img").write_bytes(w.inventory(run_id=None))
    assert read_inventory(tmp_path).run_id is None
    (tmp_path / "inventory.img").write_bytes(w.inventory(run_id=b"\xffid"))
    assert read_inventory(tmp_path).run_id == "\\xffid"


def test_inventory_of_a_pre_dump(tmp_path: Path) -> None:
    (tmp_path / "inventory.img").write_bytes(w.inventory())
    assert not read_inventory(tmp_path).is_pre_dump
    (tmp_path / "inventory.img").write_bytes(w.inventory(pre_dump=True))
    assert read_inventory(tmp_path).is_pre_dump


@pytest.mark.parametrize("version", [0, 1, 3])
def test_inventory_of_another_version(tmp_path: Path, version: int) -> None:
    (tmp_path / "inventory.img").write_bytes(w.inventory(version))
    with pytest.raises(ImageError, match=f"expected image version 2, found {version}"):
        read_inventory(tmp_path)


def test_pstree(tmp_path: Path) -> None:
    bodies = [
        w.number(1, 7) + w.number(2, 0) + w.number(3, 7) + w.number(4, 7) + w.number(5, 7) + w.number(5, 70),
        # The same threads as one packed field, which a reader has to accept too.
        w.number(1, 8) + w.number(2, 7) + w.number(3, 7) + w.number(4, 6) + w.nested(5, b"\x08\x50"),
    ]
    (tmp_path / "pstree.img").write_bytes(w.image("pstree", bodies))
    first, second = read_pstree(tmp_path)
    assert (first.pid, first.ppid, first.pgid, first.sid, first.threads) == (7, 0, 7, 7, (7, 70))
    assert (second.pid, second.ppid, second.pgid, second.sid, second.threads) == (8, 7, 7, 6, (8, 80))


def test_pstree_refusals(tmp_path: Path) -> None:
    path = tmp_path / "pstree.img"
    good = w.pstree([(7, 0)])
    ids = b"".join(w.number(field, 1) for field in (2, 3, 4))
    for more, expectation in [
        (w.number(1, 0) + ids, "expected a pid from 1"),
        (w.number(1, 1 << 23) + ids, "expected a pid from 1"),
        (w.number(1, 7) + ids, "expected every pid once, 7 is here again"),
        (ids, "expected the field pid"),
        (w.number(1, 8), "expected the field ppid"),
    ]:
        path.write_bytes(good + w.record(more))
        with pytest.raises(ImageError, match=expectation) as caught:
            read_pstree(tmp_path)
        assert caught.value.offset == len(good)
    path.write_bytes(w.image("pstree", []))
    with pytest.raises(ImageError, match="at least one process"):
        read_pstree(tmp_path)


@pytest.mark.parametrize("state", list(TaskState))
def test_task_state(tmp_path: Path, state: TaskState) -> None:
    (tmp_path / "core-7.img").write_bytes(w.core(state))
    assert read_task_state(tmp_path, 7) is state
    assert is_zombie(tmp_path, 7) is (state is TaskState.DEAD)


def test_task_state_refusals(tmp_path: Path) -> None:
    path = tmp_path / "core-7.img"
    path.write_bytes(w.core(6))
    with pytest.raises(ImageError, match="alive, dead or stopped, found 6"):
        read_task_state(tmp_path, 7)
    path.write_bytes(w.image("core", [w.number(1, 1) + w.nested(5, b"")]))
    with pytest.raises(ImageError, match="a thread has none"):
        read_task_state(tmp_path, 7)


def test_mm(tmp_path: Path) -> None:
    vmas = [
        w.vma_body(0x1000, 0x3000, madv=1 << 18 | 1 << 10 | 1 << 14),
        w.vma_body(0x3000, 0x4000, status=0x41 | 1 << 29, prot=1, flags=2),
        w.vma_body(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, status=4),
        w.guard(0x2000, 0x3000),
        w.guard(0x1000, 0x2000),
    ]
    (tmp_path / "mm-7.img").write_bytes(w.mm(vmas))
    mm = read_mm(tmp_path, 7)
    assert mm.path == tmp_path / "mm-7.img"
    first, second, third = mm.vmas
    assert (first.start, first.end, first.prot, first.flags) == (0x1000, 0x3000, 3, 0x22)
    assert first.status == VmaStatus.REGULAR | VmaStatus.ANON_PRIVATE
    assert first.madv & MadvBits.WIPEONFORK
    assert first.madv & MadvBits.DONTFORK
    assert first.madv.value == 1 << 18 | 1 << 10 | 1 << 14
    assert second.status.value == 0x41 | 1 << 29
    assert second.madv == MadvBits(0)
    assert third.status is VmaStatus.VSYSCALL


def test_mm_without_areas(tmp_path: Path) -> None:
    (tmp_path / "mm-7.img").write_bytes(w.mm([]))
    assert read_mm(tmp_path, 7).vmas == ()


@pytest.mark.parametrize(
    ("vma", "expectation"),
    [
        (w.vma_body(0x2800, 0x4000), "VMA 1: expected page-aligned borders, found 0x2800-0x4000"),
        (w.vma_body(0x3000, 0x3FFF), "VMA 1: expected page-aligned borders"),
        (w.vma_body(0x3000, 0x3000), "VMA 1: expected start below end"),
        (w.vma_body(0x4000, 0x3000), "VMA 1: expected start below end"),
        (
            w.vma_body(0x1000, 0x3000),
            "ascending areas without overlap, 0x1000 is below 0x2000",
        ),
        (w.number(1, 0x3000) + w.number(5, 0) + w.number(6, 0) + w.number(7, 1), "expected the field end"),
    ],
)
def test_mm_refusals(tmp_path: Path, vma: bytes, expectation: str) -> None:
    (tmp_path / "mm-7.img").write_bytes(w.mm([w.vma_body(0x1000, 0x2000), vma]))
    with pytest.raises(ImageError, match=expectation) as caught:
        read_mm(tmp_path, 7)
    assert caught.value.offset == 8
