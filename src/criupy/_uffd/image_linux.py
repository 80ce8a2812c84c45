"""What the images say of one dumped task, for the native part."""

from __future__ import annotations

import errno
from array import array
from pathlib import Path
from typing import Any

from criupy.errors import UffdError, UffdUnavailable

try:
    from criupy._uffd._native import ffi, lib
except ImportError as error:
    raise UffdUnavailable(
        "load criupy's native part", errno.ENOSYS, "it exists on Linux only; install a wheel built there"
    ) from error

__all__ = ["Image", "check", "ffi", "lib"]


def check(operation: str, result: int) -> int:
    """Return what C returned, or raise UffdError for its errno."""
    if result < 0:
        raise UffdError(operation, -result)
    return result


class Image:
    """What the images say of one dumped task's lazy pages.

    ``starts`` and ``nr_pages`` are the extents in address order (bytes and
    4096-byte pages), ``data_pages`` each extent's first page in its pages
    file, ``not_inherited`` a byte per extent that is 1 where a forked child
    does not get the memory. ``id`` is what the source calls the task. In
    ``data_pages`` the bits from 48 on tell which of the pages files it is, in the order
    in which they are attached; all bits are set where the source has the extent.
    """

    def __init__(
        self,
        id: int,
        starts: array[int],
        nr_pages: array[int],
        data_pages: array[int] | None = None,
        not_inherited: bytes | None = None,
    ) -> None:
        tables = {"starts": starts, "nr_pages": nr_pages, "data_pages": data_pages}
        for name, table in tables.items():
            # C reads as much as it is told there is.
            if table is not None and (table.itemsize != 8 or len(table) != len(starts)):
                raise ValueError(
                    f"{name}: expected an array('Q') of {len(starts)} extents, "
                    f"got {table.typecode!r} of {len(table)}"
                )
        if not_inherited is not None and len(not_inherited) != len(starts):
            raise ValueError(f"not_inherited: expected {len(starts)} bytes, got {len(not_inherited)}")
        out = ffi.new("struct criupy_image **")
        check(
            "take over lazy extents",
            lib.criupy_image_create(
                out,
                id,
                ffi.from_buffer("uint64_t[]", starts),
                ffi.from_buffer("uint64_t[]", nr_pages),
                ffi.NULL if data_pages is None else ffi.from_buffer("uint64_t[]", data_pages),
                ffi.NULL if not_inherited is None else ffi.from_buffer("uint8_t[]", not_inherited),
                len(starts),
            ),
        )
        self._image: Any = ffi.gc(out[0], lib.criupy_image_destroy)
        #: How many extents it has.
        self.nr_extents: int = len(starts)
        #: Lazy pages in all extents; known also when it was handed over.
        self.nr_pages: int = int(lib.criupy_image_nr_pages(self._image))

    def close(self) -> None:
        """Release it and its pages files, unless it was handed over."""
        if self._image != ffi.NULL:
            image = self._image
            self._given()
            lib.criupy_image_destroy(image)

    def attach(self, path: Path) -> None:
        """Serve from this pages file, which stays open; each call brings the next."""
        with path.open("rb") as file:
            check("open the pages file", lib.criupy_image_attach(self._image, file.fileno()))

    def _to_give(self) -> Any:
        if self._image == ffi.NULL:
            raise ValueError("the image was handed over: each task needs its own")
        return self._image

    def _given(self) -> None:
        ffi.gc(self._image, None)
        self._image = ffi.NULL
