"""Images of which pre-dumps hold the most, and what is made of them to restore from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import images_writer as w
from criupy.images import write_lazy_parents
from criupy.testing.images import (
    PAGEMAP_MAGIC,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    STACK_BASE,
    STACK_PAGES,
    WrittenImages,
    WrittenTask,
    image,
    number,
    pagemap_entry,
)
from criupy.testing.spec import Run

PAGE = 4096
CHUNK = 16

Entries = list[tuple[Run, int]]


def _chunks(runs: Sequence[Run]) -> list[Run]:
    return [
        Run(run.start + n * PAGE, run.first + n, min(CHUNK, run.nr_pages - n))
        for run in runs
        for n in range(0, run.nr_pages, CHUNK)
    ]


def _write_pagemap(path: Path, pages_id: int, entries: Entries, count: Literal["old", "new"]) -> None:
    bodies = [pagemap_entry(run.start, run.nr_pages, flags, count=count) for run, flags in entries]
    path.write_bytes(image(PAGEMAP_MAGIC, [number(1, pages_id), *bodies]))


def give_to_parents(images: WrittenImages, every: int = 4) -> WrittenImages:
    """Leave every so manieth piece of the lazy memory to the source, and give the rest to two parents.

    The further one has an older version of what the nearer has.
    """
    near, far = (images.directory.with_name(f"{images.directory.name}-{n}") for n in (2, 1))
    for directory, parent in ((images.directory, near), (near, far)):
        parent.mkdir()
        (directory / "parent").symlink_to(f"../{parent.name}")
    tasks = []
    for task in images.tasks:
        # Not all that CRIU wants of a core, but where its stack is.
        core = w.core(thread_info=w.registers(STACK_BASE + PAGE))
        (images.directory / f"core-{task.pid}.img").write_bytes(core)
        chunks = _chunks(task.runs)
        offsets = {
            run.first: offset + (run.first - whole.first) * PAGE
            for whole, offset in zip(task.runs, task.offsets, strict=True)
            for run in _chunks([whole])
        }
        dirty = tuple(chunks[::every])
        top: Entries = []
        levels: dict[Path, Entries] = {near: [], far: []}
        for n, run in enumerate(chunks):
            top.append((run, PE_LAZY if n % every == 0 else PE_PARENT))
            levels[near].append((run, PE_PARENT if n % 4 == 2 else PE_LAZY | PE_PRESENT))
            if n % 4 in {0, 1, 2}:
                levels[far].append((run, PE_LAZY | PE_PRESENT))
        top.append((Run(STACK_BASE, 0, STACK_PAGES), PE_PRESENT))
        name = f"pagemap-{task.pid}.img"
        _write_pagemap(images.directory / name, task.task + 1, top, images.count)
        for directory, entries in levels.items():
            _write_pagemap(directory / name, task.task + 1, entries, images.count)
            with (directory / f"pages-{task.task + 1}.img").open("wb") as file:
                for n, (run, flags) in enumerate(entries):
                    if flags == PE_PARENT:
                        continue
                    is_old = directory == far and n % 3 != 2  # it has three of four
                    for page in range(run.first, run.first + run.nr_pages):
                        file.write(b"old!" * (PAGE // 4) if is_old else images.spec.page(task.task, page))
        tasks.append(
            WrittenTask(task.pid, task.task, dirty, tuple(offsets[run.first] for run in dirty), task.pages)
        )
    return dataclasses.replace(images, tasks=tuple(tasks))


def lazily(images: WrittenImages) -> WrittenImages:
    """Make the directory to restore such images from."""
    new = images.directory.with_name("lazily")
    write_lazy_parents(images.directory, new)
    return dataclasses.replace(images, directory=new)


def nr_dirty(images: WrittenImages) -> int:
    """How many pages the source has."""
    return sum(run.nr_pages for task in images.tasks for run in task.runs)
