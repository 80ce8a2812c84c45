"""Restore one checkpoint several times at once: every copy gets its memory from one page server.

A process is dumped in full. The page server gives out its lazy pages to any number of destinations; each is
a second program that restores the process at once, while its memory follows. Here they are on one machine,
so each needs a pid namespace of its own, and a directory that no other copy writes to.

Run as root:  python examples/restore_many.py --criu /usr/sbin/criu
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import trio

import criupy
from criupy.page_server import Config, PageServer, open_page_server

COPIES = 3
COUNTER = """
import pathlib, sys, time
file = pathlib.Path(sys.argv[1])
memory = b"x" * (64 << 20)
count = 0
while True:
    count += 1
    file.with_suffix(".new").write_text(f"{count} {len(memory.strip(b'x'))}")
    file.with_suffix(".new").replace(file)
    time.sleep(0.05)
"""


async def read_count(file: Path, *, above: int = 0) -> int:
    """Wait until the counter has written a number larger than this one, and that its memory is right."""
    with trio.fail_after(30):
        while True:
            if await trio.Path(file).exists():
                count, wrong = map(int, (await trio.Path(file).read_text()).split())
                if wrong:
                    sys.exit(f"Error: {wrong} bytes of memory are wrong")
                if count > above:
                    return count
            await trio.sleep(0.02)


async def dump(binary: str, room: Path) -> int:
    """Dump a process that counts, which ends it here; return what it had counted to."""
    (room / "images").mkdir()
    (room / "out").mkdir()
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", COUNTER, str(room / "out" / "count")],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await read_count(room / "out" / "count", above=3)
        async with criupy.AsyncCriu(binary, request_timeout=60) as criu:
            await criu.dump(process.pid, images_dir=room / "images")
    finally:
        process.kill()
        await process.wait()
    return await read_count(room / "out" / "count")


async def restore_elsewhere(
    binary: str, room: Path, server: PageServer, copy: int, failed: list[int]
) -> None:
    """Run a destination: this program again, with other namespaces."""
    (room / str(copy)).mkdir()
    destination = await trio.run_process(
        [
            *("unshare", "--pid", "--mount", "--fork", "--mount-proc"),
            *(sys.executable, __file__, "--criu", binary),
            *("--copy", str(copy), room, server.address, str(server.port)),
        ],
        check=False,
    )
    if destination.returncode:
        failed.append(copy)


async def be_destination(binary: str, room: Path, source: tuple[str, int], copy: str) -> None:
    """Restore the process here, and see it work while its memory comes."""
    before = await read_count(room / "out" / "count")
    await trio.run_process(["mount", "--bind", room / copy, room / "out"])
    async with (
        criupy.AsyncCriu(binary, request_timeout=60) as criu,
        criu.lazy_restore(images_dir=room / "images", work_dir=room / copy, page_server=source) as restored,
    ):
        await read_count(room / "out" / "count", above=before)
        await restored.wait()
        print(f"copy {copy}: counts on, and all of its memory is here", flush=True)
    # This is the init of the pid namespace: the restored process ends with it.


async def be_source(binary: str, room: Path) -> None:
    """Dump once, serve until every copy has its memory, and tell what the server saw."""
    print(f"dumped at {await dump(binary, room)}", flush=True)
    failed: list[int] = []
    async with open_page_server(Config(room / "images")) as server:
        async with trio.open_nursery() as nursery:
            for copy in range(1, COPIES + 1):
                nursery.start_soon(restore_elsewhere, binary, room, server, copy, failed)
        server.stop()
        await server.wait()
        told = server.statistics
        print(f"served {told.pages} pages to {told.ended} destinations: {dict(told.endings)}")
    if failed:
        sys.exit(f"Error: {len(failed)} copies failed")


def main() -> None:
    """Read the command line, which is longer for a destination."""
    parser = argparse.ArgumentParser(description="Restore one checkpoint several times at once.")
    parser.add_argument("--criu", default="criu", metavar="PATH", help="CRIU's program")
    parser.add_argument("--copy", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.copy is not None:
            copy, room, host, port = arguments.copy
            trio.run(be_destination, arguments.criu, Path(room), (host, int(port)), copy)
        else:
            with tempfile.TemporaryDirectory(prefix="criupy-example-") as directory:
                trio.run(be_source, arguments.criu, Path(directory))
    except (criupy.CriupyError, OSError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
