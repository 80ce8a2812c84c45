"""Decide about a dump while it is under way: the trio client, with notifications as an iterator.

A dump is refused where its images would not fit on the disk; the process goes on as if nothing had been.

Run as root:  python examples/notifications.py --criu /usr/sbin/criu
"""

from __future__ import annotations

import argparse
import mmap
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import trio

import criupy
from criupy.rpc import Refused

SLEEPER = "import time; time.sleep(1000)"


def resident(pid: int) -> int:
    """Return how many bytes of memory a process has: about what its images take."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


async def dump(criu: criupy.AsyncCriu, pid: int, images: Path, *, reserve: int) -> None:
    """Dump a process if its images leave this many bytes free, and let it go on in any case."""
    async with criu.open_dump(pid, images_dir=images, leave_running=True, request_timeout=60) as operation:
        async for notification in operation:
            print(f"  {notification.script}")
            if notification.script == criupy.Script.PRE_DUMP:
                free = shutil.disk_usage(images).free
                if free - resident(pid) < reserve:
                    notification.refuse(f"{free >> 20} MiB are free, {reserve >> 20} MiB have to remain")


async def main(binary: str, room: Path) -> None:
    """Try it twice, the first time with a reserve that no disk has."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", SLEEPER],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with criupy.AsyncCriu(binary) as criu:
            print(f"CRIU {await criu.version()}, process {process.pid}")
            for name, reserve in (("careful", 1 << 60), ("easy", 1 << 20)):
                images = room / name
                await trio.Path(images).mkdir()
                print(f"{name}:")
                try:
                    await dump(criu, process.pid, images, reserve=reserve)
                    print("  dumped")
                except Refused as refusal:
                    print(f"  {refusal}")
                print(f"  process {process.pid} {'runs' if process.poll() is None else 'is gone'}")
    finally:
        process.kill()
        await process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Refuse a dump for lack of disk space.")
    parser.add_argument("--criu", default="criu", metavar="PATH", help="CRIU's program")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="criupy-example-") as directory:
        try:
            trio.run(main, arguments.criu, Path(directory))
        except criupy.CriuError as error:
            sys.exit(f"Error: {error}")
