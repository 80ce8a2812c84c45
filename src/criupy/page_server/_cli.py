"""The command criupy-page-server."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from criupy._command.log import open_log
from criupy._command.run import check_writable, display, run_command, write_stats, write_whole
from criupy._elsewhere import need_linux
from criupy.errors import CommandError, PageServerError
from criupy.page_server._access import at
from criupy.page_server._options import PageServerOptions, parse
from criupy.page_server._parser import PROGRAM
from criupy.page_server._statistics import Statistics, summary

if TYPE_CHECKING:
    import socket

    import trio

    from criupy.page_server._config import Config
    from criupy.page_server._images import ServedTask
    from criupy.page_server._server_linux import PageServer

__all__ = ["main", "report"]

log = logging.getLogger("criupy.page_server")

_ABORT_PATIENCE = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 when all that was asked for went or came whole."""
    return run_command(PROGRAM.name, argv, partial(parse, environ=os.environ), _run)


def _run(options: PageServerOptions) -> int:
    need_linux("this command")
    # The order is CRIU's: log, socket, background, scripts, status. Whatever can be wrong with images
    # and addresses is told before the background, while there is somebody to tell it to.
    import trio

    from criupy._command.process_linux import (
        check_inherited,
        daemonize,
        lower_oom_score,
        raise_descriptor_limit,
        run_action_scripts,
        write_child_pidfile,
    )
    from criupy._command.signals_linux import hold_signals

    if options.abort:
        return _abort(options)
    check_inherited(
        {"--status-fd": options.status_fd, "--ps-socket": options.ps_socket},
        {"--images-dir": options.images_dir, "--work-dir": options.work_dir},
        options.close_fds,
    )
    connection = None if options.ps_socket is None else _inherited(options.ps_socket)
    open_log(options.verbosity, options.log_file, options.work_dir)
    for warning in options.warnings:
        log.warning("%s", warning)
    if options.stats_file is not None:
        check_writable("--stats-file", options.work_dir / options.stats_file)
    options = _with_spool(options)
    tasks = _check_images(options)
    config = _configure(options, connection)
    ready = awaited = None
    if options.daemon:
        if options.upstream is not None:
            ready, awaited = os.pipe()
        child = daemonize()
        if child:
            if options.pidfile is not None:
                write_child_pidfile(options.work_dir / options.pidfile, child)
            if ready is not None and awaited is not None:
                os.close(awaited)
                _wait_for_relay(options, ready, child)
            return 0
        if ready is not None:
            os.close(ready)
    log.debug("oom_score_adj %s, RLIMIT_NOFILE %d", lower_oom_score(), raise_descriptor_limit())
    run_action_scripts(options.action_scripts, "status-ready", options.images_dir)
    hold_signals()  # by default they would end what destinations depend on
    return trio.run(_serve, options, config, tasks, awaited)


def _wait_for_relay(options: PageServerOptions, ready: int, child: int) -> None:
    """Wait until there is a marker to copy; raise CommandError when there will be none."""
    with open(ready, "rb") as pipe:
        if pipe.read(1):
            return
    os.waitpid(child, 0)
    if options.pidfile is not None:
        (options.work_dir / options.pidfile).unlink(missing_ok=True)
    raise CommandError("the relay ended before it was ready, its log (--log-file) says why")


def _abort(options: PageServerOptions) -> int:
    from criupy.page_server._control_linux import ABORT, SOCKET_NAME, ask

    print(ask(options.work_dir / SOCKET_NAME, ABORT, _ABORT_PATIENCE))  # noqa: T201
    return 0


def _with_spool(options: PageServerOptions) -> PageServerOptions:
    """Serve a spool that is complete in place of the source that has ended with it."""
    if options.upstream is None or options.spool is None:
        return options
    from criupy.page_server._spool import has_ended, is_complete

    if not is_complete(options.spool, options.images_dir):
        return options
    if not has_ended(options.spool):
        raise PageServerError(
            f"{options.spool}: it has everything, but its source was not seen to end: the process may go on "
            f"there. Where it does not, serve the spool: {PROGRAM.name} --lazy-pages -D {options.spool}"
        )
    log.info("%s has everything: it is served, and the source is not needed", options.spool)
    return replace(options, images_dir=options.spool, upstream=None, lazy_pages=True)


def _check_images(options: PageServerOptions) -> list[ServedTask]:
    """Tell what is wrong with the images; return what is served of them."""
    if options.upstream is not None:
        from criupy.page_server._relaying_linux import load_source

        load_source(options.images_dir)
        return []
    if options.lazy_pages:
        from criupy.page_server._images import load_tasks

        return list(load_tasks(options.images_dir))
    from criupy.page_server._receiver_linux import check_receiving

    check_receiving(options.images_dir, options.prev_images_dir)
    return []


def _inherited(fd: int) -> socket.socket:
    import socket

    try:
        connection = socket.socket(fileno=fd)
        connection.getpeername()
    except OSError as error:
        raise CommandError(f"--ps-socket {fd}: {error.strerror}; it has to be a connected socket") from error
    return connection


def _configure(options: PageServerOptions, connection: socket.socket | None) -> Config:
    """Listen, tell where, and put together how to serve."""
    from criupy.page_server._admission_linux import Admission
    from criupy.page_server._config import Config
    from criupy.page_server._socket_linux import listen

    if options.tls is not None:
        Admission(options.tls, options.address)  # to tell what is wrong with the files
    listener = None
    if connection is None:
        listener = listen(options.address, options.port)
        host, port = listener.getsockname()[:2]
        log.info("listening on %s", at(host, port))
        if options.port_file is not None:
            write_whole("--port-file", options.work_dir / options.port_file, f"{port}\n")
    return Config(
        images_dir=options.images_dir,
        address=options.address,
        listener=listener,
        connection=connection,
        allow=options.allow,
        # A dump is one connection: whoever waits for its images waits for our end, as for CRIU's.
        once=options.upstream is None and (options.once or not options.lazy_pages),
        max_connections=options.max_connections,
        stall_timeout=options.stall_timeout,
        idle_timeout=options.idle_timeout,
        tls=options.tls,
    )


async def _serve(
    options: PageServerOptions, config: Config, tasks: list[ServedTask], awaited: int | None
) -> int:
    import trio

    from criupy._command.process_linux import status_ready
    from criupy._command.signals_linux import stop_on_signal

    if options.upstream is not None:
        from criupy.page_server._relay_cli_linux import serve_relay

        return await serve_relay(options, config, awaited)
    async with _open(options, config, tasks) as server, trio.open_nursery() as nursery:
        await nursery.start(stop_on_signal, _Stopping(server, nursery, options.stop_timeout))
        failure = None
        try:
            if options.status_fd is not None:
                status_ready(options.status_fd)
            await server.wait()
        except CommandError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    report(options, server, received=not options.lazy_pages)
    statistics = server.statistics
    if config.once or config.connection is not None:
        _check_only(server, received=not options.lazy_pages)
    else:
        _check_all(statistics)
    return 0


def report(options: PageServerOptions, server: PageServer, *, received: bool, **more: Any) -> None:
    """Show and write the statistics as far as that was asked for."""
    if options.display_stats:
        display(summary(server.statistics, received=received), in_log=options.daemon)
    if options.stats_file is not None:
        write_stats(options.work_dir / options.stats_file, server.statistics.to_json() | more)


def _open(
    options: PageServerOptions, config: Config, tasks: list[ServedTask]
) -> AbstractAsyncContextManager[PageServer]:
    from criupy.page_server._receiver_linux import open_page_receiver
    from criupy.page_server._serving_linux import serve_tasks

    if options.lazy_pages:
        return serve_tasks(config, _taken(tasks))
    return open_page_receiver(config, prev_images_dir=options.prev_images_dir, auto_dedup=options.auto_dedup)


def _taken(tasks: list[ServedTask]) -> Iterator[ServedTask]:
    # What is in the native part is not kept here as well.
    tasks.reverse()
    while tasks:
        yield tasks.pop()


class _Stopping:
    """What a wish to stop does: the first one waits for who is connected, the second cuts them."""

    def __init__(self, server: PageServer, nursery: trio.Nursery, patience: float) -> None:
        self._server = server
        self._nursery = nursery
        self._patience = patience
        self._asked = False

    def __call__(self) -> None:
        if self._asked:
            self._server.cut()
            return
        self._asked = True
        log.info("asked to stop: %d are connected", len(self._server.connections()))
        self._server.stop()
        self._nursery.start_soon(self._lose_patience)

    async def _lose_patience(self) -> None:
        import trio

        await trio.sleep(self._patience)
        self._server.cut()


def _check_only(server: PageServer, *, received: bool) -> None:
    """Raise PageServerError unless the only connection ended as it should."""
    from criupy._uffd.server_linux import Ending

    last = server.last
    if last is None:
        raise PageServerError("no dump has come" if received else "no destination was served")
    if server.is_whole if received else last.ending is Ending.CLOSED:
        return
    if received and last.ending is Ending.CLOSED:
        raise PageServerError("the dump has ended, and no images came: it must have failed")
    if received:
        raise PageServerError("the dump did not come to its end, see the warning: no images of it are here")
    raise PageServerError(
        "the connection ended before the destination had closed its session: it may lack pages"
    )


def _check_all(statistics: Statistics) -> None:
    """Raise PageServerError when destinations lack pages because of this server."""
    if cut := statistics.ours["cut"]:
        raise PageServerError(f"asked to stop, and {cut} of those connected were cut: they may lack pages")
    if failed := statistics.ours.total():
        raise PageServerError(f"{failed} connections failed here, see the warnings: they may lack pages")
