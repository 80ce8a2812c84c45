"""Migrate a process while its memory follows: both sides on trio, here on one machine.

The source freezes a process and serves its memory. The destination, a second program, restores it at once;
criupy's lazy-pages daemon fetches what the process touches, and the rest behind it. On two hosts the
images would be copied, or lie in a shared directory; here both sides use the same one. And here the
destination needs a pid namespace of its own (``unshare``), because the frozen process still has its pid.

Run as root:  python examples/lazy_migration.py --criu /usr/sbin/criu
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

import criupy

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


async def be_source(binary: str, room: Path) -> None:
    """Start a process, serve it, and see that it is gone here when it has moved."""
    images = room / "images"
    await trio.Path(images).mkdir()
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", COUNTER, str(room / "count")],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await read_count(room / "count")
        async with (
            criupy.AsyncCriu(binary, request_timeout=60) as criu,
            criu.lazy_dump(process.pid, images_dir=images) as source,
        ):
            address, port = source.address, source.port
            print(f"source: process {process.pid} is frozen, its memory at {address}:{port}", flush=True)
            await trio.run_process(
                [
                    *("unshare", "--pid", "--fork", "--mount-proc"),
                    *(sys.executable, __file__, "--criu", binary),
                    *("--destination", room, "--source", address, str(port)),
                ]
            )
            print(f"source: the process here is {(await source.wait()).value}")
    finally:
        process.kill()
        await process.wait()


async def be_destination(binary: str, room: Path, source: tuple[str, int]) -> None:
    """Restore the process here, and see it work while its memory comes."""
    work = room / "destination"
    await trio.Path(work).mkdir()
    before = await read_count(room / "count")
    started = time.monotonic()
    async with (
        criupy.AsyncCriu(binary, request_timeout=60) as criu,
        criu.lazy_restore(images_dir=room / "images", work_dir=work, page_server=source) as restored,
    ):
        seconds = time.monotonic() - started
        print(f"destination: process {restored.pid} runs after {seconds:.2f} s, was at {before}", flush=True)
        after = await read_count(room / "count", above=before)
        print(f"destination: counts on: {after}", flush=True)
        await restored.wait()
        print(f"destination: all memory is here after {time.monotonic() - started:.2f} s", flush=True)
    # This is the init of the pid namespace: the restored process ends with it.


def main() -> None:
    """Read the command line, which is longer for the destination."""
    parser = argparse.ArgumentParser(description="Migrate a process while its memory follows.")
    parser.add_argument("--criu", default="criu", metavar="PATH", help="CRIU's program")
    parser.add_argument("--destination", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--source", nargs=2, metavar=("HOST", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.destination is not None:
            host, port = arguments.source
            trio.run(be_destination, arguments.criu, arguments.destination, (host, int(port)))
        else:
            with tempfile.TemporaryDirectory(prefix="criupy-example-") as directory:
                trio.run(be_source, arguments.criu, Path(directory))
    except (criupy.CriuError, criupy.LazyPagesError) as error:
        sys.exit(f"Error: {error}")
    except subprocess.CalledProcessError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        sys.exit(f"Error: the destination ended with status {error.returncode}{notes}")


if __name__ == "__main__":
    main()
