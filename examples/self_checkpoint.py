"""A program that dumps itself and goes on; its copy is restored and knows that it is the copy.

``self_dump`` returns twice, as fork(2) does: False in the process that was dumped, True in the restored one.

Run as root:  python examples/self_checkpoint.py --criu /usr/sbin/criu
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import criupy


def compute(binary: str, room: Path) -> None:
    """Be the program: count, dump this very process half-way, go on."""
    total = sum(range(1000))
    try:
        with criupy.Criu(binary) as criu:
            restored = criu.self_dump(images_dir=room / "images", leave_running=True)
    except criupy.CriuError as error:
        sys.exit(f"Error: {error}")
    total += sum(range(1000, 2000))
    report = room / ("copy" if restored else "original")
    report.with_suffix(".new").write_text(f"self_dump() returned {restored}, the sum is {total}")
    report.with_suffix(".new").replace(report)
    if restored:
        time.sleep(1000)


def run(binary: str, room: Path) -> None:
    """Start the program, wait for it, and restore what it left."""
    images = room / "images"
    images.mkdir()
    errors = room / "errors"
    # Its terminal and session would have to be there on the restore, so it gets neither of ours.
    with errors.open("w") as stderr:
        original = subprocess.run(
            [sys.executable, __file__, "--criu", binary, "--in", room],
            check=False,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    if original.returncode:
        sys.exit(errors.read_text().rstrip())
    print("original:", (room / "original").read_text())
    with criupy.Criu(binary) as criu:
        copy = criu.restore(images_dir=images)
    try:
        deadline = time.monotonic() + 30
        while not (room / "copy").exists():
            if time.monotonic() > deadline:
                sys.exit("Error: the copy says nothing")
            time.sleep(0.02)
        print("copy:    ", (room / "copy").read_text())
    finally:
        os.kill(copy.pid, signal.SIGKILL)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Dump the calling process, and restore it.")
    parser.add_argument("--criu", default="criu", metavar="PATH", help="CRIU's program")
    parser.add_argument("--in", dest="room", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.room is not None:
        compute(arguments.criu, arguments.room)
        return
    with tempfile.TemporaryDirectory(prefix="criupy-example-") as directory:
        try:
            run(arguments.criu, Path(directory))
        except criupy.CriuError as error:
            sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
