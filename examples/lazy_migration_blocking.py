"""Migrate a process while its memory follows: both sides blocking, here on one machine.

The same as lazy_migration.py without trio; see there what each side does and why the destination needs a pid
namespace of its own here.

Run as root:  python examples/lazy_migration_blocking.py --criu /usr/sbin/criu
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def be_source(binary: str, room: Path) -> None:
    """Start a process, serve it, and see that it is gone here when it has moved."""
    images = room / "images"
    images.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTER, str(room / "count")],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        read_count(room / "count")
        with (
            criupy.Criu(binary, request_timeout=60) as criu,
            criu.lazy_dump(process.pid, images_dir=images) as source,
        ):
            address, port = source.address, source.port
            print(f"source: process {process.pid} is frozen, its memory at {address}:{port}", flush=True)
            subprocess.run(
                [
                    *("unshare", "--pid", "--fork", "--mount-proc"),
                    *(sys.executable, __file__, "--criu", binary),
                    *("--destination", room, "--source", address, str(port)),
                ],
                check=True,
            )
            print(f"source: the process here is {source.wait().value}")
    finally:
        process.kill()
        process.wait()


def be_destination(binary: str, room: Path, source: tuple[str, int]) -> None:
    """Restore the process here, and see it work while its memory comes."""
    work = room / "destination"
    work.mkdir()
    before = read_count(room / "count")
    started = time.monotonic()
    with (
        criupy.Criu(binary, request_timeout=60) as criu,
        criu.lazy_restore(images_dir=room / "images", work_dir=work, page_server=source) as restored,
    ):
        seconds = time.monotonic() - started
        print(f"destination: process {restored.pid} runs after {seconds:.2f} s, was at {before}")
        print(f"destination: counts on: {read_count(room / 'count', above=before)}")
        restored.wait()
        print(f"destination: all memory is here after {time.monotonic() - started:.2f} s")
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
            be_destination(arguments.criu, arguments.destination, (host, int(port)))
        else:
            with tempfile.TemporaryDirectory(prefix="criupy-example-") as directory:
                be_source(arguments.criu, Path(directory))
    except (criupy.CriuError, criupy.LazyPagesError) as error:
        sys.exit(f"Error: {error}")
    except subprocess.CalledProcessError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        sys.exit(f"Error: the destination ended with status {error.returncode}{notes}")


if __name__ == "__main__":
    main()
