"""Dump a process, restore it, and see it go on: the blocking client, with hooks.

Run as root:  python examples/dump_and_restore.py --criu /usr/sbin/criu
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

COUNTER = """
import pathlib, sys, time
file = pathlib.Path(sys.argv[1])
count = 0
while True:
    count += 1
    file.with_suffix(".new").write_text(str(count))
    file.with_suffix(".new").replace(file)
    time.sleep(0.05)
"""


def read_count(file: Path, *, above: int = 0) -> int:
    """Wait until the counter has written a number larger than this one."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if file.exists() and (count := int(file.read_text())) > above:
            return count
        time.sleep(0.02)
    sys.exit("Error: the counter does not count")


class Report(criupy.Hooks):
    """CRIU stops at each of these points until the hook has returned."""

    def __init__(self, images: Path) -> None:
        self.images = images

    def post_dump(self) -> None:
        """See what was written. The process is frozen; an exception here would let it go on."""
        size = sum(file.stat().st_size for file in self.images.iterdir())
        print(f"post-dump: {size >> 10} KiB of images")

    def post_restore(self, pid: int) -> None:
        """See that the process is there again. It does not run yet."""
        print(f"post-restore: process {pid}")


def dump_and_restore(binary: str, room: Path) -> None:
    """Do it in a directory that is ours."""
    images = room / "images"
    images.mkdir()
    # In a session of its own and without our terminal, so that its images do not refer to either.
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTER, str(room / "count")],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        read_count(room / "count")
        with criupy.Criu(binary) as criu:
            print(f"CRIU {criu.version()}, process {process.pid}")
            criu.dump(process.pid, images_dir=images, hooks=Report(images), request_timeout=60)
            process.wait()  # the dump has killed it; reaped, its pid is free for the restored one
            count = read_count(room / "count")
            print(f"dumped at {count}")
            restored = criu.restore(images_dir=images, hooks=Report(images), request_timeout=60)
        try:
            print(f"restored, counts on: {read_count(room / 'count', above=count)}")
        finally:
            os.kill(restored.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Dump a process, restore it, and see it go on.")
    parser.add_argument("--criu", default="criu", metavar="PATH", help="CRIU's program")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="criupy-example-") as room:
        try:
            dump_and_restore(arguments.criu, Path(room))
        except criupy.CriuError as error:
            sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
