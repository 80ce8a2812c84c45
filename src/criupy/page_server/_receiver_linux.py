"""Receiving what ``criu dump --page-server`` sends: the answers that its connections need."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from criupy._uffd.server_linux import Account, Question, Server, punch_hole
from criupy.errors import ImageError, PageServerError
from criupy.images import PID_MAX, PagemapStyle, parent_chain
from criupy.page_server._config import Config
from criupy.page_server._server_linux import PageServer, running
from criupy.page_server._statistics import counted
from criupy.page_server._telling_linux import tell_upload
from criupy.page_server._writer import Finished, ImagesDirectory, UploadedImages
from criupy.wire.page_server import Command, ImageType, decode_image_id

__all__ = ["check_receiving", "open_page_receiver"]

log = logging.getLogger("criupy.page_server")

_LINK = "parent"


@dataclass(slots=True, eq=False)
class _Upload:
    """One connection's upload; ``why`` is what was refused, in words."""

    images: UploadedImages
    lock: trio.Lock = field(default_factory=trio.Lock)
    finished: Finished | None = None
    why: str | None = None


class Uploads:
    """All uploads into one directory."""

    def __init__(self, native: Server, directory: ImagesDirectory) -> None:
        self._native = native
        self._directory = directory
        self._uploads: dict[int, _Upload] = {}

    async def answer(self, question: Question) -> None:
        """Answer what a connection asked; what is refused ends it."""
        upload = self._uploads.setdefault(question.serial, _Upload(UploadedImages(self._directory)))
        fd = -1
        async with upload.lock:
            try:
                decide = partial(_decide, upload, self._directory, question)
                answer, fd = await trio.to_thread.run_sync(decide)
            except Exception as error:  # noqa: BLE001 - it is told, and costs this upload only
                answer, upload.why = _refusal(error)
                # Before the dumper hears of it.
                await trio.to_thread.run_sync(upload.images.discard)
            self._native.answer(question.serial, answer, fd)

    async def end(self, account: Account, peer: str) -> bool:
        """Discard what an ended connection left unfinished, tell of it, and whether all had come."""
        upload = self._uploads.get(account.serial)
        if upload is not None:
            async with upload.lock:
                await trio.to_thread.run_sync(upload.images.discard)
            del self._uploads[account.serial]
        finished, why = (None, None) if upload is None else (upload.finished, upload.why)
        if finished is not None:
            for warning in finished.warnings:
                log.warning("connection %d: %s", account.serial, warning)
        lost = upload is not None and upload.images.has_cost_the_old
        tell_upload(account, peer, finished, why, has_cost_the_old=lost)
        return finished is not None and finished.images > 0

    def discard(self) -> None:
        """Discard what all connections left unfinished; they have been cut."""
        for upload in self._uploads.values():
            upload.images.discard()
        self._uploads.clear()


def _refusal(error: Exception) -> tuple[int, str]:
    """Return what to answer, and what to say."""
    if isinstance(error, ImageError):
        return -errno.EINVAL, str(error)
    if not isinstance(error, OSError):  # nor does it end other dumps
        log.error("this should not be possible; please report it", exc_info=error)
        return -errno.EIO, f"{type(error).__name__}: {error}"
    said = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
    return -(error.errno or errno.EIO), said


def _decide(upload: _Upload, directory: ImagesDirectory, question: Question) -> tuple[int, int]:
    """Return the answer, and for an image that is opened a descriptor of its pages, to be given away."""
    command = Command(question.command)
    if command is Command.PARENT:
        return int(directory.has_parent(*_image_id(question))), -1
    upload.images.finish(question.starts, question.nr_pages, question.flags)
    if command in {Command.CLOSE, Command.FORCE_CLOSE}:
        upload.finished = upload.images.commit()
        return 0, -1
    # Whoever restores has the version of whoever dumped, and CRIU before 4.2 knows only the old style.
    style = PagemapStyle.OLD if question.frame_size == 24 else PagemapStyle.NEW
    fd, has_parent = upload.images.open(*_image_id(question), style)
    return int(has_parent), os.dup(fd)


def _image_id(question: Question) -> tuple[ImageType, int]:
    decoded = decode_image_id(question.id)
    if decoded is None:  # the native part knows the same types
        raise OSError(errno.EINVAL, f"{question.id:#x} names no pagemap")
    if decoded[0] is ImageType.TASK and not 0 < decoded[1] <= PID_MAX:
        raise OSError(errno.EINVAL, f"{decoded[1]} is the pid of no process")
    return decoded


# ---- the directory -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Keep other page servers of ours from receiving into a directory; tell whether that can be."""
    is_ours = True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise PageServerError(f"{path}: {error.strerror}; see --images-dir") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PageServerError(f"{path}: another page server receives into it") from error
        except OSError as error:  # not every file system can
            log.warning(
                "%s cannot be locked (%s): let no other page server receive into it", path, error.strerror
            )
            is_ours = False
        yield is_ours
    finally:
        os.close(fd)


def _check_previous(images_dir: Path, target: str) -> None:
    link = images_dir / _LINK
    if not (images_dir / target).is_dir():
        raise PageServerError(f"{images_dir / target}: no such directory; see --prev-images-dir")
    parent_chain(images_dir / target)
    if os.path.lexists(link) and not (link.exists() and link.samefile(images_dir / target)):
        raise PageServerError(
            f"{link}: it is there already, and does not lead to {target}; see --prev-images-dir"
        )


@contextlib.contextmanager
def _linked(directory: ImagesDirectory, previous: str | os.PathLike[str] | None) -> Iterator[None]:
    """Make the link that CRIU finds the previous images by, as it does; it stays when images came."""
    link = directory.path / _LINK
    if previous is None or os.path.lexists(link):
        yield
        return
    target = os.fspath(previous)
    try:
        link.symlink_to(target)
    except OSError as error:
        raise PageServerError(f"{link}: {error.strerror}") from error
    if Path(target).is_absolute():
        log.warning(
            "%s leads to %s whatever becomes of the images; a relative --prev-images-dir moves with them",
            link,
            target,
        )
    try:
        yield
    finally:
        if not directory.nr_committed:
            with contextlib.suppress(OSError):
                link.unlink()


def _prepare(
    directory: ImagesDirectory, previous: str | os.PathLike[str] | None, *, is_ours: bool
) -> tuple[Path, ...]:
    """Make the directory ready, and return the parents of what it will hold."""
    if previous is not None:
        _check_previous(directory.path, os.fspath(previous))
        previous = directory.path / previous
        parents: tuple[Path, ...] = (previous, *parent_chain(previous))
    else:
        parents = directory.parents()
    try:
        with tempfile.TemporaryFile(dir=directory.path):
            pass  # that nothing can be written is told now, and not when a dump comes
        removed = directory.remove_left_overs() if is_ours else 0
    except OSError as error:
        raise PageServerError(f"{directory.path}: {error.strerror}; see --images-dir") from error
    if removed:
        log.info("%s: removed %s of an upload that was interrupted", directory.path, counted(removed, "file"))
    return parents


def check_receiving(images_dir: Path, prev_images_dir: str | os.PathLike[str] | None) -> None:
    """Raise what open_page_receiver would say of the directory now, while there is somebody to hear it."""
    with _claimed(images_dir) as is_ours:
        _prepare(ImagesDirectory(images_dir), prev_images_dir, is_ours=is_ours)


@contextlib.asynccontextmanager
async def open_page_receiver(
    config: Config,
    *,
    prev_images_dir: str | os.PathLike[str] | None = None,
    auto_dedup: bool = False,
) -> AsyncIterator[PageServer]:
    """Receive the pages that CRIU dumps with ``--page-server``, while the block runs.

    They become images in ``config.images_dir``, which ``criu restore`` reads
    when those that the dump itself wrote are beside them. Nothing has its name
    there before all of it has come, and of a connection that is cut at the end
    of the block nothing stays. Whether the dump succeeded CRIU tells to its
    caller, and not here.

    ``prev_images_dir`` makes the link to the images of the dump before,
    relative to ``config.images_dir``, as CRIU's option does; a link that is
    there is followed anyway. ``auto_dedup`` gives back what those have and
    this dump has anew, if its ``inventory.img`` is there by then. Raises
    PageServerError when it cannot receive there or cannot listen, ImageError
    when the images before cannot be followed.
    """
    directory = ImagesDirectory(config.images_dir, auto_dedup=auto_dedup, punch_hole=punch_hole)
    native = Server(
        stall_timeout=config.stall_timeout,
        idle_timeout=config.idle_timeout,
        first_timeout=config.first_timeout,
        receives=True,
    )
    uploads = Uploads(native, directory)
    with native, _claimed(config.images_dir) as is_ours:
        parents = await trio.to_thread.run_sync(
            partial(_prepare, directory, prev_images_dir, is_ours=is_ours)
        )
        based = f", based on {parents[0]}" if parents else ""
        log.info("%s: receives images%s", directory.path, based)
        server = PageServer(config, native, uploads)
        with _linked(directory, prev_images_dir):
            try:
                async with running(server, config, "whoever reaches it can write images here"):
                    yield server
            finally:
                native.close()  # no thread writes any more
                uploads.discard()
