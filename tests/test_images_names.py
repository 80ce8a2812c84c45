"""The process tree with names, states and threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import images_writer as w
from criupy.errors import ImageError
from criupy.images import Task, TaskState, Thread, read_pstree, read_tasks


def entry(pid: int, ppid: int, *threads: int) -> bytes:
    body = w.number(1, pid) + w.number(2, ppid) + w.number(3, 7) + w.number(4, 6)
    return body + b"".join(w.number(5, tid) for tid in threads or (pid,))


def write_tree(directory: Path, *entries: bytes) -> None:
    (directory / "pstree.img").write_bytes(w.image("pstree", entries))


def test_tree(tmp_path: Path) -> None:
    write_tree(tmp_path, entry(7, 0), entry(9, 7, 9, 90, 91), entry(8, 9), entry(10, 7))
    (tmp_path / "core-7.img").write_bytes(w.core(name=b"init"))
    (tmp_path / "core-9.img").write_bytes(w.core(name=b"server", state=3))
    (tmp_path / "core-90.img").write_bytes(w.thread_core(b"worker"))
    (tmp_path / "core-91.img").write_bytes(w.thread_core(None))
    (tmp_path / "core-8.img").write_bytes(w.core(name=b"", state=1))
    (tmp_path / "core-10.img").write_bytes(w.core(name=b"late", state=2, exit_code=3 << 8))
    assert read_tasks(tmp_path) == (
        Task(7, 0, 7, 6, "init", TaskState.ALIVE, None, (Thread(7, "init"),), (9, 10)),
        Task(
            9,
            7,
            7,
            6,
            "server",
            TaskState.STOPPED,
            None,
            (Thread(9, "server"), Thread(90, "worker"), Thread(91, None)),
            (8,),
        ),
        Task(8, 9, 7, 6, "", TaskState.ALIVE, None, (Thread(8, ""),), ()),
        Task(10, 7, 7, 6, "late", TaskState.DEAD, 3, (), ()),
    )
    assert [task.is_zombie for task in read_tasks(tmp_path)] == [False, False, False, True]


def test_zombies_have_no_thread_ids(tmp_path: Path) -> None:
    """CRIU writes what was in its memory (criu/pstree.c: the threads of a dead task are not filled in)."""
    write_tree(tmp_path, entry(7, 0), entry(8, 7, 3081409536))
    (tmp_path / "core-7.img").write_bytes(w.core())
    (tmp_path / "core-8.img").write_bytes(w.core(state=2))
    assert read_tasks(tmp_path)[1].threads == ()


@pytest.mark.parametrize(
    ("wait_status", "exit_status"), [(0, 0), (1 << 8, 1), (255 << 8, 255), (9, -9), (11 | 0x80, -11)]
)
def test_how_a_zombie_ended(tmp_path: Path, wait_status: int, exit_status: int) -> None:
    write_tree(tmp_path, entry(7, 0))
    (tmp_path / "core-7.img").write_bytes(w.core(state=2, exit_code=wait_status))
    assert read_tasks(tmp_path)[0].exit_status == exit_status


@pytest.mark.parametrize("name", [b"\xff\xfe(\n\x1b[2J) x", "größe".encode(), b"fifteen bytes .."[:15]])
def test_any_bytes_are_a_name(tmp_path: Path, name: bytes) -> None:
    write_tree(tmp_path, entry(7, 0, 7, 8))
    (tmp_path / "core-7.img").write_bytes(w.core(name=name))
    (tmp_path / "core-8.img").write_bytes(w.thread_core(name))
    task = read_tasks(tmp_path)[0]
    assert task.name.encode("utf-8", "surrogateescape") == name
    assert [thread.name for thread in task.threads] == [task.name, task.name]
    if os.name == "posix":
        assert os.fsencode(task.name) == name


def test_names_that_the_kernel_does_not_have(tmp_path: Path) -> None:
    write_tree(tmp_path, entry(7, 0, 7, 8))
    path = tmp_path / "core-7.img"
    path.write_bytes(w.core(name=b"sixteen bytes ...."[:16]))
    with pytest.raises(ImageError, match=r"a name \(comm\) of at most 15 bytes, found 16") as caught:
        read_tasks(tmp_path)
    assert (caught.value.path, caught.value.offset) == (str(path), 8)
    path.write_bytes(w.core(name=None))
    with pytest.raises(ImageError, match="expected the core of a process with its name") as caught:
        read_tasks(tmp_path)
    assert (caught.value.path, caught.value.offset) == (str(path), 8)
    path.write_bytes(w.core())
    path = tmp_path / "core-8.img"
    path.write_bytes(w.thread_core(b"x" * 16))
    with pytest.raises(ImageError, match="at most 15 bytes") as caught:
        read_tasks(tmp_path)
    assert (caught.value.path, caught.value.offset) == (str(path), 8)


def test_cores_of_another_sort(tmp_path: Path) -> None:
    write_tree(tmp_path, entry(7, 0, 7, 8))
    (tmp_path / "core-7.img").write_bytes(w.core())
    with pytest.raises(ImageError, match="No such file") as caught:
        read_tasks(tmp_path)
    assert caught.value.path == str(tmp_path / "core-8.img")
    (tmp_path / "core-8.img").write_bytes(w.core())
    with pytest.raises(ImageError, match="expected the core of a thread with its thread_core") as caught:
        read_tasks(tmp_path)
    assert (caught.value.path, caught.value.offset) == (str(tmp_path / "core-8.img"), 8)
    (tmp_path / "core-7.img").write_bytes(w.thread_core())
    with pytest.raises(ImageError, match="a thread has none"):
        read_tasks(tmp_path)


@pytest.mark.parametrize("tid", [0, (1 << 22) + 1, 3081409536])
def test_thread_ids_that_nobody_has(tmp_path: Path, tid: int) -> None:
    first = entry(7, 0)
    write_tree(tmp_path, first, entry(8, 7, 8, tid))
    for pid in (7, 8):
        (tmp_path / f"core-{pid}.img").write_bytes(w.core())
    with pytest.raises(ImageError, match=f"found {tid} in process 8") as caught:
        read_tasks(tmp_path)
    assert caught.value.path == str(tmp_path / "pstree.img")
    assert caught.value.offset == 8 + 4 + len(first)


@pytest.mark.parametrize("ppid", [0, 8, 9, 1000])
def test_parents_come_first(tmp_path: Path, ppid: int) -> None:
    first = entry(7, 0)
    write_tree(tmp_path, first, entry(8, ppid), entry(9, 8))
    with pytest.raises(ImageError, match=f"the parent of process 8 before it, {ppid} is none") as caught:
        read_pstree(tmp_path)
    assert caught.value.offset == 8 + 4 + len(first)
