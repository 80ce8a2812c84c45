"""The command criupy-lazy-pages."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial

from criupy._command.log import open_log
from criupy._command.run import check_writable, run_command
from criupy._elsewhere import need_linux
from criupy.lazy_pages._options import LazyPagesOptions, parse
from criupy.lazy_pages._parser import PROGRAM

__all__ = ["main"]

log = logging.getLogger("criupy.lazy_pages")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 when the restore was served."""
    return run_command(PROGRAM.name, argv, partial(parse, environ=os.environ), _run)


def _run(options: LazyPagesOptions) -> int:
    need_linux("this command")
    # The order is CRIU's: log, socket, background, status; so is what is relative to the work dir.
    # Whatever may be wrong with what we were given is told before readiness: criu waits for nothing
    # once it has connected, and its tasks may run before we look. But the restore waits for
    # readiness, so what is needed only to serve it (trio is half of the start-up) is loaded while
    # criu starts; should it connect meanwhile, it is let in then.
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
    from criupy.lazy_pages._images_linux import load_tasks
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
    # A descriptor for each pages file, and later one for each task and fork.
    log.debug("oom_score_adj %s, RLIMIT_NOFILE %d", lower_oom_score(), raise_descriptor_limit())
    dumped = load_tasks(config.images_dir, local=not config.remote)
    if config.page_server is not None:
        from criupy.lazy_pages._extension import extension_for

        extension_for(config, dumped)  # what cannot be done with this page server is told now
    listener = bind_restore_socket(options.work_dir, held=True)
    if options.daemon:
        child = daemonize()
        if child:
            if options.pidfile is not None:
                write_child_pidfile(options.work_dir / options.pidfile, child)
            return 0
    run_action_scripts(options.action_scripts, "status-ready", options.images_dir)
    hold_signals()  # by default they would end a daemon that is needed
    if options.status_fd is not None:
        status_ready(options.status_fd)
    from criupy.lazy_pages._serving_linux import serve

    return serve(options, config, dumped, listener, tls, handler)
