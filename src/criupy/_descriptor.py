"""A file descriptor with one owner."""

from __future__ import annotations

import os
import warnings
from types import TracebackType
from typing import Self

__all__ = ["Descriptor"]


class Descriptor:
    """A file descriptor with one owner: who holds this object closes it."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __repr__(self) -> str:
        return f"<Descriptor {self._fd}>" if self._fd >= 0 else "<Descriptor, closed or detached>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def fileno(self) -> int:
        """Return the number; the descriptor stays owned here. -1 when it is owned no more."""
        return self._fd

    def detach(self) -> int:
        """Return the number and give up ownership."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Close it, once."""
        if self._fd >= 0:
            os.close(self.detach())
