"""Giving out what checkpoint images hold, to any number of destinations."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial

import trio

from criupy._uffd.image_linux import Image
from criupy._uffd.server_linux import Server
from criupy.page_server._config import Config
from criupy.page_server._images import ServedTask, load_tasks
from criupy.page_server._server_linux import PageServer, running

__all__ = ["open_page_server", "serve_tasks"]

log = logging.getLogger("criupy.page_server")


def _add_tasks(native: Server, config: Config, tasks: Iterable[ServedTask]) -> None:
    pages = 0
    for task in tasks:
        pages += _add_task(native, task)
    log.info("%s: %d lazy pages", config.images_dir, pages)


def _add_task(native: Server, task: ServedTask) -> int:
    entries = task.entries
    image = Image(task.pid, entries.starts, entries.nr_pages, entries.page_indices)
    fd = task.open()
    try:
        native.add_image(image, fd)
    except BaseException:
        os.close(fd)
        raise
    log.debug("task %d: %d lazy pages in %d extents", task.pid, sum(entries.nr_pages), len(entries.starts))
    return sum(entries.nr_pages)


@contextlib.asynccontextmanager
async def serve_tasks(config: Config, tasks: Iterable[ServedTask]) -> AsyncIterator[PageServer]:
    """Serve the lazy pages of tasks that have been read, or are read now, one after the other."""
    with Server(
        stall_timeout=config.stall_timeout,
        idle_timeout=config.idle_timeout,
        first_timeout=config.first_timeout,
    ) as native:
        await trio.to_thread.run_sync(partial(_add_tasks, native, config, tasks))
        server = PageServer(config, native)
        warning = "whoever reaches it is given the memory of these processes, in clear text"
        async with running(server, config, warning):
            yield server


def open_page_server(config: Config) -> AbstractAsyncContextManager[PageServer]:
    """Serve the lazy pages of images while the block runs, to any number of destinations.

    What is connected at the end of the block is cut, and so is a destination
    that asks for more after somebody has written to the images. Entering raises ImageError for
    images that cannot be served, PageServerError when it cannot listen, TlsError
    for files that TLS cannot be done with.
    """
    return serve_tasks(config, load_tasks(config.images_dir))
