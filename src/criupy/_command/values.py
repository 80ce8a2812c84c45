"""Kinds of values of options, for argparse: each takes a word, or says in one line what is wrong with it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from criupy._command.getopt import show

__all__ = [
    "descriptor",
    "host",
    "number",
    "optional_descriptor",
    "path",
    "port",
    "seconds",
    "size",
    "text",
    "where",
]

_LONGEST = 7 * 86400.0  # seconds; TCP_USER_TIMEOUT ends at 24 days
_LONGEST_US = 10_000


def number(word: str, low: int, high: int, what: str) -> int:
    """Take a whole number in plain digits."""
    # Not int(): it takes underscores, spaces and other scripts' digits.
    if re.fullmatch(r"[0-9]{1,10}", word) is None or not low <= int(word) <= high:
        raise argparse.ArgumentTypeError(f"'{show(word)}' is not {what} ({low} to {high})")
    return int(word)


def port(word: str) -> int:
    """Take the port of a server elsewhere."""
    return number(word, 1, 65535, "a port")


def descriptor(word: str) -> int:
    """Take the number of a descriptor."""
    return number(word, 0, 2**31 - 1, "a file descriptor")


def optional_descriptor(word: str) -> int | None:
    """Take the number of a descriptor; -1 is how CRIU says that there is none."""
    return None if word == "-1" else descriptor(word)


def seconds(word: str) -> float:
    """Take a time."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(ms|s|m)?", word)
    if match is not None:
        found = float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, None: 1.0}[match[2]]
        if 0.001 <= found <= _LONGEST:
            return found
    raise argparse.ArgumentTypeError(
        f"'{show(word)}' is not a time between 1ms and 7 days, such as 30, 2.5, 200ms or 5m"
    )


def microseconds(word: str) -> float:
    """Take a number of microseconds, at most 10 ms; return seconds."""
    if re.fullmatch(r"[0-9]{1,5}", word) is None or int(word) > _LONGEST_US:
        raise argparse.ArgumentTypeError(
            f"'{show(word)}' is not a number of microseconds up to {_LONGEST_US}"
        )
    return int(word) / 1e6


def text(word: str) -> str:
    """Take anything but nothing."""
    if not word:
        raise argparse.ArgumentTypeError("is empty")
    return word


def host(word: str) -> str:
    """Take an address or a name; an IPv6 address may stand in brackets."""
    return text(word[1:-1] if word.startswith("[") and word.endswith("]") else word)


def size(word: str) -> int:
    """Take a number of bytes."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(?:i?B)?", word)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{show(word)}' is not a size such as 64M or 2G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]


def where(word: str) -> tuple[str, int]:
    """Take a host and the port of a server there."""
    name, colon, number_there = word.rpartition(":")
    if not colon or (":" in name and not (name.startswith("[") and name.endswith("]"))):
        raise argparse.ArgumentTypeError(f"'{show(word)}' is not HOST:PORT (of IPv6 [ADDRESS]:PORT)")
    return host(name), port(number_there)


def path(word: str) -> Path:
    """Take a path."""
    return Path(text(word))
