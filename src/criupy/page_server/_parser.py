"""The argparse side of criupy-page-server: what a page server has of its own."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from criupy._command import values
from criupy._command.getopt import Argument, Option, show
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
from criupy.page_server._access import Network, parse_network

__all__ = ["OWN_OPTIONS", "PROGRAM", "build_parser"]

_MOST_CONNECTIONS = 10_000

OWN_OPTIONS = (
    *(
        Option(name, Argument.REQUIRED, name)
        for name in (
            "allow",
            "max-connections",
            "idle-timeout",
            "stall-timeout",
            "stop-timeout",
            "port-file",
            "stats-file",
            "upstream",
            "cache",
            "spool",
            "hold-timeout",
        )
    ),
    Option("close-when-spooled", Argument.NONE, "close_when_spooled"),
    Option("no-close-when-spooled", Argument.NONE, "close_when_spooled", value=False),
    Option("abort", Argument.NONE, "abort"),
    Option("no-abort", Argument.NONE, "abort", value=False),
    Option("once", Argument.NONE, "once"),
    Option("no-once", Argument.NONE, "once", value=False),
)

PROGRAM = Program(
    name="criupy-page-server",
    command="page-server",
    what="a page server",
    own=OWN_OPTIONS,
    reasons={"page-server": "has no effect: that is what this is"},
)


def build_parser() -> argparse.ArgumentParser:
    """Return a parser of full names that raises UsageError."""
    parser = Parser(
        PROGRAM,
        usage="[page-server] -D DIR [--lazy-pages | --upstream HOST:PORT] [--address ADDR] [--port PORT] "
        "[options]",
        description="With --lazy-pages: give the memory that checkpoint images hold to destinations that "
        "restore them lazily. With --upstream: stand between a live criu dump --lazy-pages and its "
        "destination. With neither: receive what one criu dump --page-server sends, and end with it. "
        "Takes the place of criu page-server and reads its command line.",
        epilog="CRIU's configuration files are not read. Exit status: 0 when all went well, 1 otherwise; "
        "with --once that is when the one destination has ended its session, and not merely gone away, "
        "with --upstream when the source has ended because its destination has everything. "
        "Who connects and asks for nothing ends no page server.",
    )
    _add_pages(Group(parser, "What is served"))
    _add_relay(Group(parser, "A live source"))
    _add_network(Group(parser, "To whom"))
    add_tls(
        Group(parser, "TLS, in both directions with certificates (PEM)"),
        use="talk TLS, and serve whoever has a certificate for --address, as CRIU's hosts do",
        no_verify="serve whoever has a certificate, whomever it is for",
    )
    running = Group(parser, "Running")
    add_running(running, files="log, pidfile, port file and statistics", ready="destinations can connect")
    running.switch("--unprivileged", "unprivileged", "accepted; root is not asked for")
    _add_limits(Group(parser, "Limits (TIME: 30, 2.5, 200ms, 5m)"))
    telling = Group(parser, "What it tells")
    add_log(telling)
    add_statistics(telling)
    add_other(Group(parser, "Other"))
    add_rest(parser, PROGRAM)
    return parser


def _add_pages(group: Group) -> None:
    group.value("-D --images-dir", "DIR", "the images (default: .)", type=values.path, default=Path())
    group.flag(
        "--lazy-pages",
        "give out the lazy pages of the images, which must not change meanwhile; without it receive a dump",
    )
    group.value(
        "--prev-images-dir",
        "DIR",
        "when receiving: the images that these build on, relative to -D",
        type=values.path,
    )
    group.switch("--auto-dedup", "auto_dedup", "when receiving: punch what is new out of the older images")


def _add_relay(group: Group) -> None:
    group.value(
        "--upstream",
        "HOST:PORT",
        "where criu dump --lazy-pages waits, on this host best: hold its one connection, and give what it "
        "has to one destination, which may be lost and come back (criupy-lazy-pages --reconnect, with the "
        "images and the marker that is put beside them)",
        type=values.where,
    )
    group.value(
        "--cache",
        "SIZE",
        "keep so much of its memory here (default: 256M)",
        type=values.size,
    )
    group.value(
        "--spool",
        "DIR",
        "keep all of it in DIR, which becomes a full image; the source ends when it is one and the restore "
        "has finished, and DIR is served from then on, also when this is started again",
        type=values.path,
    )
    group.switch(
        "--close-when-spooled",
        "close_when_spooled",
        "do not wait for a restore: the source ends with the spool",
    )
    group.value(
        "--hold-timeout",
        "TIME",
        "let the source go on when its destination was lost for so long (default: never). A stock "
        "destination may run on without its memory then, one of criupy is sure to have ended before",
        type=values.seconds,
    )
    group.switch(
        "--abort",
        "abort",
        "tell the relay with this --work-dir, or what it left behind, to let its source go on, and do "
        "nothing else",
    )


def _add_network(group: Group) -> None:
    group.value(
        "--address",
        "ADDR",
        "IPv4 or IPv6 address or name to listen on (default: 127.0.0.1; criu page-server listens on 0.0.0.0)",
        type=values.host,
    )
    group.value(
        "--port",
        "PORT",
        "port to listen on; 0, the default, lets the kernel choose: see --port-file",
        type=partial(values.number, low=0, high=65535, what="a port"),
    )
    group.value(
        "--port-file",
        "FILE",
        "write the port that is listened on to FILE, before --status-fd is told and --daemon returns",
        type=values.path,
    )
    group.value(
        "--ps-socket",
        "FD",
        "listen nowhere, serve the destination that this inherited socket is connected to",
        type=values.optional_descriptor,
    )
    group.value(
        "--allow",
        "CIDR",
        "serve only destinations in this network, such as 10.0.0.0/8; may be repeated",
        type=_network,
        action="append",
        default=[],
    )
    group.switch(
        "--once",
        "once",
        "with --lazy-pages: end with the first destination that was given a page, as criu page-server does "
        "with the first that connects",
    )


def _add_limits(group: Group) -> None:
    group.value(
        "--max-connections",
        "N",
        "refuse more than N connections at a time (default: 64), and from one address more than half of that "
        "(or than 4, where that is more)",
        type=partial(values.number, low=1, high=_MOST_CONNECTIONS, what="a number of connections"),
        default=64,
    )
    group.value(
        "--idle-timeout",
        "TIME",
        "cut a peer that asks for nothing for so long (default: never; before its first frame, 20 times "
        "--stall-timeout)",
        type=values.seconds,
    )
    add_timeout(group, "stall", 30.0, "how long a destination may stop in the middle of something")
    add_timeout(group, "stop", 30.0, "how long to go on serving who is connected after the first SIGTERM")


def _network(word: str) -> Network:
    try:
        return parse_network(word)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{show(word)}' is not a network such as 10.0.0.0/8, fd00::/8 or 192.0.2.7"
        ) from None
