"""Making a directory to restore from, in which what parents hold is lazy."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from criupy.errors import ImageError
from criupy.images._framing import StrPath
from criupy.images._original import LAZY_PARENTS, original_images, original_text
from criupy.images._pagemap_writer import write_pagemap
from criupy.images._parents import lazy_parents
from criupy.images._stats import RESTORE_STATS
from criupy.images._tasks import is_zombie, read_inventory, read_pstree

# What a restore or its daemon writes would be written through a link.
_NOT_LINKED: Final = frozenset((RESTORE_STATS, LAZY_PARENTS))
_NOT_LINKED_SUFFIXES: Final = (".log", ".pid")


def write_lazy_parents(images_dir: StrPath, new_dir: StrPath) -> int:
    """Make a directory to restore a dump from, in which the pages are lazy that its parents hold.

    ``new_dir`` must not exist. Every file of the dump becomes a relative symbolic link there,
    and only pagemaps are written anew; the dump and its parents stay as they are, and have to
    stay where they are. It is for ``criu restore --lazy-pages`` with a daemon of criupy on the
    same directory: that fills in from the parents what they hold. Return how many
    pages became lazy. Raise an ImageError when it cannot be made, and leave nothing then.
    """
    source, target = Path(images_dir), Path(new_dir)
    # A path through symbolic links may not be what ".." leads back along.
    real_source, real_target = _places(source, target)
    read_inventory(source)
    found = [lazy_parents(source, task) for task in read_pstree(source) if not is_zombie(source, task.pid)]
    try:
        target.mkdir()
    except OSError as error:
        raise ImageError(target, None, f"expected to make this directory: {error.strerror}") from error
    try:
        to_source = os.path.relpath(real_source, real_target)
        written = {memory.dumped.path.name for memory in found}
        for path in sorted(source.iterdir()):
            if path.name == "parent":
                # As CRIU does: an absolute one leads elsewhere in a container's mount namespace.
                (target / "parent").symlink_to(os.path.relpath(path.resolve(), real_target))
            elif path.name not in written and _is_to_link(path):
                (target / path.name).symlink_to(f"{to_source}/{path.name}")
        for memory in found:
            made = memory.pagemap
            style = made.style
            if style is None:
                (target / made.path.name).symlink_to(f"{to_source}/{made.path.name}")
                continue
            with (target / made.path.name).open("wb") as file:
                write_pagemap(file, made.pages_id, made.starts, made.nr_pages, made.flags, style)
        (target / LAZY_PARENTS).write_text(original_text(to_source))
    except BaseException as error:
        # Without its marker it would pass for a dump.
        _remove(target)
        if isinstance(error, OSError):
            raise ImageError(target, None, f"it cannot be made: {error}") from error
        raise
    return sum(
        nr
        for memory in found
        for nr, present in zip(memory.entries.nr_pages, memory.entries.present, strict=True)
        if present
    )


def _places(source: Path, target: Path) -> tuple[Path, Path]:
    """Return where the two really are, or refuse them."""
    if original_images(source) != source:
        raise ImageError(source, None, "expected a dump, this was made of one by criupy lazy-parents already")
    real_source, real_target = source.resolve(), target.resolve()
    if real_source in real_target.parents:
        raise ImageError(target, None, f"expected a place outside of the dump, {source} stays as it is")
    return real_source, real_target


def _is_to_link(path: Path) -> bool:
    # A directory (podman puts some beside the images) as well, but no socket.
    mode = path.stat(follow_symlinks=False).st_mode
    return (
        (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode))
        and path.name not in _NOT_LINKED
        and not path.name.endswith(_NOT_LINKED_SUFFIXES)
    )


def _remove(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
