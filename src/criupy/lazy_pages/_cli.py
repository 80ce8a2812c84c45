"""The command criupy-lazy-pages."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from criupy.errors import CriupyError, LazyPagesError
from criupy.lazy_pages._log import open_log
from criupy.lazy_pages._options import Answer, LazyPagesOptions, UsageError, parse

if TYPE_CHECKING:
    import socket

    from criupy.lazy_pages._daemon_linux import LazyPages
    from criupy.lazy_pages._statistics import Statistics

__all__ = ["main"]

log = logging.getLogger("criupy.lazy_pages")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 when the restore was served."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"criupy-lazy-pages: {error}", file=sys.stderr)
        return 1
    if isinstance(options, Answer):
        print(options.text)
        return 0
    try:
        return _run(options)
    except CriupyError as error:
        _say(error)
        return 1


def _say(error: CriupyError) -> None:
    if logging.getLogger("criupy").handlers:
        log.error("%s", error)
    else:
        print(f"criupy-lazy-pages: {error}", file=sys.stderr)


def _run(options: LazyPagesOptions) -> int:
    # The order is CRIU's: images, work dir, log, socket, background, status, pidfile.
    from criupy.lazy_pages._process_linux import (
        bind_restore_socket,
        daemonize,
        lower_oom_score,
        raise_descriptor_limit,
        status_ready,
        write_pidfile,
    )

    if not options.images_dir.is_dir():
        raise LazyPagesError(f"images dir {options.images_dir}: no such directory; see --images-dir")
    if not options.work_dir.is_dir():
        raise LazyPagesError(f"work dir {options.work_dir}: no such directory; see --work-dir")
    open_log(options.verbosity, options.log_file, options.work_dir)
    for warning in options.warnings:
        log.warning("%s", warning)
    for fd in options.close_fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    listener = bind_restore_socket(options.work_dir)
    if options.daemon:
        child = daemonize()
        if child:
            if options.pidfile is not None:
                try:
                    write_pidfile(options.work_dir / options.pidfile, child)
                except LazyPagesError:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    raise
            return 0
    elif options.pidfile is not None:
        write_pidfile(options.work_dir / options.pidfile, os.getpid())
    log.debug("oom_score_adj %d, RLIMIT_NOFILE %d", lower_oom_score(), raise_descriptor_limit())
    if options.status_fd is not None:
        status_ready(options.status_fd)
    # trio comes after the fork, and after whoever waits for the socket has been told.
    import trio

    return trio.run(_serve, options, listener)


async def _serve(options: LazyPagesOptions, listener: socket.socket) -> int:
    import trio

    from criupy.lazy_pages._daemon_linux import Config, open_lazy_pages
    from criupy.lazy_pages._progress import show_progress

    config = Config(
        images_dir=options.images_dir,
        page_server=options.page_server,
        ps_socket=options.ps_socket,
        frame_size=options.frame_size,
        connect_timeout=options.connect_timeout,
        link_timeout=options.link_timeout,
        stop_timeout=options.stop_timeout,
        on_failure=options.on_failure,
    )
    status = 0
    async with trio.open_nursery() as nursery, open_lazy_pages(
        config, work_dir=options.work_dir, listener=listener
    ) as daemon:
        nursery.start_soon(_stop_on_signal, daemon)
        await show_progress(daemon, options)
        try:
            statistics = await daemon.wait()
        except LazyPagesError as error:
            status = 1
            log.error("%s", error)
            statistics = daemon.statistics()
        nursery.cancel_scope.cancel()
    return status
