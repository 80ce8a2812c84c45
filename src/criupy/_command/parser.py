"""The argparse side of a daemon's command line: what CRIU's daemons have in common.

It sees only full names, see getopt.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from criupy._command import values
from criupy._command.getopt import CRIU_OPTIONS, Argument, Option, show
from criupy._tls.files import CACERT, CACRL, CERT, KEY
from criupy.errors import CommandError

__all__ = [
    "DEFAULT_VERBOSITY",
    "REFUSED",
    "Group",
    "Parser",
    "Program",
    "UsageError",
    "add_log",
    "add_other",
    "add_rest",
    "add_running",
    "add_statistics",
    "add_timeout",
    "add_tls",
    "refused_dest",
]

# criu/include/log.h: DEFAULT_LOGLEVEL is LOG_WARN.
DEFAULT_VERBOSITY = 2

# Where the reason is not the same for all.
_REASONS = {
    "config": "is ignored: CRIU's configuration files are not read, give options on the command line",
    "log-pid": "has no effect: there is one process and one log",
}

# CRIU, too, ends with status 1 at these; a --no-... after them takes them back.
REFUSED = {
    "exec-cmd": "is for criu restore only",
    "inherit-fd": "is for criu restore only",
    "mntns-compat-mode": "is for criu restore only",
    "ms": "is an option that CRIU, too, has given up",
    "stream": "cannot be used here: pages have to be read in any order",
}


class UsageError(CommandError):
    """The command line cannot be followed; exit status 1, as CRIU's."""


@dataclass(frozen=True, slots=True)
class Program:
    """A command that takes the place of one of CRIU's.

    ``name`` is its own, ``command`` is CRIU's word for it, ``what`` is what it
    runs ("a lazy-pages daemon"), ``own`` are the options that CRIU does not
    have. ``reasons`` say why an option of CRIU's has no effect, where there is
    more to say than that.
    """

    name: str
    command: str
    what: str
    own: tuple[Option, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)

    def no_sense(self, option: str) -> str:
        """Say why an option of CRIU's has no effect."""
        reason = self.reasons.get(option) or _REASONS.get(option)
        return reason or f"has nothing to act on in {self.what} and is ignored"


def refused_dest(name: str) -> str:
    """Return the attribute that tells whether a REFUSED option was given."""
    return f"refused {name}"


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


class Group:
    """A heading of the help, and a short way to add to it."""

    def __init__(self, parser: argparse.ArgumentParser, title: str | None) -> None:
        self._group = parser.add_argument_group(title)

    def value(self, names: str, metavar: str | None, help: str, **settings: Any) -> None:
        """Add an option with an argument."""
        self._group.add_argument(*names.split(), metavar=metavar, help=help, **settings)

    def choice(self, name: str, choices: str, help: str) -> None:
        """Add one of several words; the first is the default."""
        words = choices.split(",")
        self.value(name, f"{{{choices}}}", help, choices=words, default=words[0])

    def switch(self, names: str, dest: str, help: str, *, default: bool | None = False) -> None:
        """Add an option without an argument, and its --no-."""
        self._group.add_argument(*names.split(), dest=dest, action="store_true", default=default, help=help)
        for name in re.findall(r"--(\S+)", names):
            self._group.add_argument(
                f"--no-{name}", dest=dest, action="store_false", default=default, help=argparse.SUPPRESS
            )

    def flag(self, names: str, help: str) -> None:
        """Add an option that has no --no-."""
        self._group.add_argument(*names.split(), action="store_true", help=help)


class Parser(argparse.ArgumentParser):
    """A parser of full names that raises UsageError."""

    def __init__(self, program: Program, *, usage: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=program.name,
            usage=f"{program.name} {usage}",
            description=description,
            epilog="Options without an argument can be negated: --no-daemon. Unambiguous prefixes are "
            f"enough. Other options of criu are accepted with a warning. {epilog}",
            add_help=False,
            allow_abbrev=False,
        )
        self.set_defaults(senseless={})

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        message = message.removeprefix("argument ")
        raise UsageError("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def add_running(group: Group, *, files: str, ready: str) -> None:
    """Add what every daemon has; ``files`` go to the work dir, and it is ready when ``ready``."""
    group.value("-W --work-dir", "DIR", f"where {files} go (default: the images)", type=values.path)
    group.switch("-d --daemon --restore-detached", "daemon", "go into the background once listening")
    group.value(
        "--pidfile", "FILE", "with --daemon: write its pid to FILE, which must not exist", type=values.path
    )
    group.value(
        "--status-fd", "FD", f"write \\0 to FD and close it once {ready}", type=values.optional_descriptor
    )
    group.value(
        "--action-script",
        "FILE",
        "run FILE before that, with CRTOOLS_SCRIPT_ACTION=status-ready; may be repeated",
        type=values.text,
        action="append",
        default=[],
    )
    group.value("--close", "FD", "close FD at the start", type=values.descriptor, action="append", default=[])


def add_timeout(group: Group, name: str, default: float, text: str) -> None:
    """Add a time with a default."""
    told = f"{text} (default: {default:g} seconds)"
    group.value(f"--{name}-timeout", "TIME", told, type=values.seconds, default=default)


def add_log(group: Group) -> None:
    """Add CRIU's log options."""
    group.value(
        "-o --log-file",
        "FILE",
        "log to FILE, - is standard output (default: standard error)",
        type=values.text,
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


def add_statistics(group: Group) -> None:
    """Add what tells of all at the end."""
    group.switch("--display-stats", "display_stats", "print a summary at the end")
    group.value("--stats-file", "FILE", "write all statistics as JSON at the end", type=values.path)


def add_other(group: Group) -> None:
    """Add help, version, and what is accepted without a word in the help."""
    group.flag("-h --help", "print this and exit")
    group.flag("-V --version", "print the version and exit")
    group.flag("--no-default-config", "accepted; no configuration file is ever read")
    group.switch("-S --restore-sibling", "restore_sibling", argparse.SUPPRESS)


def add_tls(group: Group, *, use: str, no_verify: str) -> None:
    """Add what CRIU has of TLS; ``use`` and ``no_verify`` are the helps of the two switches."""
    group.switch("--tls", "tls", use)
    for name, default, text in (
        ("cacert", CACERT, "the CAs to trust; without it those of the system are trusted, too"),
        ("cacrl", CACRL, "certificates that they have revoked; need not exist"),
        ("cert", CERT, "our certificate"),
        ("key", KEY, "its private key"),
    ):
        group.value(f"--tls-{name}", "FILE", f"{text} (default: {default})", type=values.path)
    group.flag("--tls-no-cn-verify", no_verify)


def add_rest(parser: argparse.ArgumentParser, program: Program) -> None:
    """Add, last, every option of CRIU's that is not there yet: to be refused, or to have no effect."""
    for option in CRIU_OPTIONS:
        if option.sets in REFUSED:
            _add_refused(parser, option)
    known = {name[2:] for name in parser._option_string_actions if name.startswith("--")}
    for option in CRIU_OPTIONS:
        if option.name not in known:
            _add_senseless(parser, option, program)


def _add_refused(parser: argparse.ArgumentParser, option: Option) -> None:
    kind: dict[str, Any] = {"action": "store_const", "const": option.value}
    if option.argument is not Argument.NONE:
        kind = {"type": lambda _: True}
    dest = refused_dest(option.sets)
    parser.add_argument(f"--{option.name}", dest=dest, help=argparse.SUPPRESS, **kind)


def _add_senseless(parser: argparse.ArgumentParser, option: Option, program: Program) -> None:
    kind: dict[str, Any]
    if option.value:
        nargs = {Argument.NONE: 0, Argument.REQUIRED: None, Argument.OPTIONAL: "?"}[option.argument]
        kind = {"action": _Senseless, "nargs": nargs, "const": program.no_sense(option.name)}
    else:  # --no-something: not done anyway
        kind = {"action": "store_true"}
    parser.add_argument(f"--{option.name}", help=argparse.SUPPRESS, **kind)
