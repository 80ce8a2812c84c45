"""Move a container of runC to another host while its memory follows: one program for either side.

On the source it freezes the container and serves its memory, and says so; on the destination it restores
the container at once, and criupy's lazy-pages daemon fetches the rest. The directory of the images is
shared by both hosts, or is copied between the two lines that the source prints. When the destination
says that the container runs, its network can be plugged in there. CRIU up to 4.2 takes the address to listen
at from its configuration: the bundle's annotation org.criu.config names a file with "address 10.0.0.1".

Run as root, on the source:
    python examples/container_migration.py send httpd --images ckpt --listen 10.0.0.1:7000
and, when that has said that it serves, on the destination:
    python examples/container_migration.py receive httpd --images ckpt --source 10.0.0.1:7000 --bundle httpd
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import trio

import criupy
from criupy.runc import AsyncRunc


async def send(arguments: argparse.Namespace, runc: AsyncRunc) -> None:
    """Freeze the container and serve its memory until the destination has all of it."""
    async with runc.lazy_checkpoint(
        arguments.container,
        image_path=arguments.images,
        page_server=arguments.listen,
        tcp_established=True,
        request_timeout=60,
    ) as checkpoint:
        print(f"source: serves at {checkpoint.address}:{checkpoint.port}", flush=True)
        await checkpoint.wait()
    print("source: it has moved, and is gone here", flush=True)


async def receive(arguments: argparse.Namespace, runc: AsyncRunc) -> None:
    """Restore the container, and fetch its memory while it runs."""
    started = time.monotonic()
    async with runc.lazy_restore(
        arguments.container,
        bundle=arguments.bundle,
        image_path=arguments.images,
        page_server=arguments.source,
        tcp_established=True,
        request_timeout=60,
    ) as restored:
        seconds = time.monotonic() - started
        print(f"destination: runs as process {restored.pid} after {seconds:.2f} s", flush=True)
        await restored.wait()
    print(f"destination: all memory is here after {time.monotonic() - started:.2f} s", flush=True)


async def run(arguments: argparse.Namespace) -> None:
    """Do one side, after asking what CRIU can do here: that takes time which a frozen container has not."""
    runc = AsyncRunc(root=arguments.root, criu=arguments.criu)
    features = await runc.features()
    if not features.lazy_pages:
        sys.exit("Error: CRIU has no lazy pages on this kernel")
    await (send if arguments.side == "send" else receive)(arguments, runc)


def endpoint(text: str) -> tuple[str, int]:
    """Read ADDRESS:PORT."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Move a container of runC while its memory follows.")
    parser.add_argument("side", choices=["send", "receive"])
    parser.add_argument("container")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="shared by both sides")
    parser.add_argument("--listen", type=endpoint, metavar="ADDRESS:PORT", help="send: where to serve")
    parser.add_argument("--source", type=endpoint, metavar="ADDRESS:PORT", help="receive: where it serves")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="receive: the container's bundle")
    parser.add_argument("--root", type=Path, metavar="DIR", help="runC's state")
    parser.add_argument("--criu", default="criu", metavar="PATH", help="CRIU's program")
    arguments = parser.parse_args()
    if arguments.side == "send" and arguments.listen is None:
        parser.error("send needs --listen")
    if arguments.side == "receive" and (arguments.source is None or arguments.bundle is None):
        parser.error("receive needs --source and --bundle")
    try:
        trio.run(run, arguments)
    except criupy.CriupyError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        sys.exit(f"Error: {error}{notes}")


if __name__ == "__main__":
    main()
