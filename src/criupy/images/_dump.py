"""A whole dump at a glance, and what to say of a directory that holds none."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from criupy.errors import ImageError
from criupy.images._framing import StrPath
from criupy.images._memory import SharedMemory, TaskMemory, read_shared_memory, read_task_memory
from criupy.images._pagemap import PagemapStyle, one_style, pagemap_path, shared_pagemap_path
from criupy.images._tasks import Inventory, read_inventory
from criupy.images._tree import Task, read_tasks


@dataclass(frozen=True, slots=True)
class Dump:
    """What the images of one dump say.

    ``parents`` are the directories of the images that it is based on, the
    nearest first. ``memory`` is by pid; a zombie has none. ``style`` is that
    of all pagemaps, None when none has an entry.
    """

    images_dir: Path
    inventory: Inventory
    parents: tuple[Path, ...]
    tasks: tuple[Task, ...]
    memory: Mapping[int, TaskMemory]
    shared: tuple[SharedMemory, ...]
    style: PagemapStyle | None


def read_dump(images_dir: StrPath) -> Dump:
    """Read all of a dump but the pages themselves, or raise an ImageError that says what is there instead."""
    directory = Path(images_dir)
    inventory = _read_inventory(directory)
    parents = parent_chain(directory)
    tasks = read_tasks(directory)
    memory = {task.pid: read_task_memory(directory, task.pid) for task in tasks if not task.is_zombie}
    shared = read_shared_memory(directory)
    pages = [
        (pagemap_path(directory, pid), task.pages.style)
        for pid, task in memory.items()
        if task.pages is not None
    ]
    pages += [(shared_pagemap_path(directory, piece.shmid), piece.pages.style) for piece in shared]
    return Dump(directory, inventory, parents, tasks, MappingProxyType(memory), shared, one_style(pages))


def parent_chain(images_dir: StrPath) -> tuple[Path, ...]:
    """Follow ``parent`` from dump to dump; return the resolved directories, the nearest first."""
    chain: list[Path] = []
    seen = {os.path.realpath(images_dir)}
    link = Path(images_dir, "parent")
    while os.path.lexists(link):
        try:
            parent = link.resolve(strict=True)
            is_directory = parent.is_dir()
        except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, before Python 3.13
            reason = getattr(error, "strerror", None) or "it is a link that leads to itself"
            raise ImageError(
                link, None, f"expected the images that these are based on: {reason} (were they moved?)"
            ) from error
        if not is_directory:
            raise ImageError(link, None, "expected the images that these are based on, this is no directory")
        if str(parent) in seen:
            raise ImageError(
                link, None, f"expected a chain with an end, {parent} is in it already: fix the link"
            )
        seen.add(str(parent))
        chain.append(parent)
        link = parent / "parent"
    return tuple(chain)


def _read_inventory(directory: Path) -> Inventory:
    """Read the inventory of a dump that is complete, judging the directory by what it has and lacks.

    CRIU writes the inventory after all other images (criu/cr-dump.c): where
    it is missing and others are not, the dump goes on or has failed.
    """
    try:
        mode = directory.stat().st_mode
        names = {path.name for path in directory.iterdir()} if stat.S_ISDIR(mode) else None
    except OSError as error:
        raise ImageError(directory, None, f"expected a directory of images: {error.strerror}") from error
    if names is None:
        raise ImageError(directory, None, "expected a directory of images, this is a file")
    images = {name for name in names if name.endswith(".img")}
    if not images:
        what = "it has none" if names else "it is empty"
        raise ImageError(directory, None, f"expected a directory of images, {what}")
    if "inventory.img" not in names:
        if all(name.startswith(("pagemap-", "pages-")) for name in images):
            raise ImageError(
                directory,
                None,
                "expected the images of a dump, these are only pages as a page server writes them: "
                "copy the others here from where criu dump ran",
            )
        raise ImageError(
            directory / "inventory.img",
            None,
            "expected the image that CRIU writes last: the dump is going on, or has failed (see its log)",
        )
    inventory = read_inventory(directory)
    if "pstree.img" not in names and (
        inventory.is_pre_dump or not any(name.startswith("core-") for name in images)
    ):
        raise ImageError(
            directory / "pstree.img",
            None,
            "expected a process tree: this is a pre-dump, which has memory only; "
            "name the directory of the dump that followed it",
        )
    return inventory
