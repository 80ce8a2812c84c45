"""A program that dumps itself: what a user writes, blocking or on trio.

rpc_self_dump.py blocking|trio binary|socket PATH IMAGES [leave|unasked]
"""

from __future__ import annotations

import os
import sys
from typing import Any

import trio

import criupy


def say(restored: bool, secret: bytes) -> None:
    which = "restored" if restored else "original"
    sys.stdout.write(f"{which} {os.getpid()} {secret.hex()}\n")
    sys.stdout.flush()


def blocking(how: dict[str, Any], images: str, options: dict[str, Any], secret: bytes) -> None:
    with criupy.Criu(**how) as criu:
        if "network_lock" not in options:  # for which it is asked anyway
            criu.version()  # leaves a worker that waits, which must not be dumped
        say(criu.self_dump(images_dir=images, **options), secret)
        criu.version()


async def on_trio(how: dict[str, Any], images: str, options: dict[str, Any], secret: bytes) -> None:
    async with criupy.AsyncCriu(**how) as criu:
        if "network_lock" not in options:
            await criu.version()
        say(await criu.self_dump(images_dir=images, **options), secret)
        await criu.version()


def main() -> None:
    kind, way, path, images, *rest = sys.argv[1:]
    options: dict[str, Any] = {}
    if rest == ["leave"]:
        options = {"leave_running": True}
    elif rest == ["unasked"]:
        options = {"network_lock": "skip"}
    secret = os.urandom(16)
    if kind == "trio":
        trio.run(on_trio, {way: path}, images, options, secret)
    else:
        blocking({way: path}, images, options, secret)


main()
