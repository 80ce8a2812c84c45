"""``criupy images``: what a checkpoint holds, for people and for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from criupy.images import Dump, DumpStats, PageTotals, RestoreStats, Task, TaskMemory

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME: Final = "images"
HELP: Final = "show what a checkpoint holds: processes, memory, statistics"

_WIDTH: Final = 100
_NO_BREAK: Final = "\N{NO-BREAK SPACE}"
_PAGE: Final = 4096

_ANONYMOUS: Final = ("ANONYMOUS", "HEAP", "STACK", "SHADOW_STACK", "AIO_RING")
_FILES: Final = ("FILE_PRIVATE", "FILE_SHARED", "DEVICE")
_SHARED: Final = ("MEMFD", "ANONYMOUS_SHARED", "SYSV", "SOCKET")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("images_dir", metavar="DIR", type=Path, help="the directory that criu dump wrote to")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        type=Path,
        help="the work directory of criu dump and restore, where their statistics are (default: the images')",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the dump; what is wrong with it is an ImageError."""
    from criupy.images import read_dump

    dump = read_dump(arguments.images_dir)
    work_dir: Path = dump.images_dir if arguments.work_dir is None else arguments.work_dir
    statistics = _read_statistics(work_dir)
    if arguments.json:
        text = json.dumps(_to_json(dump, work_dir, *statistics), indent=1)
    else:
        text = "\n".join(_lines(dump, work_dir, *statistics))
    # A name that the terminal's encoding lacks must not be the end of it.
    encoding = sys.stdout.encoding or "ascii"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return 0


def _read_statistics(work_dir: Path) -> tuple[DumpStats | None, RestoreStats | None]:
    """Read the statistics there are: those of a lazy dump that goes on, say, are still to come."""
    from criupy.errors import ImageError
    from criupy.images import DUMP_STATS, RESTORE_STATS, read_dump_stats, read_restore_stats

    if not work_dir.is_dir():
        raise ImageError(work_dir, None, "expected the work directory of criu, this is no directory")
    return (
        read_dump_stats(work_dir) if os.path.lexists(work_dir / DUMP_STATS) else None,
        read_restore_stats(work_dir) if os.path.lexists(work_dir / RESTORE_STATS) else None,
    )


# ---- JSON -------------------------------------------------------------------------


def _to_json(
    dump: Dump, work_dir: Path, dumped: DumpStats | None, restored: RestoreStats | None
) -> dict[str, object]:
    style = None if dump.style is None else dump.style.value
    return {
        "images_dir": _unicode(str(dump.images_dir.absolute())),
        "image_version": dump.inventory.version,
        "run_id": dump.inventory.run_id,
        # "new": the dumper was CRIU 4.2 or newer, "old": it was an older one.
        "page_counts": style,
        "page_size": _PAGE,
        "parents": [_unicode(str(parent)) for parent in dump.parents],
        "tasks": [_task_to_json(task, dump.memory.get(task.pid)) for task in dump.tasks],
        "shared_memory": [
            {"shmid": piece.shmid, "pages": _pages_to_json(piece.pages)} for piece in dump.shared
        ],
        "work_dir": _unicode(str(work_dir.absolute())),
        "dump_statistics": None if dumped is None else dataclasses.asdict(dumped),
        "restore_statistics": None if restored is None else dataclasses.asdict(restored),
    }


def _task_to_json(task: Task, memory: TaskMemory | None) -> dict[str, object]:
    return {
        "pid": task.pid,
        "ppid": task.ppid,
        "pgid": task.pgid,
        "sid": task.sid,
        "name": _unicode(task.name),
        "state": _state(task),
        "exit_status": task.exit_status,
        "threads": [
            {"tid": thread.tid, "name": None if thread.name is None else _unicode(thread.name)}
            for thread in task.threads
        ],
        "children": list(task.children),
        "areas": None
        if memory is None
        else {
            kind.name.lower(): {"count": areas.count, "bytes": areas.length}
            for kind, areas in memory.areas.items()
        },
        "pages": None if memory is None or memory.pages is None else _pages_to_json(memory.pages),
    }


def _pages_to_json(pages: PageTotals) -> dict[str, object]:
    return {
        "pagemap_entries": pages.entries,
        "present": pages.present,
        "at_source": pages.at_source,
        "in_parent": pages.in_parent,
        "lazy": pages.lazy,
        "pages_id": pages.pages_id,
        "file_bytes": pages.file_length,
    }


def _state(task: Task) -> str:
    return "zombie" if task.is_zombie else task.state.name.lower()


def _unicode(text: str) -> str:
    r"""Write bytes that were not UTF-8 as ``\xNN``: a lone surrogate is no valid JSON."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---- text -------------------------------------------------------------------------


def _lines(
    dump: Dump, work_dir: Path, dumped: DumpStats | None, restored: RestoreStats | None
) -> Iterator[str]:
    yield from _header(dump)
    yield ""
    yield from _tree(dump.tasks)
    yield ""
    yield from _memory(dump, dumped)
    yield ""
    yield from _statistics(work_dir, dumped, restored)


def _header(dump: Dump) -> Iterator[str]:
    known = [f"image version {dump.inventory.version}"]
    if dump.style is not None:
        known.append("by CRIU 4.2 or newer" if dump.style.value == "new" else "by a CRIU before 4.2")
    if dump.inventory.run_id is not None:
        known.append(f"run {_clean(dump.inventory.run_id)}")
    yield f"{_clean(str(dump.images_dir))}: {', '.join(known)}"
    if dump.parents:
        yield f"Based on {_count(len(dump.parents), 'dump')}, the nearest first:"
        yield from (f"  {_clean(str(parent))}" for parent in dump.parents)


def _tree(tasks: Sequence[Task]) -> Iterator[str]:
    zombies = sum(task.is_zombie for task in tasks)
    threads = sum(len(task.threads) for task in tasks)
    also = f", {_count(zombies, 'zombie')} among them" if zombies else ""
    yield f"{_count(len(tasks), 'process', 'processes')}{also}; {_count(threads, 'thread')}"
    yield f"{'PID':>7} {'PGID':>7} {'SID':>7}  NAME"
    by_pid = {task.pid: task for task in tasks}
    left = [(tasks[0], 0)]
    while left:
        task, depth = left.pop()
        left += [(by_pid[pid], depth + 1) for pid in reversed(task.children)]
        # A deep chain of processes must not push its names out of sight.
        indent = "  " * min(depth, 20)
        line = f"{task.pid:>7} {task.pgid:>7} {task.sid:>7}  {indent}{_clean(task.name)}{_remarks(task)}"
        yield line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4]} ..."


def _remarks(task: Task) -> str:
    remarks = []
    if task.exit_status is not None:
        how = f"signal {-task.exit_status}" if task.exit_status < 0 else f"exit status {task.exit_status}"
        remarks.append(f"zombie, {how}")
    elif (state := _state(task)) != "alive":
        remarks.append(state)
    if others := task.threads[1:]:
        names = Counter(_clean(thread.name or "no name") for thread in others)
        listed = ", ".join(name if count == 1 else f"{name} x {count}" for name, count in names.items())
        remarks.append(f"{len(others)} more {'thread' if len(others) == 1 else 'threads'}: {listed}")
    return f" ({'; '.join(remarks)})" if remarks else ""


def _memory(dump: Dump, dumped: DumpStats | None) -> Iterator[str]:
    yield from _memory_table(dump)
    kinds: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    for memory in dump.memory.values():
        for kind, areas in memory.areas.items():
            kinds[kind.value] += areas.count
            lengths[kind.value] += areas.length
    listed = ", ".join(_together(f"{kinds[name]:,} {name} {_bytes(lengths[name])}") for name in kinds)
    yield from _wrapped(f"Areas: {listed or 'none'}")

    pages = [task.pages for task in dump.memory.values() if task.pages is not None]
    pages += [piece.pages for piece in dump.shared]
    present, lazy, at_source, in_parent = (
        sum(counts)
        for counts in (
            [p.present for p in pages],
            [p.lazy for p in pages],
            [p.at_source for p in pages],
            [p.in_parent for p in pages],
        )
    )
    yield from _wrapped(
        f"Pages: {present:,} in this dump, {at_source:,} at its source, {in_parent:,} in parents; "
        f"{lazy:,} can be restored lazily"
    )
    if at_source:
        # A dump ends, and writes its statistics, only when its source has served all it was asked for.
        finished = dumped is not None and dumped.pages_lazy
        yield from _wrapped(
            f"This is a lazy dump: {_bytes(at_source * _PAGE)} of its memory are not in the images, "
            + ("and its source has finished" if finished else "its source serves them")
        )
    if missing := [str(pid) for pid, memory in dump.memory.items() if memory.pages is None]:
        yield from _wrapped(
            f"No pagemap here of {', '.join(missing)}: a page server took the memory, or images are missing"
        )


_MEMORY_COLUMNS: Final = ("IN DUMP", "SOURCE", "PARENT", "LAZY", "FILE")


def _memory_table(dump: Dump) -> Iterator[str]:
    """Lay out a row per task and piece of shared memory; of the pages, only columns that say something."""
    rows = [
        (f"{task.pid:>7}  {_clean(task.name):<15}", memory, memory.pages)
        for task in dump.tasks
        if (memory := dump.memory.get(task.pid)) is not None
    ]
    pieces = [(f"{'':>7}  {f'shmem {piece.shmid}':<15}", None, piece.pages) for piece in dump.shared]
    figures = [_page_figures(pages) for _, _, pages in [*rows, *pieces]]
    shown = [any(row[index] for row in figures) for index in range(len(_MEMORY_COLUMNS))]
    shown[0] = True
    # The file is as long as what is in it, unless somebody touched it.
    shown[-1] = any(row[0] != row[-1] for row in figures)
    head = "".join(f"{name:>9}" for name, show in zip(_MEMORY_COLUMNS, shown, strict=True) if show)
    yield f"{'PID':>7}  {'NAME':<15}{'AREAS':>7}{'ANON':>9}{'FILES':>9}{'SHARED':>9}{head}"
    for (label, memory, pages), figure in zip([*rows, *pieces], figures, strict=True):
        mapped = f"{'':>34}"
        if memory is not None:
            count = sum(areas.count for areas in memory.areas.values())
            lengths = (_length(memory, kinds) for kinds in (_ANONYMOUS, _FILES, _SHARED))
            mapped = f"{count:>7,}" + "".join(f"{_bytes(length):>9}" for length in lengths)
        cells = (
            "?" if pages is None else _bytes(value) for value, show in zip(figure, shown, strict=True) if show
        )
        yield (label + mapped + "".join(f"{cell:>9}" for cell in cells)).rstrip()


def _page_figures(pages: PageTotals | None) -> tuple[int, ...]:
    if pages is None:
        return (0,) * len(_MEMORY_COLUMNS)
    counts = (pages.present, pages.at_source, pages.in_parent, pages.lazy)
    return (*(count * _PAGE for count in counts), pages.file_length)


def _length(memory: TaskMemory, kinds: Iterable[str]) -> int:
    return sum(areas.length for kind, areas in memory.areas.items() if kind.name in kinds)


def _statistics(work_dir: Path, dumped: DumpStats | None, restored: RestoreStats | None) -> Iterator[str]:
    if dumped is None and restored is None:
        yield f"No statistics in {_clean(str(work_dir))} (CRIU writes them to its work directory: --work-dir)"
    if dumped is not None:
        yield (
            f"Dump: processes frozen for {_time(dumped.frozen_us)}, "
            f"after {_time(dumped.freezing_us)} of freezing"
        )
        yield f"  memory   {_time(dumped.memdump_us)}, with {_time(dumped.memwrite_us)} of writing"
        lazy = f", {dumped.pages_lazy:,} left lazy" if dumped.pages_lazy else ""
        yield (
            f"  pages    {dumped.pages_scanned:,} scanned, {dumped.pages_written:,} written{lazy}, "
            f"{dumped.pages_skipped_parent:,} in the parent"
        )
        if dumped.shpages_scanned:
            yield (
                f"  shared   {dumped.shpages_scanned:,} scanned, {dumped.shpages_written or 0:,} written, "
                f"{dumped.shpages_skipped_parent or 0:,} in the parent"
            )
    if restored is not None:
        yield f"Restore: {_time(restored.restore_us)}, with {_time(restored.forking_us)} of forking"
        count = "" if restored.pages_restored is None else f"{restored.pages_restored:,} restored, "
        yield (
            f"  pages    {count}{restored.pages_compared:,} compared with inherited ones, "
            f"{restored.pages_skipped_cow:,} of them the same"
        )


def _clean(text: str) -> str:
    """Make any name harmless to a terminal: a process may be called after an escape sequence."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in _unicode(text)
    )


def _together(text: str) -> str:
    """Keep words on one line."""
    return text.replace(" ", _NO_BREAK)


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(
        text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _bytes(length: int) -> str:
    if not length:
        return "-"
    for unit, factor in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if length < 1000 * factor or unit == "TB":
            break
    return f"{length / factor:,.{0 if unit == 'kB' else 1}f} {unit}"


def _time(microseconds: int) -> str:
    if microseconds < 10_000:
        return f"{microseconds:,} us"
    if microseconds < 10_000_000:
        return f"{microseconds / 1e3:,.0f} ms"
    return f"{microseconds / 1e6:,.1f} s"
