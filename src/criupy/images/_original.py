"""The marker in a directory that was made of a dump with parents: it tells where the dump is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from criupy.errors import ImageError
from criupy.images._framing import StrPath

#: The marker's file name.
LAZY_PARENTS: Final = "criupy-lazy-parents.json"

_VERSION: Final = 1


def original_images(images_dir: StrPath) -> Path:
    """Tell which dump a directory was made of by ``write_lazy_parents``; itself if it is none of those.

    Raises ImageError for a marker that was not written by this version.
    """
    directory = Path(images_dir)
    path = directory / LAZY_PARENTS
    try:
        text = path.read_text()
    except FileNotFoundError:
        return directory
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(path, None, f"it cannot be read: {error}") from error
    import json  # there is seldom a marker

    try:
        found = json.loads(text)
        version, images = found["version"], Path(directory, found["images"])
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(path, None, f"expected what criupy lazy-parents writes: {error!r}") from error
    if version != _VERSION:
        raise ImageError(path, None, "expected the marker of this version of criupy: make the directory anew")
    return images


def original_text(relative: str) -> str:
    """Return what a marker says; ``relative`` leads from its directory to the dump's."""
    import json

    return json.dumps({"version": _VERSION, "images": relative}, indent=1) + "\n"
