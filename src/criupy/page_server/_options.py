"""The command line of criupy-page-server: what CRIU's takes, and a little more."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from criupy._command.line import Answer, common_warnings, read_line, tls_details, tls_files
from criupy._command.parser import DEFAULT_VERBOSITY, UsageError
from criupy._tls.files import TlsFiles
from criupy.page_server._access import Network
from criupy.page_server._parser import PROGRAM, build_parser

__all__ = ["PageServerOptions", "parse"]


# CRIU listens everywhere; memory in clear text is for nobody who was not thought of.
_LOOPBACK = "127.0.0.1"
_CACHE = 256 << 20


@dataclass(frozen=True, slots=True)
class PageServerOptions:
    """A command line, understood.

    Paths are as written: ``log_file`` (``-`` is standard output), ``pidfile``,
    ``port_file`` and ``stats_file`` are relative to ``work_dir``,
    ``prev_images_dir`` to ``images_dir``, everything else to the current
    directory. Timeouts are in seconds. ``ps_socket`` is the descriptor of a
    connected socket, with which nothing is listened on. ``upstream`` is (host,
    port) of a live source, ``cache`` a number of bytes. ``abort`` is for
    another relay. ``warnings`` are lines to log before anything else.
    """

    images_dir: Path = Path()
    work_dir: Path = Path()
    lazy_pages: bool = False
    prev_images_dir: Path | None = None
    auto_dedup: bool = False
    upstream: tuple[str, int] | None = None
    cache: int = _CACHE
    spool: Path | None = None
    close_when_spooled: bool = False
    hold_timeout: float | None = None
    abort: bool = False
    address: str = _LOOPBACK
    port: int = 0
    port_file: Path | None = None
    ps_socket: int | None = None
    allow: tuple[Network, ...] = ()
    once: bool = False
    max_connections: int = 64
    idle_timeout: float | None = None
    stall_timeout: float = 30.0
    stop_timeout: float = 30.0
    tls: TlsFiles | None = None
    log_file: str | None = None
    verbosity: int = DEFAULT_VERBOSITY
    daemon: bool = False
    pidfile: Path | None = None
    status_fd: int | None = None
    action_scripts: tuple[str, ...] = ()
    close_fds: tuple[int, ...] = ()
    display_stats: bool = False
    stats_file: Path | None = None
    warnings: tuple[str, ...] = ()


def parse(argv: Sequence[str], *, environ: Mapping[str, str] | None = None) -> PageServerOptions | Answer:
    """Understand a command line, without the program's name.

    Reads nothing and looks at no file. ``environ`` is only asked for what CRIU
    would read from it. Raises UsageError with one line.
    """
    given = read_line(argv, PROGRAM, build_parser())
    return given if isinstance(given, Answer) else _understand(given, environ or {})


def _understand(given: argparse.Namespace, environ: Mapping[str, str]) -> PageServerOptions:
    if given.tls and given.ps_socket is not None and given.address is None and not given.tls_no_cn_verify:
        raise UsageError(
            "--tls with --ps-socket needs --address, which the peer's certificate must be for, "
            "or --tls-no-cn-verify"
        )
    if given.upstream is not None:
        _check_relay(given)
    elif given.spool is not None and not given.abort:
        raise UsageError("--spool needs --upstream: of what source?")
    return PageServerOptions(
        images_dir=given.images_dir,
        work_dir=given.work_dir or given.images_dir,
        lazy_pages=given.lazy_pages,
        prev_images_dir=given.prev_images_dir,
        auto_dedup=given.auto_dedup,
        upstream=given.upstream,
        cache=_CACHE if given.cache is None else given.cache,
        spool=given.spool,
        close_when_spooled=given.close_when_spooled,
        hold_timeout=given.hold_timeout,
        abort=given.abort,
        address=given.address or _LOOPBACK,
        port=given.port or 0,
        port_file=given.port_file,
        ps_socket=given.ps_socket,
        allow=tuple(given.allow),
        once=given.once,
        max_connections=given.max_connections,
        idle_timeout=given.idle_timeout,
        stall_timeout=given.stall_timeout,
        stop_timeout=given.stop_timeout,
        tls=tls_files(given) if given.tls else None,
        log_file=given.log_file,
        verbosity=given.verbosity,
        daemon=given.daemon,
        pidfile=given.pidfile,
        status_fd=given.status_fd,
        action_scripts=tuple(given.action_script),
        close_fds=tuple(given.close),
        display_stats=given.display_stats,
        stats_file=given.stats_file,
        warnings=tuple(_warnings(given, environ)),
    )


def _check_relay(given: argparse.Namespace) -> None:
    if given.ps_socket is not None:
        raise UsageError(
            "--upstream with --ps-socket: a destination could not come back on an inherited socket"
        )
    if given.close_when_spooled and given.spool is None:
        raise UsageError("--close-when-spooled needs --spool")
    if given.cache is not None and given.cache < 1 << 20:
        raise UsageError(f"--cache {given.cache}: expected 1M or more")


def _warnings(given: argparse.Namespace, environ: Mapping[str, str]) -> list[str]:
    warnings = common_warnings(given, PROGRAM, environ)
    if tls_details(given) and not given.tls:
        warnings.append("--tls-... options have no effect without --tls")
    if given.upstream is not None:
        warnings += [
            f"{name} has no effect with --upstream"
            for name, there in (
                ("--lazy-pages", given.lazy_pages),
                ("--once", given.once),
                ("--auto-dedup", given.auto_dedup),
                ("--prev-images-dir", given.prev_images_dir is not None),
            )
            if there
        ]
    elif given.lazy_pages:
        warnings += [
            f"{name} has no effect with --lazy-pages: the images are only read"
            for name, there in (
                ("--auto-dedup", given.auto_dedup),
                ("--prev-images-dir", given.prev_images_dir is not None),
            )
            if there
        ]
    elif given.once and not given.abort:
        warnings.append(
            "--once has no effect without --lazy-pages: a page server that receives ends with the dump"
        )
    if given.upstream is None:
        warnings += [
            f"{name} no effect without --upstream"
            for name, there in (
                ("--close-when-spooled has", given.close_when_spooled),
                ("--hold-timeout has", given.hold_timeout is not None),
                ("--cache has", given.cache is not None),
            )
            if there
        ]
    if given.ps_socket is not None:
        warnings += [
            f"{name} no effect beside --ps-socket"
            for name, there in (
                (
                    "--address and --port have",
                    given.port is not None or (given.address is not None and not given.tls),
                ),
                ("--port-file has", given.port_file is not None),
                ("--allow has", bool(given.allow)),
            )
            if there
        ]
    elif given.address is None:
        warnings.append(
            "listening on 127.0.0.1 only, where criu page-server would on 0.0.0.0: --address says where"
        )
    return warnings
