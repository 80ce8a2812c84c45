"""The command line of criupy-lazy-pages: what CRIU's takes, and a little more."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from criupy._command.line import Answer, common_warnings, read_line, tls_details, tls_files
from criupy._command.parser import DEFAULT_VERBOSITY, UsageError
from criupy._tls.files import TlsFiles
from criupy.lazy_pages._parser import PROGRAM, build_parser

__all__ = ["LazyPagesOptions", "parse"]


@dataclass(frozen=True, slots=True)
class LazyPagesOptions:
    """A command line, understood.

    Paths are as written: ``log_file`` (``-`` is standard output), ``pidfile``
    and ``stats_file`` are relative to ``work_dir``, everything else to the
    current directory. Timeouts are in seconds. ``frame_size`` None is what the
    images tell. ``page_server`` is (host, port), ``ps_socket`` the descriptor
    of a connected socket; with neither, pages come from the images. With ``tls``
    the certificate at the other end of ``ps_socket`` must be for ``source_name``.
    ``warnings`` are lines to log before anything else.
    """

    images_dir: Path = Path()
    work_dir: Path = Path()
    log_file: str | None = None
    verbosity: int = DEFAULT_VERBOSITY
    daemon: bool = False
    pidfile: Path | None = None
    status_fd: int | None = None
    page_server: tuple[str, int] | None = None
    ps_socket: int | None = None
    action_scripts: tuple[str, ...] = ()
    close_fds: tuple[int, ...] = ()
    unprivileged: bool = False
    display_stats: bool = False
    progress: Literal["auto", "plain", "json", "none"] = "auto"
    stats_file: Path | None = None
    connect_timeout: float = 10.0
    link_timeout: float = 30.0
    stop_timeout: float = 30.0
    reconnect: float | None = None
    extended: bool | None = None
    lanes: Literal[1, 2] = 2
    busy_poll: float | None = None
    frame_size: Literal[24, 32] | None = None
    on_failure: Literal["poison", "kill"] = "poison"
    tls: TlsFiles | None = None
    source_name: str | None = None
    warnings: tuple[str, ...] = ()


def parse(argv: Sequence[str], *, environ: Mapping[str, str] | None = None) -> LazyPagesOptions | Answer:
    """Understand a command line, without the program's name.

    Reads nothing and looks at no file. ``environ`` is only asked for what CRIU
    would read from it. Raises UsageError with one line.
    """
    given = read_line(argv, PROGRAM, build_parser())
    return given if isinstance(given, Answer) else _understand(given, environ or {})


def _understand(given: argparse.Namespace, environ: Mapping[str, str]) -> LazyPagesOptions:
    page_server, ps_socket = _source(given)
    tls = _tls(given)
    return LazyPagesOptions(
        images_dir=given.images_dir,
        work_dir=given.work_dir or given.images_dir,
        log_file=given.log_file,
        verbosity=given.verbosity,
        daemon=given.daemon,
        pidfile=given.pidfile,
        status_fd=given.status_fd,
        page_server=page_server,
        ps_socket=ps_socket,
        action_scripts=tuple(given.action_script),
        close_fds=tuple(given.close),
        unprivileged=given.unprivileged,
        display_stats=given.display_stats,
        progress=given.progress,
        stats_file=given.stats_file,
        connect_timeout=given.connect_timeout,
        link_timeout=given.link_timeout,
        stop_timeout=given.stop_timeout,
        reconnect=given.reconnect,
        extended=given.extended,
        lanes=2 if given.lanes == "2" else 1,
        busy_poll=given.busy_poll,
        frame_size={"auto": None, "24": 24, "32": 32}[given.frame],
        on_failure=given.on_failure,
        tls=tls,
        source_name=given.address if tls is not None and ps_socket is not None else None,
        warnings=tuple(_warnings(given, environ)),
    )


def _has_address(given: argparse.Namespace) -> bool:
    return given.address is not None or given.port is not None


def _source(given: argparse.Namespace) -> tuple[tuple[str, int] | None, int | None]:
    if not given.use_page_server:
        return None, None
    if given.ps_socket is not None:
        if given.reconnect is not None:
            raise UsageError(
                "--reconnect needs --address and --port: a socket that was inherited is gone when it is lost"
            )
        if given.extended:
            raise UsageError("--extended needs --address and --port: an inherited socket is one lane")
        return None, given.ps_socket
    missing = [name for name in ("address", "port") if getattr(given, name) is None]
    if missing:
        needed = " and ".join(f"--{name}" for name in missing)
        raise UsageError(f"--page-server needs {needed}: where does criu dump --lazy-pages listen?")
    return (given.address, given.port), None


def _tls(given: argparse.Namespace) -> TlsFiles | None:
    if not given.tls or not given.use_page_server:
        return None
    if given.ps_socket is not None and given.address is None and not given.tls_no_cn_verify:
        raise UsageError(
            "--tls with --ps-socket needs --address, which the source's certificate must be for, "
            "or --tls-no-cn-verify"
        )
    return tls_files(given)


def _warnings(given: argparse.Namespace, environ: Mapping[str, str]) -> list[str]:
    warnings = common_warnings(given, PROGRAM, environ)
    if tls_details(given) and not (given.tls and given.use_page_server):
        warnings.append("--tls-... options have no effect without --page-server --tls")
    if given.use_page_server:
        if given.ps_socket is not None and (
            given.port is not None or (_has_address(given) and not given.tls)
        ):
            warnings.append("--address and --port have no effect beside --ps-socket")
    else:
        for what, there in (
            ("--address and --port have", _has_address(given)),
            ("--ps-socket has", given.ps_socket is not None),
            ("--tls has", given.tls),
            ("--reconnect has", given.reconnect is not None),
            ("--extended has", bool(given.extended)),
        ):
            if there:
                warnings.append(f"{what} no effect without --page-server: pages come from the images")
    return warnings
