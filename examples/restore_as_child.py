"""Restore a process as a child of this one, with new pipes in the place of the old ones.

The process answers each line of its standard input on its standard output. Both were pipes to a program that
is gone by the time of the restore; ``inherit_fd`` puts ours there. As a child it can be waited for.

Run as root:  python examples/restore_as_child.py --criu /usr/sbin/criu
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import criupy
from criupy.rpc import external

ECHO = """
import sys
for number, line in enumerate(sys.stdin):
    print(number, line.strip().upper(), flush=True)
sys.exit(7)
"""


def dump_echo(criu: criupy.Criu, images: Path) -> tuple[str, str]:
    """Start the process, talk to it and dump it; return what the images call its pipes."""
    with subprocess.Popen(
        [sys.executable, "-c", ECHO],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print("before", file=process.stdin, flush=True)
            print(f"process {process.pid} says: {process.stdout.readline().strip()}")
            # A pipe has the same key at both ends.
            keys = external.key_of(process.stdin), external.key_of(process.stdout)
            criu.dump(process.pid, images_dir=images, request_timeout=60)
        finally:
            process.kill()
    return keys


def restore_echo(criu: criupy.Criu, images: Path, keys: tuple[str, str]) -> None:
    """Restore it with pipes of ours, talk to it again, and reap it."""
    its_input, our_output = os.pipe()
    our_input, its_output = os.pipe()
    with open(our_output, "w") as writing, open(our_input) as reading:  # noqa: PTH123 - descriptors, not paths
        try:
            restored = criu.restore(
                images_dir=images,
                rst_sibling=True,  # a child of this process, not of init
                inherit_fd={keys[0]: its_input, keys[1]: its_output},
                request_timeout=60,
            )
        finally:
            os.close(its_input)
            os.close(its_output)
        print("after", file=writing, flush=True)
        print(f"process {restored.pid} says: {reading.readline().strip()}")
        writing.close()  # the end of its input, so it ends
        _, status = os.waitpid(restored.pid, 0)
        print(f"reaped it, exit status {os.waitstatus_to_exitcode(status)}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Restore a process as a child of this one.")
    parser.add_argument("--criu", default="criu", metavar="PATH", help="CRIU's program")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="criupy-example-") as room, criupy.Criu(arguments.criu) as criu:
        try:
            restore_echo(criu, Path(room), dump_echo(criu, Path(room)))
        except criupy.CriuError as error:
            sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
