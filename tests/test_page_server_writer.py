"""Uploaded images get their names all or none, whatever fails and whenever the machine goes down."""

from __future__ import annotations

import errno
import operator
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, combinations, count
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import pytest

from criupy.images import (
    PagemapStyle,
    check_pages,
    pagemap_path,
    pages_path,
    read_pagemap,
    read_shared_pagemap,
)
from criupy.page_server._writer import ImagesDirectory, UploadedImages
from criupy.wire.page_server import ImageType

PAGE = 4096
IMAGES = {
    "pagemap-7.img": (ImageType.TASK, 7),
    "pagemap-8.img": (ImageType.TASK, 8),
    "pagemap-shmem-9.img": (ImageType.SHMEM, 9),
}
ALL_NEW = dict.fromkeys(IMAGES, 2)

#: What was called, and the names it was given.
Call: TypeAlias = tuple[str, ...]


def upload(directory: ImagesDirectory, version: int) -> UploadedImages:
    """Upload all images but for the commit; the version is in all bytes of their pages."""
    images = UploadedImages(directory)
    for image_type, number in IMAGES.values():
        fd, _ = images.open(image_type, number, PagemapStyle.NEW)
        os.write(fd, bytes([version]) * PAGE)
        images.finish(array("Q", [PAGE * number]), array("Q", [1]), array("B", [4]))
    return images


def versions(directory: Path) -> dict[str, int]:
    """Tell of which upload each pagemap is, all of whose pages must be there."""
    found = {}
    for name, (image_type, number) in IMAGES.items():
        if (directory / name).exists():
            read = read_shared_pagemap if image_type is ImageType.SHMEM else read_pagemap
            content = check_pages(directory, read(directory, number)).read_bytes()
            assert content == content[:1] * PAGE
            found[name] = content[0]
    return found


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@contextmanager
def disk(fails: Callable[[], bool] = bool) -> Iterator[list[Call]]:
    """Yield what is done about names, as it grows; a call for which ``fails`` says so does nothing else."""
    done: list[Call] = []

    def patched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if fails():
                raise OSError(errno.EIO, "Input/output error", name)
            done.append((name, *(path.name for path in arguments if isinstance(path, Path))))
            return real(*arguments)

        return call

    with (
        mock.patch.object(Path, "replace", patched("replace", Path.replace)),
        mock.patch.object(Path, "unlink", patched("unlink", Path.unlink)),
        mock.patch.object(os, "fsync", patched("fsync", os.fsync)),
    ):
        yield done


@dataclass(frozen=True)
class Outcome:
    """What a commit came to, one of whose calls failed; ``before`` are the names that were there."""

    images: UploadedImages
    path: Path
    before: set[str]
    done: list[Call]
    calls: int
    failed: bool

    @property
    def is_before(self) -> bool:
        """Tell whether nothing old has gone yet."""
        return ("unlink", "pagemap-7.img") not in self.done


def commit(path: Path, fails: Callable[[int, int], bool], n: int, *, old: bool) -> Outcome:
    directory = ImagesDirectory(path)
    if old:
        upload(directory, 1).commit()
    before = names(path)
    images = upload(directory, 2)
    numbers = count()
    failed = False
    with disk(lambda: fails(next(numbers), n)) as done:
        try:
            images.commit()
        except OSError:
            failed = True
    return Outcome(images, path, before, done, next(numbers), failed)


def commit_failing_everywhere(
    tmp_path: Path, fails: Callable[[int, int], bool], *, old: bool
) -> Iterator[Outcome]:
    """Commit again and again, with another call failing each time, until there is none left to fail."""
    for n in count():
        path = tmp_path / str(n)
        path.mkdir()
        outcome = commit(path, fails, n, old=old)
        yield outcome
        if outcome.calls <= n:
            assert not outcome.failed
            assert n == (15 if old else 8)
            return


@pytest.mark.parametrize("old", [False, True])
def test_a_call_that_fails(old: bool, tmp_path: Path) -> None:
    for outcome in commit_failing_everywhere(tmp_path, operator.eq, old=old):
        path = outcome.path
        if not outcome.failed:
            assert versions(path) == ALL_NEW
            continue
        outcome.images.discard()
        left = versions(path)
        if outcome.is_before:
            assert names(path) == outcome.before
        else:
            assert len(left) < len(IMAGES)
            assert set(left.values()) <= {1}
            assert len(names(path)) == 2 * len(left)  # no pages of nobody
        # The names are free again.
        upload(outcome.images._directory, 3).commit()
        assert versions(path) == dict.fromkeys(IMAGES, 3)
        assert len(names(path)) == 2 * len(IMAGES)


@pytest.mark.parametrize("old", [False, True])
def test_a_disk_that_is_gone(old: bool, tmp_path: Path) -> None:
    """From some call on all fail, also those that would take something back."""
    for outcome in commit_failing_everywhere(tmp_path, operator.ge, old=old):
        left = versions(outcome.path)
        assert left == ALL_NEW if not outcome.failed else len(set(left.values())) <= 1
        if outcome.is_before:
            assert outcome.before <= names(outcome.path)
        # The server that comes after it can go on.
        directory = ImagesDirectory(outcome.path)
        directory.remove_left_overs()
        upload(directory, 3).commit()
        assert versions(outcome.path) == dict.fromkeys(IMAGES, 3)


@pytest.mark.parametrize("old", [False, True])
def test_a_machine_that_goes_down(old: bool, tmp_path: Path) -> None:
    """Of what was done since the last fsync, any part may be on disk."""
    images_dir = tmp_path / "images"
    images_dir.mkdir()
    directory = ImagesDirectory(images_dir)
    if old:
        upload(directory, 1).commit()
    images = upload(directory, 2)
    on_disk = {path.name: path.read_bytes() for path in images_dir.iterdir()}
    with disk() as done:
        images.commit()
    seen = set()
    numbers = count()
    for step in steps(done):
        for part in chain.from_iterable(combinations(step, length) for length in range(len(step) + 1)):
            path = tmp_path / str(next(numbers))
            path.mkdir()
            for name, content in after(on_disk, part).items():
                (path / name).write_bytes(content)
            left = versions(path)
            (version,) = set(left.values()) or {0}
            seen.add((version, len(left)))
        on_disk = after(on_disk, step)
    assert seen == {(0, 0), (2, 1), (2, 2), (2, 3)} | ({(1, 1), (1, 2), (1, 3)} if old else set())


def steps(done: list[Call]) -> Iterator[list[Call]]:
    """Split calls by what is on disk before what."""
    step: list[Call] = []
    for call in done:
        if call[0] == "fsync":
            yield step
            step = []
        else:
            step.append(call)
    yield step


def after(files: dict[str, bytes], calls: Iterable[Call]) -> dict[str, bytes]:
    """Return the files of a directory after calls."""
    files = dict(files)
    for name, path, *to in calls:
        content = files.pop(path)
        if name == "replace":
            files[to[0]] = content
    return files


def test_pages_that_were_removed_by_somebody(tmp_path: Path) -> None:
    """The old pagemaps tell of numbers that the new pages have now."""
    upload(ImagesDirectory(tmp_path), 1).commit()
    for path in tmp_path.glob("pages-*"):
        path.unlink()
    upload(ImagesDirectory(tmp_path), 2).commit()
    assert pages_path(tmp_path, read_pagemap(tmp_path, 7).pages_id).name == "pages-65537.img"
    assert versions(tmp_path) == ALL_NEW


def test_a_pagemap_that_cannot_be_read_is_replaced(tmp_path: Path) -> None:
    pagemap_path(tmp_path, 8).write_bytes(b"nothing")
    upload(ImagesDirectory(tmp_path), 2).commit()
    assert versions(tmp_path) == ALL_NEW


def test_only_what_was_made_here_is_discarded(tmp_path: Path) -> None:
    """Where no lock keeps another server away."""
    theirs = tmp_path / "pagemap-7.img.partial"
    theirs.touch()
    images = UploadedImages(ImagesDirectory(tmp_path))
    images.open(ImageType.TASK, 7, PagemapStyle.NEW)
    with pytest.raises(FileExistsError):
        images.finish(array("Q", []), array("Q", []), array("B", []))
    images.discard()
    assert list(tmp_path.iterdir()) == [theirs]


def test_a_commit_that_fails_says_what_it_has_cost(tmp_path: Path) -> None:
    images = upload(ImagesDirectory(tmp_path), 1)
    with mock.patch.object(Path, "replace", side_effect=OSError(errno.EIO, "no")), pytest.raises(OSError):
        images.commit()
    assert not images.has_cost_the_old
    images.discard()
    upload(ImagesDirectory(tmp_path), 1).commit()
    images = upload(ImagesDirectory(tmp_path), 2)
    replace = Path.replace
    late = mock.Mock(side_effect=[*[mock.DEFAULT] * 3, OSError(errno.EIO, "no")])

    def fail(self: Path, target: Path) -> Path:
        late()
        return replace(self, target)

    with mock.patch.object(Path, "replace", fail), pytest.raises(OSError):
        images.commit()
    assert images.has_cost_the_old


def test_a_file_that_cannot_be_closed_is_closed_once(tmp_path: Path) -> None:
    images = UploadedImages(ImagesDirectory(tmp_path))
    fd, _ = images.open(ImageType.TASK, 7, PagemapStyle.NEW)
    with mock.patch.object(os, "close", side_effect=OSError(errno.EDQUOT, "no")) as close:
        images.discard()
        images.discard()
    close.assert_called_once_with(fd)
    os.close(fd)
    assert list(tmp_path.iterdir()) == []
