"""Dump to a page server: memory goes over TCP to another directory, here on the same machine.

The page server is a child of CRIU's worker, so its end, and whether it ended well, can be waited for.

Run as root:  python examples/page_server.py --criu /usr/sbin/criu
"""

from __future__ import annotations

import argparse
import os
import shutil
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
memory = b"x" * (32 << 20)
count = 0
while True:
    count += 1
    file.with_suffix(".new").write_text(f"{count} {len(memory.strip(b'x'))}")
    file.with_suffix(".new").replace(file)
    time.sleep(0.05)
"""


def read_count(file: Path, *, above: int = 0) -> int:
    """Wait until the counter has written a number larger than this one, and that its memory is right."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if file.exists():
            count, wrong = map(int, file.read_text().split())
            if wrong:
                sys.exit(f"Error: {wrong} bytes of memory are wrong")
            if count > above:
                return count
        time.sleep(0.02)
    sys.exit("Error: the counter does not count")


def megabytes(directory: Path) -> str:
    """Tell the size of the pages in a directory."""
    return f"{sum(file.stat().st_size for file in directory.glob('pages-*.img')) >> 20} MiB of pages"


def dump_to_server(criu: criupy.Criu, pid: int, images: Path, pages: Path) -> None:
    """Start a page server on a free port, dump to it, and see it end."""
    with criu.page_server_child(images_dir=pages, page_server=("127.0.0.1", 0)) as server:
        print(f"page server: process {server.pid}, port {server.port}")
        criu.dump(pid, images_dir=images, page_server=("127.0.0.1", server.port), request_timeout=60)
        print(f"page server: exit status {server.wait(request_timeout=60)}")
    print(f"here: {megabytes(images)}, at the page server: {megabytes(pages)}")


def run(binary: str, room: Path) -> None:
    """Dump to the server, put the images together, restore."""
    images, pages, count = room / "images", room / "pages", room / "count"
    images.mkdir()
    pages.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTER, str(count)],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        read_count(count)
        with criupy.Criu(binary) as criu:
            dump_to_server(criu, process.pid, images, pages)
            process.wait()
            # A restore wants all images in one directory: those of the dump and those of the server.
            shutil.copytree(images, pages, dirs_exist_ok=True)
            before = read_count(count)
            restored = criu.restore(images_dir=pages, request_timeout=60)
        try:
            print(f"dumped at {before}, restored, counts on: {read_count(count, above=before)}")
        finally:
            os.kill(restored.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Dump to a page server, and restore.")
    parser.add_argument("--criu", default="criu", metavar="PATH", help="CRIU's program")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="criupy-example-") as room:
        try:
            run(arguments.criu, Path(room))
        except criupy.CriuError as error:
            sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
