"""The marker that a relay puts beside the images, and that travels with them.

It tells a destination that what it will connect to is a relay, and carries the key
by which the relay knows that it is meant. Stock CRIU does not look at it. It belongs
to one dump: beside other images it says nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criupy.errors import ImageError
from criupy.images._framing import StrPath
from criupy.images._original import original_images

#: The marker's file name.
MARKER: Final = "criupy-relay.json"

_VERSION: Final = 1
_KEY_LENGTH: Final = 32


@dataclass(frozen=True, slots=True)
class RelayMarker:
    """What a relay tells its destination.

    ``key`` are 32 secret bytes. ``hold_timeout`` is after how many seconds without
    a destination the relay lets the source go on; None: never.
    """

    key: bytes
    hold_timeout: float | None


def fingerprint(images_dir: StrPath) -> str:
    """Digest what tells this dump from all others: its inventory, processes and pagemaps."""
    import hashlib  # with OpenSSL, and there is seldom a marker

    directory = Path(images_dir)
    digest = hashlib.sha256()
    try:
        pagemaps = sorted(directory.glob("pagemap-*.img"))
        for path in (directory / "inventory.img", directory / "pstree.img", *pagemaps):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    except OSError as error:
        raise ImageError(directory, None, f"expected the images of a dump: {error}") from error
    return digest.hexdigest()


def write_marker(images_dir: StrPath, marker: RelayMarker) -> Path:
    """Put a marker beside the images, for nobody but their owner to read; return its path."""
    import json

    path = Path(images_dir) / MARKER
    text = json.dumps(
        {
            "version": _VERSION,
            "dump": fingerprint(images_dir),
            "key": marker.key.hex(),
            "hold_timeout": marker.hold_timeout,
        },
        indent=1,
    )
    partial = path.with_name(f"{MARKER}.{os.getpid()}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text + "\n")
        partial.replace(path)
    except OSError as error:
        raise ImageError(path, None, f"it cannot be written: {error.strerror}") from error
    return path


def read_marker(images_dir: StrPath) -> RelayMarker | None:
    """Read the marker of these images; None where there is none, or one of another dump.

    Raises ImageError for one that no relay of this version wrote.
    """
    images_dir = original_images(images_dir)
    path = Path(images_dir) / MARKER
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(path, None, f"it cannot be read: {error}") from error
    import json  # see fingerprint

    try:
        found = json.loads(text)
        marker = RelayMarker(bytes.fromhex(found["key"]), found["hold_timeout"])
        dump, version = found["dump"], found["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(
            path, None, f"expected what a relay writes: {error!r}; start the relay anew"
        ) from error
    if version != _VERSION or len(marker.key) != _KEY_LENGTH:
        raise ImageError(path, None, "expected the marker of a relay of this version of criupy")
    if not isinstance(marker.hold_timeout, float | int | None):
        raise ImageError(path, None, f"expected seconds or null as hold_timeout, not {marker.hold_timeout!r}")
    return marker if dump == fingerprint(images_dir) else None
