"""The command criupy-lazy-pages."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from criupy.errors import CriupyError, LazyPagesError
from criupy.lazy_pages._log import open_log
from criupy.lazy_pages._options import PROGRAM, Answer, LazyPagesOptions, UsageError, parse
from criupy.lazy_pages._progress import Progress, lead_nowhere, make_progress, summary

if TYPE_CHECKING:
    import socket

    import trio

    from criupy._tls.tls_linux import TlsContext
    from criupy.lazy_pages._daemon_linux import Config, LazyPages
    from criupy.lazy_pages._images import DumpedTask
    from criupy.lazy_pages._statistics import Statistics

__all__ = ["main"]

log = logging.getLogger("criupy.lazy_pages")

# A terminal that closes must not end what running tasks depend on: SIGHUP stops like SIGTERM.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# By default these would end the daemon at once, and what has not come would read as zeros.
_IGNORED_SIGNALS = (
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 when the restore was served."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv, environ=os.environ)
    except UsageError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    if isinstance(options, Answer):
        print(options.text, end="")
        return 0
    try:
        return _run(options)
    except CriupyError as error:
        if logging.getLogger("criupy").handlers:
            log.error("%s", error)  # noqa: TRY400 - one clear line, no traceback
        else:
            print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1


def _run(options: LazyPagesOptions) -> int:
    # The order is CRIU's: log, socket, background, status; so is what is relative to the work dir.
    # Everything that takes time or can fail comes before readiness is told: criu waits for nothing
    # once it has connected, and its tasks may run before we look.
    import trio

    from criupy.lazy_pages._daemon_linux import Config
    from criupy.lazy_pages._images import load_tasks
    from criupy.lazy_pages._process_linux import (
        bind_restore_socket,
        daemonize,
        lower_oom_score,
        raise_descriptor_limit,
        run_action_scripts,
        status_ready,
    )
    from criupy.lazy_pages._source_linux import adopt_source

    _check_inherited(options)
    if options.ps_socket is not None:
        # From here on our end, whatever causes it, is a reset, not a FIN: the source goes on.
        adopt_source(options.ps_socket, link_timeout=options.link_timeout)
    handler = open_log(options.verbosity, options.log_file, options.work_dir)
    for warning in options.warnings:
        log.warning("%s", warning)
    config = Config(
        images_dir=options.images_dir,
        page_server=options.page_server,
        ps_socket=options.ps_socket,
        frame_size=options.frame_size,
        connect_timeout=options.connect_timeout,
        link_timeout=options.link_timeout,
        stop_timeout=options.stop_timeout,
        on_failure=options.on_failure,
        tls=options.tls,
        source_name=options.source_name,
    )
    tls = None
    if options.tls is not None:
        from criupy._tls.tls_linux import TlsContext

        tls = TlsContext(options.tls, server=False)
    dumped = load_tasks(config.images_dir, local=not config.remote)
    listener = bind_restore_socket(options.work_dir)
    if options.daemon:
        child = daemonize()
        if child:
            _pidfile(options, child)
            return 0
    log.debug("oom_score_adj %s, RLIMIT_NOFILE %d", lower_oom_score(), raise_descriptor_limit())
    run_action_scripts(options.action_scripts, "status-ready", options.images_dir)
    # Until _stop_on_signal takes them: by default they would end a daemon that is needed.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
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

    from criupy.lazy_pages._daemon_linux import open_lazy_pages

    status = 0
    async with trio.open_nursery() as nursery:
        try:
            async with open_lazy_pages(
                config, work_dir=options.work_dir, dumped=dumped, listener=listener, tls=tls
            ) as daemon:
                await nursery.start(_stop_on_signal, daemon)
                nursery.start_soon(_show, progress, daemon)
        except LazyPagesError as error:
            log.error("%s", error)  # noqa: TRY400 - one clear line, no traceback
            status = 1
        nursery.cancel_scope.cancel()
    _report(options, progress, daemon.statistics())
    return status


def _check_inherited(options: LazyPagesOptions) -> None:
    from criupy.lazy_pages._process_linux import check_descriptor

    for option, descriptor in (("--status-fd", options.status_fd), ("--ps-socket", options.ps_socket)):
        if descriptor is not None:
            check_descriptor(option, descriptor)
    for name, directory in (("images", options.images_dir), ("work", options.work_dir)):
        if not directory.is_dir():
            raise LazyPagesError(f"--{name}-dir {directory}: no such directory")
    for descriptor in options.close_fds:
        with contextlib.suppress(OSError):  # closed already is what was wanted
            os.close(descriptor)


def _pidfile(options: LazyPagesOptions, child: int) -> None:
    from criupy.lazy_pages._process_linux import write_pidfile

    if options.pidfile is None:
        return
    try:
        write_pidfile(options.work_dir / options.pidfile, child)
    except LazyPagesError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


async def _stop_on_signal(daemon: LazyPages, *, task_status: trio.TaskStatus[None]) -> None:
    import trio

    with trio.open_signal_receiver(*_STOP_SIGNALS) as received:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        task_status.started()
        async for _ in received:
            daemon.stop()


async def _show(progress: Progress, daemon: LazyPages) -> None:
    import trio

    while True:
        progress.update(daemon.statistics())
        await trio.sleep(progress.interval)


def _report(options: LazyPagesOptions, progress: Progress, statistics: Statistics) -> None:
    progress.close(statistics)
    if options.display_stats:
        _display(summary(statistics), in_log=options.daemon)
    if options.stats_file is not None:
        _write_stats(options.work_dir / options.stats_file, statistics)


def _display(text: str, *, in_log: bool) -> None:
    if in_log:  # where else is nobody to read it
        for line in text.splitlines():
            log.info("%s", line)
        return
    try:
        print(text, flush=True)
    except OSError as error:
        lead_nowhere(sys.stdout)
        log.warning("--display-stats: %s", error.strerror)


def _write_stats(path: Path, statistics: Statistics) -> None:
    # Whoever sees the file sees all of it.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(statistics.to_json(), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise LazyPagesError(f"--stats-file {path}: {error.strerror}") from error
