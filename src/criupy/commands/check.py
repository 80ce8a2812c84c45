"""``criupy check``: what this machine lacks for dump, restore and lazy migration, and what to do about it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from typing import Final

from criupy._elsewhere import need_linux
from criupy.commands._findings import all_well, render, to_json

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME: Final = "check"
HELP: Final = "tell what this machine lacks for dump, restore and lazy migration, and what to do about it"

_WIDTH: Final = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.epilog = (
        "Exit status: 0 when nothing is missing that every dump, restore and lazy migration needs, else 1. "
        "Nothing on the machine is changed."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--criu", metavar="PATH", default="criu", help="the CRIU program to ask (default: criu on PATH)"
    )
    which.add_argument("--socket", metavar="PATH", help="ask the `criu service` that listens at this socket")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Look at everything, print what was found, and return 0 when nothing essential is missing."""
    need_linux("this command")
    from criupy.commands._survey_linux import survey

    findings = survey(arguments.criu, arguments.socket)
    if arguments.json:
        json.dump(to_json(findings), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH
        sys.stdout.write(render(findings, max(60, min(width, _WIDTH))))
    return 0 if all_well(findings) else 1
