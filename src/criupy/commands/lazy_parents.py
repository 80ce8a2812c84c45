"""``criupy lazy-parents``: a directory to restore from, in which what pre-dumps hold is lazy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME: Final = "lazy-parents"
HELP: Final = "make a directory to restore from, in which the pages are lazy that a dump's parents hold"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.epilog = (
        "NEW has links to the files of DIR and pagemaps of its own: restore from it with "
        "`criu restore --lazy-pages`, and give it to criupy-lazy-pages as --images-dir. The stock daemon "
        "cannot serve it. DIR and its parents are not changed, and have to stay where they are."
    )
    parser.add_argument("images_dir", metavar="DIR", type=Path, help="the last dump, beside its parents")
    parser.add_argument("new_dir", metavar="NEW", type=Path, help="the directory to make")


def run(arguments: argparse.Namespace) -> int:
    """Make the directory; what is wrong with the dump is an ImageError."""
    from criupy.images import write_lazy_parents

    nr_pages = write_lazy_parents(arguments.images_dir, arguments.new_dir)
    sys.stdout.write(f"{nr_pages} pages of the parents are lazy\n")
    return 0
