"""How CRIU is reached: a worker of our own, the socket of a service, or a given descriptor."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from criupy.errors import OptionError

__all__ = ["Transport", "check_seconds", "make_transport"]


@dataclass(frozen=True, slots=True)
class Transport:
    """One of ``binary``, ``socket`` and ``fd`` is set; times are in seconds."""

    binary: str | None
    socket: str | None
    fd: int | None
    arguments: tuple[str, ...]
    capture_output: bool
    request_timeout: float | None
    grace: float

    @property
    def is_own(self) -> bool:
        """Whether we start the workers."""
        return self.binary is not None


def check_seconds(option: str, value: float | None) -> float | None:
    """Return a time in seconds, or refuse what is none."""
    given: object = value
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or math.isnan(given) or given < 0:
        raise OptionError(option, f"expected seconds, 0 or more, or None for no limit; got {given!r}")
    return float(given)


def make_transport(
    binary: str | os.PathLike[str] | None,
    socket: str | os.PathLike[str] | None,
    fd: int | None,
    *,
    default_config: bool,
    capture_output: bool,
    request_timeout: float | None,
    grace: float,
) -> Transport:
    """Check what a client was given."""
    ways = {"binary": binary, "socket": socket, "fd": fd}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise OptionError(given[1], f"expected one of binary, socket and fd, got {' and '.join(given)}")
    number: object = fd
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
        raise OptionError("fd", f"expected the number of a descriptor, got {number!r}")
    for name in ("binary", "socket"):
        path: object = ways[name]
        if path is not None and not (isinstance(path, (str, os.PathLike)) and os.fspath(path)):
            raise OptionError(name, f"expected a path, got {path!r}")
    seconds = check_seconds("grace", grace)
    if seconds is None:
        raise OptionError("grace", "expected seconds, got None")
    return Transport(
        binary=os.fsdecode(binary) if binary is not None else None if given else "criu",
        socket=None if socket is None else os.fsdecode(socket),
        fd=fd,
        arguments=() if default_config else ("--no-default-config",),
        capture_output=capture_output,
        request_timeout=check_seconds("request_timeout", request_timeout),
        grace=seconds,
    )
