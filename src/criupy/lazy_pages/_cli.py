"""The command criupy-lazy-pages."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from criupy._command.log import open_log
from criupy._command.run import check_writable, display, run_command, write_stats
from criupy.errors import LazyPagesError
from criupy.lazy_pages._options import LazyPagesOptions, parse
from criupy.lazy_pages._parser import PROGRAM
from criupy.lazy_pages._progress import Progress, make_progress, summary

if TYPE_CHECKING:
    import socket

    from criupy._tls.tls_linux import TlsContext
    from criupy.lazy_pages._daemon_linux import Config, LazyPages
    from criupy.lazy_pages._images import DumpedTask
    from criupy.lazy_pages._statistics import Statistics

__all__ = ["main"]

log = logging.getLogger("criupy.lazy_pages")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 when the restore was served."""
    return run_command(PROGRAM.name, argv, partial(parse, environ=os.environ), _run)


def _run(options: LazyPagesOptions) -> int:
    # The order is CRIU's: log, socket, background, status; so is what is relative to the work dir.
    # Everything that takes time or can fail comes before readiness is told: criu waits for nothing
    # once it has connected, and its tasks may run before we look.
    import trio

    from criupy._command.process_linux import (
        check_inherited,
        daemonize,
        lower_oom_score,
        raise_descriptor_limit,
        run_action_scripts,
        status_ready,
        write_child_pidfile,
    )
    from criupy._command.signals_linux import hold_signals
    from criupy.lazy_pages._config import Config
    from criupy.lazy_pages._extension_linux import extension_for
    from criupy.lazy_pages._images import load_tasks
    from criupy.lazy_pages._restore_socket_linux import bind_restore_socket
    from criupy.lazy_pages._source_linux import adopt_source

    check_inherited(
        {"--status-fd": options.status_fd, "--ps-socket": options.ps_socket},
        {"--images-dir": options.images_dir, "--work-dir": options.work_dir},
        options.close_fds,
    )
    if options.ps_socket is not None:
        # From here on our end, whatever causes it, is a reset, not a FIN: the source goes on.
        adopt_source(options.ps_socket, link_timeout=options.link_timeout)
    handler = open_log(options.verbosity, options.log_file, options.work_dir)
    for warning in options.warnings:
        log.warning("%s", warning)
    if options.stats_file is not None:
        check_writable("--stats-file", options.work_dir / options.stats_file)
    config = Config(
        images_dir=options.images_dir,
        page_server=options.page_server,
        ps_socket=options.ps_socket,
        frame_size=options.frame_size,
        connect_timeout=options.connect_timeout,
        link_timeout=options.link_timeout,
        stop_timeout=options.stop_timeout,
        on_failure=options.on_failure,
        reconnect=options.reconnect,
        extended=options.extended,
        lanes=options.lanes,
        busy_poll=options.busy_poll,
        tls=options.tls,
        source_name=options.source_name,
    )
    tls = None
    if options.tls is not None:
        from criupy._tls.tls_linux import TlsContext

        tls = TlsContext(options.tls, server=False)
    dumped = load_tasks(config.images_dir, local=not config.remote)
    extension_for(config, dumped)  # what cannot be done with this page server is told now
    listener = bind_restore_socket(options.work_dir)
    if options.daemon:
        child = daemonize()
        if child:
            if options.pidfile is not None:
                write_child_pidfile(options.work_dir / options.pidfile, child)
            return 0
    log.debug("oom_score_adj %s, RLIMIT_NOFILE %d", lower_oom_score(), raise_descriptor_limit())
    run_action_scripts(options.action_scripts, "status-ready", options.images_dir)
    hold_signals()  # by default they would end a daemon that is needed
    if options.status_fd is not None:
        status_ready(options.status_fd)
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
    import trio

    from criupy._command.signals_linux import stop_on_signal
    from criupy.lazy_pages._daemon_linux import open_lazy_pages

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
    import trio

    while True:
        progress.update(daemon.statistics())
        await trio.sleep(progress.interval)


def _report(options: LazyPagesOptions, progress: Progress, statistics: Statistics) -> None:
    progress.close(statistics)
    if options.display_stats:
        display(summary(statistics), in_log=options.daemon)
    if options.stats_file is not None:
        write_stats(options.work_dir / options.stats_file, statistics.to_json())
