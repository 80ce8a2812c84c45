"""The argparse side of the command line: names, kinds of values, help.

It sees only full names, see _getopt.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from criupy._tls.files import CACERT, CACRL, CERT, KEY
from criupy.errors import LazyPagesError
from criupy.lazy_pages._getopt import CRIU_OPTIONS, Argument, Option, show

__all__ = [
    "DEFAULT_VERBOSITY",
    "NO_SENSE",
    "OWN_OPTIONS",
    "PROGRAM",
    "REFUSED",
    "UsageError",
    "build_parser",
    "refused_dest",
]

PROGRAM = "criupy-lazy-pages"

# criu/include/log.h: DEFAULT_LOGLEVEL is LOG_WARN.
DEFAULT_VERBOSITY = 2

_LONGEST = 7 * 86400.0  # seconds; TCP_USER_TIMEOUT ends at 24 days

OWN_OPTIONS = tuple(
    Option(name, Argument.REQUIRED, name)
    for name in (
        "progress",
        "stats-file",
        "connect-timeout",
        "link-timeout",
        "stop-timeout",
        "frame",
        "on-failure",
    )
)

NO_SENSE = "has nothing to act on in a lazy-pages daemon and is ignored"
# Where the reason is not the same for all.
_REASONS = {
    "config": "is ignored: CRIU's configuration files are not read, give options on the command line",
    "auto-dedup": "is ignored: the images are left as they are",
    "log-pid": "has no effect: there is one process and one log",
    "prev-images-dir": "is ignored: a lazy-pages daemon reads no parent images",
}

# CRIU, too, ends with status 1 at these; a --no-... after them takes them back.
REFUSED = {
    "exec-cmd": "is for criu restore only",
    "inherit-fd": "is for criu restore only",
    "mntns-compat-mode": "is for criu restore only",
    "ms": "is an option that CRIU, too, has given up",
    "stream": "cannot be used here: pages have to be read in any order",
}


class UsageError(LazyPagesError):
    """The command line cannot be followed; exit status 1, as CRIU's."""


def refused_dest(name: str) -> str:
    """Return the attribute that tells whether a REFUSED option was given."""
    return f"refused {name}"


# ---- values ---------------------------------------------------------------------


def _number(text: str, low: int, high: int, what: str) -> int:
    # Not int(): it takes underscores, spaces and other scripts' digits.
    if re.fullmatch(r"[0-9]{1,10}", text) is None or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"'{show(text)}' is not {what} ({low} to {high})")
    return int(text)


def _port(text: str) -> int:
    return _number(text, 1, 65535, "a port")


def _descriptor(text: str) -> int:
    return _number(text, 0, 2**31 - 1, "a file descriptor")


def _optional_descriptor(text: str) -> int | None:
    # -1 is how CRIU says that there is none.
    return None if text == "-1" else _descriptor(text)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(ms|s|m)?", text)
    if match is not None:
        seconds = float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, None: 1.0}[match[2]]
        if 0.001 <= seconds <= _LONGEST:
            return seconds
    raise argparse.ArgumentTypeError(
        f"'{show(text)}' is not a time between 1ms and 7 days, such as 30, 2.5, 200ms or 5m"
    )


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def _path(text: str) -> Path:
    return Path(_text(text))


class _Verbosity(argparse.Action):
    """-v adds one, -vvv three, -v3 sets it to three (criu/config.c)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        if values is None:
            namespace.verbosity += 1
        elif values and not values.strip("v"):
            namespace.verbosity += len(values) + 1
        elif re.fullmatch(r"[0-9]{1,4}", values):
            namespace.verbosity = int(values)
        else:
            raise argparse.ArgumentError(self, f"'{show(values)}' is neither a level (0 to 4) nor v's")


class _Senseless(argparse.Action):
    """Accept an option of CRIU's that has nothing to act on here."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,  # noqa: ARG002
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        namespace.senseless[self.option_strings[0]] = self.const


# ---- the parser -----------------------------------------------------------------


class _Group:
    """A heading of the help, and a short way to add to it."""

    def __init__(self, parser: argparse.ArgumentParser, title: str | None) -> None:
        self._group = parser.add_argument_group(title)

    def value(self, names: str, metavar: str | None, help: str, **settings: Any) -> None:
        self._group.add_argument(*names.split(), metavar=metavar, help=help, **settings)

    def choice(self, name: str, choices: str, help: str) -> None:
        """Add one of several words; the first is the default."""
        words = choices.split(",")
        self.value(name, f"{{{choices}}}", help, choices=words, default=words[0])

    def switch(self, names: str, dest: str, help: str) -> None:
        """Add an option without an argument, and its --no-."""
        self._group.add_argument(*names.split(), dest=dest, action="store_true", help=help)
        for name in re.findall(r"--(\S+)", names):
            self._group.add_argument(
                f"--no-{name}", dest=dest, action="store_false", default=False, help=argparse.SUPPRESS
            )

    def flag(self, names: str, help: str) -> None:
        """Add an option that has no --no-."""
        self._group.add_argument(*names.split(), action="store_true", help=help)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UsageError("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def build_parser() -> argparse.ArgumentParser:
    """Return a parser of full names that raises UsageError."""
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [lazy-pages] -D DIR [--page-server --address ADDR --port PORT] [options]",
        description="Serve the memory of a process that criu restore --lazy-pages restores, page by page, "
        "from criu dump --lazy-pages on another host or from local images. Takes the place of "
        "criu lazy-pages and reads its command line.",
        epilog="Options without an argument can be negated: --no-daemon. Unambiguous prefixes are enough. "
        "Other options of criu are accepted with a warning. CRIU's configuration files are not read. "
        "Exit status: 0 when every page was served, 1 otherwise.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(senseless={})
    _add_source(_Group(parser, "Where the pages are"))
    _add_tls(_Group(parser, "TLS, in both directions with certificates (PEM)"))
    _add_running(_Group(parser, "Running"))
    _add_failure(_Group(parser, "When things go wrong (TIME: 30, 2.5, 200ms, 5m)"))
    _add_telling(_Group(parser, "What it tells"))
    _add_other(_Group(parser, "Other"))
    _add_refused(parser)
    _add_senseless(parser)
    return parser


def _add_source(group: _Group) -> None:
    group.value("-D --images-dir", "DIR", "the images (default: .)", type=_path, default=Path())
    group.switch(
        "--page-server",
        "use_page_server",
        "fetch pages from the page server at --address and --port, a waiting criu dump --lazy-pages or a "
        "criu page-server --lazy-pages; without it from the images",
    )
    group.value("--address", "ADDR", "IPv4 or IPv6 address or name of the page server", type=_text)
    group.value("--port", "PORT", "its port", type=_port)
    group.value("--ps-socket", "FD", "an inherited socket that is connected to it", type=_optional_descriptor)
    group.choice(
        "--frame",
        "auto,24,32",
        "bytes in the page server's headers: 24 before CRIU 4.2, 32 since; auto takes what the images tell, "
        "which is right for criu dump but not for a criu page-server of another version",
    )


def _add_tls(group: _Group) -> None:
    group.switch("--tls", "tls", "talk TLS with the page server, which must do so, too")
    for name, default, text in (
        ("cacert", CACERT, "the CAs to trust; without it those of the system are trusted, too"),
        ("cacrl", CACRL, "certificates that they have revoked; need not exist"),
        ("cert", CERT, "our certificate"),
        ("key", KEY, "its private key"),
    ):
        group.value(f"--tls-{name}", "FILE", f"{text} (default: {default})", type=_path)
    group.flag("--tls-no-cn-verify", "take a page server whose certificate is not for --address")


def _add_running(group: _Group) -> None:
    group.value(
        "-W --work-dir",
        "DIR",
        "where lazy-pages.socket, log, pidfile and statistics go (default: the images)",
        type=_path,
    )
    group.switch("-d --daemon --restore-detached", "daemon", "go into the background once listening")
    group.value("--pidfile", "FILE", "with --daemon: write its pid to FILE, which must not exist", type=_path)
    group.value(
        "--status-fd",
        "FD",
        "write \\0 to FD and close it once criu restore can connect",
        type=_optional_descriptor,
    )
    group.value(
        "--action-script",
        "FILE",
        "run FILE before that, with CRTOOLS_SCRIPT_ACTION=status-ready; may be repeated",
        type=_text,
        action="append",
        default=[],
    )
    group.value("--close", "FD", "close FD at the start", type=_descriptor, action="append", default=[])
    group.switch(
        "--unprivileged", "unprivileged", "accepted; root is not asked for, only what userfaultfd needs"
    )


def _add_failure(group: _Group) -> None:
    for name, default, text in (
        ("connect", 10.0, "how long to try to reach the page server"),
        ("link", 30.0, "how long it may owe an answer before it counts as lost"),
        ("stop", 30.0, "how long to go on fetching after the first SIGTERM once tasks run"),
    ):
        told = f"{text} (default: {default:g} seconds)"
        group.value(f"--{name}-timeout", "TIME", told, type=_seconds, default=default)
    group.choice(
        "--on-failure",
        "poison,kill",
        "what becomes of running tasks whose pages cannot be had: a touch of such a page is a SIGBUS "
        "(poison, the default, needs Linux 6.6), or the tasks are killed; never zeros",
    )


def _add_telling(group: _Group) -> None:
    group.value(
        "-o --log-file",
        "FILE",
        "log to FILE, - is standard output (default: standard error)",
        type=_text,
    )
    group.value(
        "-v --verbosity",
        "NUM",
        "log more: -v1 errors, -v2 also warnings (the default), -v3 also what happens, with times, "
        "-v4 everything; each v adds one. NUM has to be attached: -v4, --verbosity=4",
        nargs="?",
        action=_Verbosity,
        default=DEFAULT_VERBOSITY,
    )
    group.choice(
        "--progress",
        "auto,plain,json,none",
        "on standard error, each second: a line, or a JSON object; auto is a bar on a terminal where rich "
        "is installed, lines elsewhere, nothing with --daemon",
    )
    group.switch("--display-stats", "display_stats", "print a summary at the end")
    group.value("--stats-file", "FILE", "write all statistics as JSON at the end", type=_path)


def _add_other(group: _Group) -> None:
    group.flag("-h --help", "print this and exit")
    group.flag("-V --version", "print the version and exit")
    group.flag("--no-default-config", "accepted; no configuration file is ever read")
    group.switch("-S --restore-sibling", "restore_sibling", argparse.SUPPRESS)


def _add_refused(parser: argparse.ArgumentParser) -> None:
    for option in CRIU_OPTIONS:
        if option.sets not in REFUSED:
            continue
        kind: dict[str, Any] = {"action": "store_const", "const": option.value}
        if option.argument is not Argument.NONE:
            kind = {"type": lambda _: True}
        dest = refused_dest(option.sets)
        parser.add_argument(f"--{option.name}", dest=dest, help=argparse.SUPPRESS, **kind)


def _add_senseless(parser: argparse.ArgumentParser) -> None:
    known = {name[2:] for name in parser._option_string_actions if name.startswith("--")}
    nargs = {Argument.NONE: 0, Argument.REQUIRED: None, Argument.OPTIONAL: "?"}
    for option in CRIU_OPTIONS:
        if option.name in known:
            continue
        kind: dict[str, Any]
        if option.value:
            kind = {
                "action": _Senseless,
                "nargs": nargs[option.argument],
                "const": _REASONS.get(option.name, NO_SENSE),
            }
        else:  # --no-something: not done anyway
            kind = {"action": "store_true"}
        parser.add_argument(f"--{option.name}", help=argparse.SUPPRESS, **kind)
