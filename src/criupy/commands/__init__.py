"""The command criupy: its subcommands are modules of this package.

Each has NAME, HELP, add_arguments(parser) and run(arguments), which returns
the exit status. Only the one that is asked for is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Final, Protocol, cast

from criupy.errors import CriupyError

__all__ = ["build_parser", "main"]

PROGRAM: Final = "criupy"
_COMMANDS: Final = ("check", "images", "lazy-parents")

# What a shell shows of a program that the signal ended.
_SIGINT: Final = 128 + 2
_SIGPIPE: Final = 128 + 13


class _Command(Protocol):
    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, arguments: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    if sys.stdout is None:
        _complain(PROGRAM, "standard output is closed")
        return 1
    try:
        status = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _lead_nowhere(sys.stdout)
        return _SIGINT
    except BrokenPipeError:
        _lead_nowhere(sys.stdout)
        return _SIGPIPE
    except OSError as error:
        # Where standard output cannot take it; what else can fail is a CriupyError.
        if isinstance(error, CriupyError):
            raise
        _lead_nowhere(sys.stdout)
        _complain(PROGRAM, f"standard output: {error.strerror}")
        return 1
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every subcommand, for those who describe it."""
    return _build(_COMMANDS)[0]


def _build(names: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, _Command]]:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Checkpoint, restore and migrate with CRIU.")
    parser.add_argument("--version", action="store_true", help="show criupy's version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands = {command.NAME: command for command in _load(names)}
    for name, command in commands.items():
        command.add_arguments(subparsers.add_parser(name, help=command.HELP, description=command.HELP))
    return parser, commands


def _main(argv: Sequence[str]) -> int:
    # Options of criupy itself have no arguments: the first word without a dash is the command.
    asked = next((word for word in argv if not word.startswith("-")), None)
    parser, commands = _build([asked] if asked in _COMMANDS else _COMMANDS)
    # argparse is content when its help cannot be written, so the help is written here.
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            arguments = parser.parse_args(argv)
    except SystemExit as ended:
        sys.stdout.write(text.getvalue())
        return int(ended.code or 0)
    if arguments.version:
        sys.stdout.write(f"{PROGRAM} {_version()}\n")
        return 0
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return commands[arguments.command].run(arguments)
    except CriupyError as error:
        _complain(f"{PROGRAM} {arguments.command}", str(error))
        return 1


def _load(names: Iterable[str]) -> Iterable[_Command]:
    return (
        cast(_Command, importlib.import_module(f"criupy.commands.{name.replace('-', '_')}")) for name in names
    )


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("criupy")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _complain(who: str, what: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # full, or closed before we began
        sys.stderr.write(f"{who}: {' '.join(what.split())}\n")


def _lead_nowhere(stream: IO[str]) -> None:
    # What is left in its buffer would fail again when Python flushes it at the end: status 120, a traceback.
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
