"""The destination half of a lazy migration, as a program: what a user writes, blocking or on trio.

    rpc_destination.py blocking|trio CRIU IMAGES WORK HOST PORT [OPTIONS]

Prints the restored pid, and "complete" when the last page has come. OPTIONS
are more keyword arguments of lazy_restore, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import trio

import criupy


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def blocking(binary: str, images: Path, options: dict[str, Any]) -> None:
    with criupy.Criu(binary) as criu, criu.lazy_restore(images_dir=images, **options) as restored:
        say(f"{restored.pid}")


async def on_trio(binary: str, images: Path, options: dict[str, Any]) -> None:
    async with (
        criupy.AsyncCriu(binary) as criu,
        criu.lazy_restore(images_dir=images, **options) as restored,
    ):
        say(f"{restored.pid}")


def main() -> None:
    kind, binary, images, work, host, port, *rest = sys.argv[1:]
    options: dict[str, Any] = {"work_dir": work, "log_level": 4}
    if host:
        options["page_server"] = (host, int(port))
    for more in rest:
        options.update(json.loads(more))
    if kind == "trio":
        trio.run(on_trio, binary, Path(images), options)
    else:
        blocking(binary, Path(images), options)
    say("complete")


main()
