"""Our daemon between the stand-in restorer and the minimal page server, as the tests arrange it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

from criupy._uffd._native import ffi, lib
from criupy.errors import LazyPagesError
from criupy.lazy_pages._daemon_linux import Config, LazyPages, open_lazy_pages
from criupy.lazy_pages._statistics import State
from criupy.testing.control_linux import Result
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.page_server import Behaviour, PageServer
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.testing.workload_linux import Standin, start_standin

MIB = 1 << 20
SPEC = WorkloadSpec(size=8 * MIB)

# linux/userfaultfd.h
_USER_MODE_ONLY = 1
_FEATURE_EVENT_FORK = 1 << 1
_FEATURE_POISON = 1 << 14


def _grants(flags: int, features: int) -> int | None:
    """The features a userfaultfd of this user offers, None where these may not be had."""
    fd = lib.criupy_uffd_open(os.O_CLOEXEC | flags)
    if fd < 0:
        return None
    try:
        offered = ffi.new("uint64_t *")
        granted: bool = lib.criupy_uffd_api(fd, features, offered) == 0
        return int(offered[0]) if granted else None
    finally:
        os.close(fd)


def user_faults() -> int:
    """A userfaultfd that nobody needs a privilege for."""
    fd = int(lib.criupy_uffd_open(os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY))
    assert fd >= 0
    assert lib.criupy_uffd_api(fd, 0, ffi.new("uint64_t *")) == 0
    return fd


_SEES_FORKS = any(_grants(flags, _FEATURE_EVENT_FORK) is not None for flags in (0, _USER_MODE_ONLY))
needs_forks = pytest.mark.skipif(not _SEES_FORKS, reason="UFFD_FEATURE_EVENT_FORK needs CAP_SYS_PTRACE")
needs_poison = pytest.mark.skipif(
    not (_grants(_USER_MODE_ONLY, 0) or 0) & _FEATURE_POISON, reason="UFFDIO_POISON needs Linux 6.6"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")


@dataclass(slots=True, eq=False)
class Serving:
    """``server`` is None when the pages come from the images."""

    daemon: LazyPages
    images: WrittenImages
    server: PageServer | None
    work: Path
    kept: socket.socket | None = None
    expected: list[LazyPagesError] = field(default_factory=list)

    @property
    def source(self) -> PageServer:
        assert self.server is not None
        return self.server

    async def failure(self) -> str:
        """Wait for the end, which must be a failure, told in one line."""
        with pytest.raises(LazyPagesError) as caught:
            await self.daemon.wait()
        self.expected.append(caught.value)
        text = str(caught.value)
        assert "\n" not in text
        return text

    async def handed_over(self, tasks: int | None = None) -> None:
        """Wait until the pager has this many tasks, by default all."""
        await until(lambda: self.daemon.statistics().tasks >= (tasks or self.images.spec.tree))

    async def transferring(self) -> None:
        """Wait until the daemon knows that the restore has finished."""
        await until(lambda: self.daemon.statistics().state is State.TRANSFERRING)

    async def source_goes_on(self) -> bool:
        """Wait until the source's connection has ended; whether its process resumes."""
        await self.source.ended.wait()
        assert self.source.end is not None
        return self.source.end.source_goes_on

    def restore(self, **options: Any) -> contextlib.AbstractAsyncContextManager[Standin]:
        room = self.work / "restorer"
        room.mkdir()
        return start_standin(self.images.spec, self.daemon.socket_path, room, **options)


@contextlib.asynccontextmanager
async def serve(
    room: Path,
    spec: WorkloadSpec = SPEC,
    *,
    behaviour: Behaviour | None = None,
    style: Literal["lazy", "full"] = "lazy",
    count: Literal["old", "new"] = "new",
    server_frame: Literal[24, 32] | None = None,
    address: str = "127.0.0.1",
    entry_pages: int = 1024,
    host: str | None = None,
    inherit: bool = False,
    images: WrittenImages | None = None,
    **config: Any,
) -> AsyncIterator[Serving]:
    """Run a daemon, with a page server unless the images are full.

    ``inherit``: the daemon is given a connected socket, of which ``kept`` is a duplicate. A failure that the
    body did not ask for with ``failure`` is raised; whatever the source was asked for must have been a lazy
    page.
    """
    if images is None:
        images = write_images(room / "images", spec, style=style, count=count, entry_pages=entry_pages)
    async with trio.open_nursery() as nursery:
        stack = contextlib.ExitStack()
        server = kept = None
        if style == "lazy":
            server = PageServer(images, behaviour or Behaviour(), frame_size=server_frame, address=address)
            await nursery.start(server.run)
            if inherit:
                kept = stack.enter_context(socket.create_connection((server.address, server.port)))
                config["ps_socket"] = os.dup(kept.fileno())
            elif not {"page_server", "ps_socket"} & config.keys():
                config["page_server"] = (host or server.address, server.port)
        serving: Serving | None = None
        try:
            async with open_lazy_pages(Config(images.directory, **config), work_dir=room / "work") as daemon:
                serving = Serving(daemon, images, server, room / "work", kept)
                yield serving
        except LazyPagesError as error:
            if serving is None or error not in serving.expected:
                raise
        finally:
            stack.close()
            if server is not None:
                if not server.accepted.is_set():
                    nursery.cancel_scope.cancel()
                assert server.violations == []
    assert not (room / "work" / "lazy-pages.socket").exists()


async def all_good(standin: Standin) -> None:
    """Every byte of every task is right."""
    for task in range(standin.spec.tree):
        result = await standin.worker(task).verify()
        assert result.is_good, (task, result)
        assert (
            result.checked == standin.spec.populated_pages or standin.spec.fragmented or standin.spec.reserve
        )


def no_lies(result: Result) -> None:
    """Pages may be missing, as a SIGBUS, but none is wrong and none is zeros where data was."""
    assert result.wrong == result.zero == result.unmapped == 0, result
