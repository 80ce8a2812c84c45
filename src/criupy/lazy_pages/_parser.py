"""The argparse side of criupy-lazy-pages: what a lazy-pages daemon has of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from criupy._command import values
from criupy._command.getopt import Argument, Option
from criupy._command.parser import (
    Group,
    Parser,
    Program,
    add_log,
    add_other,
    add_rest,
    add_running,
    add_statistics,
    add_timeout,
    add_tls,
)

__all__ = ["OWN_OPTIONS", "PROGRAM", "build_parser"]

OWN_OPTIONS = (
    *(
        Option(name, Argument.REQUIRED, name)
        for name in (
            "progress",
            "stats-file",
            "connect-timeout",
            "link-timeout",
            "stop-timeout",
            "reconnect",
            "lanes",
            "busy-poll",
            "frame",
            "on-failure",
        )
    ),
    Option("extended", Argument.NONE, "extended"),
    Option("no-extended", Argument.NONE, "extended", value=False),
)

PROGRAM = Program(
    name="criupy-lazy-pages",
    command="lazy-pages",
    what="a lazy-pages daemon",
    own=OWN_OPTIONS,
    reasons={
        "auto-dedup": "is ignored: the images are left as they are",
        "prev-images-dir": "is ignored: a lazy-pages daemon reads no parent images",
    },
)


def build_parser() -> argparse.ArgumentParser:
    """Return a parser of full names that raises UsageError."""
    parser = Parser(
        PROGRAM,
        usage="[lazy-pages] -D DIR [--page-server --address ADDR --port PORT] [options]",
        description="Serve the memory of a process that criu restore --lazy-pages restores, page by page, "
        "from criu dump --lazy-pages on another host or from local images. Takes the place of "
        "criu lazy-pages and reads its command line.",
        epilog="CRIU's configuration files are not read. "
        "Exit status: 0 when every page was served, 1 otherwise.",
    )
    _add_source(Group(parser, "Where the pages are"))
    add_tls(
        Group(parser, "TLS, in both directions with certificates (PEM)"),
        use="talk TLS with the page server, which must do so, too",
        no_verify="take a page server whose certificate is not for --address",
    )
    _add_running(Group(parser, "Running"))
    _add_failure(Group(parser, "When things go wrong (TIME: 30, 2.5, 200ms, 5m)"))
    _add_telling(Group(parser, "What it tells"))
    add_other(Group(parser, "Other"))
    add_rest(parser, PROGRAM)
    return parser


def _add_source(group: Group) -> None:
    group.value("-D --images-dir", "DIR", "the images (default: .)", type=values.path, default=Path())
    group.switch(
        "--page-server",
        "use_page_server",
        "fetch pages from the page server at --address and --port, a waiting criu dump --lazy-pages or a "
        "criu page-server --lazy-pages; without it from the images",
    )
    group.value("--address", "ADDR", "IPv4 or IPv6 address or name of the page server", type=values.host)
    group.value("--port", "PORT", "its port", type=values.port)
    group.value(
        "--ps-socket",
        "FD",
        "an inherited socket that is connected to it",
        type=values.optional_descriptor,
    )
    group.choice(
        "--frame",
        "auto,24,32",
        "bytes in the page server's headers: 24 before CRIU 4.2, 32 since; auto takes what the images tell, "
        "which is right for criu dump but not for a criu page-server of another version",
    )
    group.switch(
        "--extended",
        "extended",
        "the page server is a criupy-page-server: use its lanes and vectored requests, which no stock one "
        "knows (default: so it is if the images have the marker of a relay)",
        default=None,
    )
    group.choice(
        "--lanes",
        "2,1",
        "connections to a criupy-page-server; on the second go the pages that a thread waits for, past all "
        "others",
    )
    group.value(
        "--busy-poll",
        "USEC",
        "look for more for so many microseconds before sleeping, while a thread waits for a page or just got "
        "one; never where a round trip takes longer, 0: do not (default: 100, or 0 on less than two cores)",
        type=values.microseconds,
    )


def _add_running(group: Group) -> None:
    add_running(
        group, files="lazy-pages.socket, log, pidfile and statistics", ready="criu restore can connect"
    )
    group.switch(
        "--unprivileged", "unprivileged", "accepted; root is not asked for, only what userfaultfd needs"
    )


def _add_failure(group: Group) -> None:
    add_timeout(group, "connect", 10.0, "how long to try to reach the page server")
    add_timeout(group, "link", 30.0, "how long it may owe an answer before it counts as lost")
    group.value(
        "--reconnect",
        "TIME",
        "how long to try to reach a criupy-page-server again that was lost, one that serves full images or a "
        "relay; faults wait meanwhile (default: not at all)",
        type=values.seconds,
    )
    add_timeout(group, "stop", 30.0, "how long to go on fetching after the first SIGTERM once tasks run")
    group.choice(
        "--on-failure",
        "poison,kill",
        "what becomes of running tasks whose pages cannot be had: a touch of such a page is a SIGBUS "
        "(poison, the default, needs Linux 6.6), or the tasks are killed; never zeros",
    )


def _add_telling(group: Group) -> None:
    add_log(group)
    group.choice(
        "--progress",
        "auto,plain,json,none",
        "on standard error, each second: a line, or a JSON object; auto is a bar on a terminal where rich "
        "is installed, lines elsewhere, nothing with --daemon",
    )
    add_statistics(group)
