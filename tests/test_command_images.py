"""The command criupy images: on written images, and on dumps by real CRIUs."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import images_writer as w
from criupy.commands import images as command
from criupy.errors import CriupyError, ImageError
from criupy.images import VmaKind, _schema_pb2

if TYPE_CHECKING:
    from criupy.testing.criu_linux import Criu

PAGE = 4096
STATISTICS = {1: 900, 2: 59_123, 3: 15_000, 4: 12_000_000, 5: 5000, 6: 7, 7: 1234, 9: 0}


def parsed(*words: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(map(str, words)))


def shown(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert command.run(parsed(*words)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def as_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    document = json.loads(shown(capsys, *words, "--json"))
    assert isinstance(document, dict)
    return document


def tasks_of(document: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {task["pid"]: task for task in document["tasks"]}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A dump of init, a stopped server with threads, its zombie, and shared memory, with a parent."""
    images = tmp_path / "images"
    images.mkdir()
    vmas = [
        w.vma_body(0x1000, 0x101000),
        w.vma_body(0x200000, 0x300000, status=0x41, flags=2),
        w.vma_body(0x300000, 0x310000, status=0x4081, flags=1),
        w.vma_body(0x400000, 0x402000, status=0x221),
    ]
    w.write_dump(images, 7, [w.Run(0x1000, 100, 6), w.Run(0x80000, 3, 4), w.Run(0x90000, 5, 1)], vmas)
    (images / "mm-8.img").write_bytes(w.mm([w.vma_body(0x1000, 0x3000)]))
    (images / "pagemap-8.img").write_bytes(w.pagemap([w.Run(0x1000, 2, 6)], pages_id=2))
    (images / "pages-2.img").write_bytes(bytes(2 * PAGE))
    (images / "pagemap-shmem-1131.img").write_bytes(w.pagemap([w.Run(0, 1, 4)], pages_id=3))
    (images / "pages-3.img").write_bytes(bytes(PAGE))

    def entry(pid: int, ppid: int, *threads: int) -> bytes:
        ids = w.number(1, pid) + w.number(2, ppid) + w.number(3, 7) + w.number(4, 7)
        return ids + b"".join(w.number(5, tid) for tid in threads)

    (images / "pstree.img").write_bytes(
        w.image("pstree", [entry(7, 0, 7), entry(8, 7, 8, 80, 81, 82), entry(9, 8, 3081409536)])
    )
    (images / "core-7.img").write_bytes(w.core(name=b"init\x1b[2J\n"))
    (images / "core-8.img").write_bytes(w.core(name=b"\xffserver", state=3))
    for tid, name in ((80, b"worker"), (81, b"io"), (82, b"worker")):
        (images / f"core-{tid}.img").write_bytes(w.thread_core(name))
    (images / "core-9.img").write_bytes(w.core(name=b"gone", state=2, exit_code=9))
    (tmp_path / "before").mkdir()
    (images / "parent").symlink_to("../before")
    return images


def test_text(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "stats-dump").write_bytes(w.dump_stats(STATISTICS))
    text = shown(capsys, tree)
    assert text == (
        f"""\
{tree}: image version 2, by CRIU 4.2 or newer, run run
Based on 1 dump, the nearest first:
  {tree.parent.resolve()}/before

3 processes, 1 zombie among them; 5 threads
    PID    PGID     SID  NAME
      7       7       7  init\\x1b[2J\\n
      8       7       7    \\xffserver (stopped; 3 more threads: worker x 2, io)
      9       7       7      gone (zombie, signal 9)

    PID  NAME             AREAS     ANON    FILES   SHARED  IN DUMP   PARENT     LAZY
      7  init\\x1b[2J\\n        4   1.1 MB   1.0 MB    66 kB   422 kB    20 kB   410 kB
      8  \\xffserver           1     8 kB        -        -     8 kB        -     8 kB
         shmem 1131                                            4 kB        -        -
Areas: 2 anonymous 1.1 MB, 1 heap 8 kB, 1 private file 1.0 MB, 1 memfd 66 kB
Pages: 106 in this dump, 0 at its source, 5 in parents; 102 can be restored lazily

Dump: processes frozen for 59 ms, after 900 us of freezing
  memory   15 ms, with 12.0 s of writing
  pages    5,000 scanned, 1,234 written, 7 in the parent
"""
    )
    assert max(map(len, text.splitlines()[4:])) <= 100


def test_json(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "stats-restore").write_bytes(w.restore_stats({1: 1, 2: 2, 3: 3, 4: 4}))
    document = as_json(capsys, tree, "--work-dir", work)
    assert document["tasks"][0] == {
        "pid": 7,
        "ppid": 0,
        "pgid": 7,
        "sid": 7,
        "name": "init\x1b[2J\n",
        "state": "alive",
        "exit_status": None,
        "threads": [{"tid": 7, "name": "init\x1b[2J\n"}],
        "children": [8],
        "areas": {
            "anonymous": {"count": 1, "bytes": 0x100000},
            "heap": {"count": 1, "bytes": 0x2000},
            "file_private": {"count": 1, "bytes": 0x100000},
            "memfd": {"count": 1, "bytes": 0x10000},
        },
        "pages": {
            "pagemap_entries": 3,
            "present": 103,
            "at_source": 0,
            "in_parent": 5,
            "lazy": 100,
            "pages_id": 1,
            "file_bytes": 103 * PAGE,
        },
    }
    server, zombie = document["tasks"][1:]
    assert (server["name"], server["state"]) == ("\\xffserver", "stopped")
    assert [thread["tid"] for thread in server["threads"]] == [8, 80, 81, 82]
    assert (zombie["state"], zombie["exit_status"], zombie["threads"]) == ("zombie", -9, [])
    assert (zombie["areas"], zombie["pages"]) == (None, None)
    del document["tasks"]
    assert document == {
        "images_dir": str(tree),
        "image_version": 2,
        "run_id": "run",
        "page_counts": "new",
        "page_size": PAGE,
        "parents": [str(tree.parent.resolve() / "before")],
        "shared_memory": [
            {
                "shmid": 1131,
                "pages": {
                    "pagemap_entries": 1,
                    "present": 1,
                    "at_source": 0,
                    "in_parent": 0,
                    "lazy": 0,
                    "pages_id": 3,
                    "file_bytes": PAGE,
                },
            }
        ],
        "work_dir": str(work),
        "dump_statistics": None,
        "restore_statistics": {
            "forking_us": 3,
            "restore_us": 4,
            "pages_compared": 1,
            "pages_skipped_cow": 2,
            "pages_restored": None,
        },
    }


def test_statistics(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"No statistics in {tree} (" in shown(capsys, tree)
    work = tmp_path / "work"
    with pytest.raises(ImageError, match="expected the work directory of criu") as caught:
        command.run(parsed(tree, "--work-dir", work))
    assert caught.value.path == str(work)
    work.mkdir()
    assert f"No statistics in {work} (" in shown(capsys, tree, "--work-dir", work)
    (work / "stats-restore").write_bytes(w.restore_stats({1: 10, 2: 5, 3: 3000, 4: 45_000, 5: 1234}))
    assert shown(capsys, tree, "--work-dir", work).endswith(
        "\nRestore: 45 ms, with 3,000 us of forking\n"
        "  pages    1,234 restored, 10 compared with inherited ones, 5 of them the same\n"
    )
    for name in ("stats-dump", "stats-restore"):
        (work / name).write_bytes(b"\x40")
        with pytest.raises(ImageError, match="the image is truncated") as caught:
            command.run(parsed(tree, "--work-dir", work))
        assert (caught.value.path, caught.value.offset) == (str(work / name), 0)
        (work / name).unlink()
        (work / name).symlink_to("nowhere")
        with pytest.raises(ImageError, match="No such file"):
            command.run(parsed(tree, "--work-dir", work))
        (work / name).unlink()
    # Nothing of a dump that is refused is shown.
    assert capsys.readouterr().out == ""


def test_lazy_dump(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "pagemap-7.img").write_bytes(w.pagemap([w.Run(0x1000, 1000, 2), w.Run(0x800000, 1, 4)]))
    text = shown(capsys, tree)
    assert "4.1 MB of its memory are not in the images, and its source" not in text
    assert "This is a lazy dump: 4.1 MB of its memory are not in the images, its source serves them\n" in text
    assert " SOURCE " in text
    (tree / "stats-dump").write_bytes(w.dump_stats(STATISTICS | {9: 1000}))
    text = shown(capsys, tree)
    assert "4.1 MB of its memory are not in the images, and its source has finished\n" in text
    assert "1,234 written, 1,000 left lazy" in text


def test_memory_that_went_to_a_page_server(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pid in (7, 8):
        (tree / f"pagemap-{pid}.img").unlink()
    text = shown(capsys, tree)
    assert "No pagemap here of 7, 8: a page server took the memory, or images are missing\n" in text
    assert [line[-1] for line in text.splitlines() if line.startswith("      8  \\xff")] == ["?"]
    assert tasks_of(as_json(capsys, tree))[8]["pages"] is None


def test_pages_image_of_another_length(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert " FILE\n" not in shown(capsys, tree)
    with (tree / "pages-2.img").open("ab") as file:
        file.write(bytes(PAGE))
    assert " FILE\n" in shown(capsys, tree)


def test_one_process_without_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w.write_dump(tmp_path, 7, [], [])
    (tmp_path / "inventory.img").write_bytes(w.inventory(run_id=None))
    text = shown(capsys, tmp_path)
    assert text.startswith(f"{tmp_path}: image version 2\n\n1 process; 1 thread\n")
    assert "\nAreas: none\n" in text
    assert as_json(capsys, tmp_path)["page_counts"] is None


def test_wide_and_deep_trees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand generations are no recursion, and many names do not break lines."""
    w.write_dump(tmp_path, 1, [], [])
    pids = range(1, 1001)
    (tmp_path / "pstree.img").write_bytes(w.pstree([(pid, pid - 1) for pid in pids]))
    for pid in pids:
        (tmp_path / f"core-{pid}.img").write_bytes(w.core(name=b"x" * 15))
        (tmp_path / f"mm-{pid}.img").write_bytes(w.mm([]))
        (tmp_path / f"pagemap-{pid}.img").write_bytes(w.pagemap([]))
    threads = range(2000, 2100)
    body = w.number(1, 1001) + w.number(2, 1) + w.number(3, 1) + w.number(4, 1) + w.number(5, 1001)
    with (tmp_path / "pstree.img").open("ab") as file:
        file.write(w.record(body + b"".join(w.number(5, tid) for tid in threads)))
    (tmp_path / "core-1001.img").write_bytes(w.core(name=b"many"))
    (tmp_path / "mm-1001.img").write_bytes(w.mm([]))
    (tmp_path / "pagemap-1001.img").write_bytes(w.pagemap([]))
    for tid in threads:
        (tmp_path / f"core-{tid}.img").write_bytes(w.thread_core(f"worker {tid}".encode()))
    lines = shown(capsys, tmp_path).splitlines()
    many = [line for line in lines if " many (100 more threads: worker 2000, " in line]
    assert len(many) == 1
    assert many[0].endswith(" ...")
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 100
    tree_lines = lines[lines.index("    PID    PGID     SID  NAME") + 1 :][:1001]
    assert [int(line.split()[0]) for line in tree_lines] == [*pids, 1001]
    assert all("x" * 15 in line for line in tree_lines[:-1])


def test_terminal_that_lacks_letters(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "core-7.img").write_bytes(w.core(name="größe".encode()))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert command.run(parsed(tree)) == 0
    sys.stdout.flush()
    assert b"gr\\xf6\\xdfe" in raw.getvalue()


def test_names_in_json_are_unicode(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "core-7.img").write_bytes(w.core(name="größe \N{SNAKE}".encode()))
    assert as_json(capsys, tree)["tasks"][0]["name"] == "größe \N{SNAKE}"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("rm -r images", "images: expected a directory of images: No such file or directory"),
        ("rm -r images; touch images", "images: expected a directory of images, this is a file"),
        ("rm -r images/*", "images: expected a directory of images, it is empty"),
        ("rm images/*.img; touch images/dump.log", "images: expected a directory of images, it has none"),
        (
            "rm images/inventory.img",
            (
                "images/inventory.img: expected the image that CRIU writes last: "
                "the dump is going on, or has failed (see its log)"
            ),
        ),
        (
            "rm images/pstree.img images/core-*",
            (
                "images/pstree.img: expected a process tree: this is a pre-dump, which has memory only; "
                "name the directory of the dump that followed it"
            ),
        ),
        (
            "rm images/core-80.img",
            (
                "images/core-80.img: expected a readable core image: No such file or directory "
                "(is this the directory that criu dump wrote to?)"
            ),
        ),
        (
            "rm -r before",
            (
                "images/parent: expected the images that these are based on: No such file or directory "
                "(were they moved?)"
            ),
        ),
        (
            "truncate -s 4096 images/pages-2.img",
            (
                "images/pages-2.img, byte 4096: expected 8192 bytes as pagemap-8.img says, "
                "the image is truncated: copy it again"
            ),
        ),
    ],
)
def test_what_is_no_dump(
    tree: Path, spoil: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["sh", "-ec", spoil], cwd=tree.parent, check=True)
    monkeypatch.chdir(tree.parent)
    with pytest.raises(CriupyError) as caught:
        command.run(parsed("images"))
    assert str(caught.value) == message
    assert capsys.readouterr().out == ""


def test_many_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading must not take minutes: about a second on a slow machine, 10 mean that something is wrong."""
    w.write_dump(tmp_path, 7, [], [w.vma_body(0x1000, 0x1000 + 0x2000 * 500_000)])
    # protobuf itself writes them eight times faster than our writer.
    entry = _schema_pb2.PagemapEntry(compat_nr_pages=0, nr_pages=1)
    with (tmp_path / "pagemap-7.img").open("ab") as file:
        for number in range(500_000):
            entry.vaddr = 0x1000 + 0x2000 * number
            entry.flags = (2, 4, 6, 1)[number % 4]
            file.write(w.record(entry.SerializeToString()))
    os.truncate(tmp_path / "pages-1.img", 250_000 * PAGE)
    start = time.monotonic()
    pages = as_json(capsys, tmp_path)["tasks"][0]["pages"]
    assert time.monotonic() - start < 10
    assert (pages["pagemap_entries"], pages["present"]) == (500_000, 250_000)


def test_import_is_light() -> None:
    program = "import sys, criupy.commands.images as c; print(c.NAME, c.HELP); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said, modules = done.stdout.splitlines()
    assert said == f"images {command.HELP}"
    heavy = {"google.protobuf", "trio", "cffi", "criupy.images"}
    assert heavy.isdisjoint(modules.split())


# ---- real CRIU ----------------------------------------------------------------------

# A root with a name that is no text, its zombie, and a child with a named thread and
# memory known to the page. The child tells that all is in place.
_PROGRAM = f"""
import ctypes, mmap, os, sys, threading, time
def name(text):
    ctypes.CDLL(None).prctl(15, text, 0, 0, 0)  # PR_SET_NAME
name(b"root\\xff (x) y")
if os.fork() == 0:
    name(b"dead one")
    os._exit(3)
os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
if os.fork() == 0:
    name(b"child")
    private = mmap.mmap(-1, 64 * {PAGE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private[:] = b"p" * len(private)
    shared = mmap.mmap(-1, 32 * {PAGE})
    shared[: 5 * {PAGE}] = b"s" * (5 * {PAGE})
    def work():
        name(b"worker")
        os.rename(sys.argv[1] + ".tmp", sys.argv[1])
        time.sleep(1000)
    with open(sys.argv[1] + ".tmp", "w") as out:
        thread = threading.Thread(target=work)
        print(os.getpid(), file=out)
    thread.start()
    time.sleep(1000)
time.sleep(1000)
"""


@contextmanager
def running_tree(directory: Path) -> Iterator[tuple[int, int]]:
    """Run the program; yield the pids of the root and of the child."""
    said = directory / "said"
    with (directory / "stdio").open("w+") as stdio:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, said],
            stdin=subprocess.DEVNULL,
            stdout=stdio,
            stderr=stdio,
            start_new_session=True,
        )
    child = None
    try:
        while not said.exists():
            assert process.poll() is None, (directory / "stdio").read_text()
            time.sleep(0.01)
        child = int(said.read_text())
        yield process.pid, child
    finally:
        process.kill()
        process.wait()
        if child is not None:
            end_orphan(child)


def end_orphan(pid: int) -> None:
    """Kill the child unless its dump did, and nobody else who may have got its pid."""
    try:
        if b"said" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, 9)
    except (FileNotFoundError, ProcessLookupError):
        pass


def check_tree(document: dict[str, Any], root: int, child: int) -> None:
    tasks = tasks_of(document)
    (zombie,) = set(tasks) - {root, child}
    first, dead, second = tasks[root], tasks[zombie], tasks[child]
    assert first["name"] == "root\\xff (x) y"
    assert (first["ppid"], first["pgid"], first["sid"], first["state"]) == (0, root, root, "alive")
    assert sorted(first["children"]) == sorted([zombie, child])
    assert [thread["tid"] for thread in first["threads"]] == [root]
    assert (dead["name"], dead["state"], dead["exit_status"]) == ("dead one", "zombie", 3)
    assert (dead["threads"], dead["pages"]) == ([], None)
    assert (second["name"], second["ppid"], second["sid"]) == ("child", root, root)
    assert [thread["name"] for thread in second["threads"]] == ["child", "worker"]
    assert second["threads"][0]["tid"] == child
    for task in (first, second):
        kinds = {kind.name.lower() for kind in VmaKind}
        assert {"anonymous", "stack", "file_private", "kernel"} <= set(task["areas"]) <= kinds
        assert "other" not in task["areas"]
        assert task["areas"]["stack"]["count"] == 1
    assert second["areas"]["memfd"] == {"count": 1, "bytes": 32 * PAGE}
    (piece,) = document["shared_memory"]
    assert piece["pages"]["present"] == 5


@pytest.mark.usefixtures("workload_program")
async def test_real_dump_and_restore(criu: Criu, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from criupy.testing.criu_linux import dump, restore

    images, work = room / "images", room / "work"
    with running_tree(room) as (root, child):
        await dump(criu, root, images)
    document = as_json(capsys, images)
    assert document["page_counts"] == ("new" if criu.version >= (4, 2) else "old")
    assert document["image_version"] == 2
    assert len(document["run_id"]) == 36
    assert document["parents"] == []
    check_tree(document, root, child)

    tasks = [task for task in document["tasks"] if task["pages"] is not None]
    present = sum(task["pages"]["present"] for task in tasks)
    assert all(task["pages"]["at_source"] == 0 for task in tasks)
    assert tasks_of(document)[child]["pages"]["lazy"] >= 64
    for task in tasks:
        size = (images / f"pages-{task['pages']['pages_id']}.img").stat().st_size
        assert size == task["pages"]["file_bytes"] == task["pages"]["present"] * PAGE

    dumped = document["dump_statistics"]
    assert None not in dumped.values()
    assert dumped["pages_written"] == present
    assert (dumped["pages_skipped_parent"], dumped["pages_lazy"]) == (0, 0)
    assert dumped["pages_scanned"] >= present
    assert (dumped["shpages_scanned"], dumped["shpages_written"]) == (32, 5)
    # At least the memory was copied while they stood still, and all was over within the test's patience.
    assert 0 < dumped["memwrite_us"] <= dumped["memdump_us"] < dumped["frozen_us"] < 60_000_000
    assert 0 < dumped["freezing_us"] < 60_000_000
    assert document["restore_statistics"] is None

    async with restore(criu, images, work, root, lazy=False) as restored:
        await restored.finished()
    document = as_json(capsys, images, "--work-dir", work)
    assert document["dump_statistics"] is None
    found = document["restore_statistics"]
    assert None not in found.values()
    assert 0 < found["restore_us"] < 60_000_000
    # What the child shares with the root is compared; the rest of both is read.
    assert 0 < found["pages_skipped_cow"] <= found["pages_compared"] <= present
    assert found["pages_restored"] == present - found["pages_skipped_cow"]

    text = shown(capsys, images, "--work-dir", work)
    assert "3 processes, 1 zombie among them; 3 threads\n" in text
    assert "  child (1 more thread: worker)\n" in text
    assert "  dead one (zombie, exit status 3)\n" in text
    assert f"\nRestore: {found['restore_us'] / 1e3:,.0f} ms" in text or found["restore_us"] < 10_000
    assert max(map(len, text.splitlines()[4:])) <= 100


@pytest.mark.usefixtures("workload_program")
async def test_real_lazy_dump(criu: Criu, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from criupy.testing.criu_linux import lazy_dump

    images = room / "images"
    with running_tree(room) as (root, child):
        async with lazy_dump(criu, root, images):
            document = as_json(capsys, images)
            text = shown(capsys, images)
    check_tree(document, root, child)
    pages = tasks_of(document)[child]["pages"]
    assert pages["at_source"] >= 64
    assert pages["lazy"] == pages["at_source"]
    assert document["dump_statistics"] is None
    assert " are not in the images, its source serves them\n" in text
    assert f"\nNo statistics in {images} (" in text


def test_real_dump_that_failed(criu: Criu, room: Path) -> None:
    """A process that is no session leader is refused after its images were begun."""
    images = room / "images"
    images.mkdir()
    with running_tree(room) as (_, child):
        words = [criu.path, "dump", "--no-default-config", "-t", str(child), "-D", images, "-o", "dump.log"]
        assert subprocess.run(list(map(str, words)), check=False).returncode == 1
    assert not (images / "inventory.img").exists()
    with pytest.raises(ImageError, match=r"expected (a directory of images, it has none|.* or has failed)"):
        command.run(parsed(images))
