"""The command criupy-lazy-pages once it is ready: what happens from criu's connect to the last line."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Mapping

import trio

from criupy._command.log import LogHandler
from criupy._command.run import display, write_stats
from criupy._command.signals_linux import stop_on_signal
from criupy._tls.tls_linux import TlsContext
from criupy.errors import LazyPagesError
from criupy.lazy_pages._config import Config
from criupy.lazy_pages._daemon_linux import LazyPages, open_lazy_pages
from criupy.lazy_pages._images_linux import DumpedTask
from criupy.lazy_pages._options import LazyPagesOptions
from criupy.lazy_pages._progress import Progress, make_progress, summary
from criupy.lazy_pages._restore_socket_linux import let_in
from criupy.lazy_pages._statistics import Statistics

__all__ = ["serve"]

log = logging.getLogger("criupy.lazy_pages")


def serve(
    options: LazyPagesOptions,
    config: Config,
    dumped: Mapping[int, DumpedTask],
    listener: socket.socket,
    tls: TlsContext | None,
    handler: LogHandler,
) -> int:
    """Serve one restore and return the exit status."""
    let_in(listener)
    progress = make_progress(options.progress, sys.stderr, background=options.daemon)
    if options.log_file is None:
        handler.divert(progress.print_above)
    try:
        return trio.run(_serve, options, config, dumped, listener, tls, progress)
    finally:
        handler.divert(None)


async def _serve(
    options: LazyPagesOptions,
    config: Config,
    dumped: Mapping[int, DumpedTask],
    listener: socket.socket,
    tls: TlsContext | None,
    progress: Progress,
) -> int:
    status = 0
    async with trio.open_nursery() as nursery:
        try:
            async with open_lazy_pages(
                config, work_dir=options.work_dir, dumped=dumped, listener=listener, tls=tls
            ) as daemon:
                await nursery.start(stop_on_signal, daemon.stop)
                nursery.start_soon(_show, progress, daemon)
        except LazyPagesError as error:
            log.error("%s", error)  # noqa: TRY400 - one clear line, no traceback
            status = 1
        nursery.cancel_scope.cancel()
    _report(options, progress, daemon.statistics())
    return status


async def _show(progress: Progress, daemon: LazyPages) -> None:
    while True:
        progress.update(daemon.statistics())
        await trio.sleep(progress.interval)


def _report(options: LazyPagesOptions, progress: Progress, statistics: Statistics) -> None:
    progress.close(statistics)
    if options.display_stats:
        display(summary(statistics), in_log=options.daemon)
    if options.stats_file is not None:
        write_stats(options.work_dir / options.stats_file, statistics.to_json())
