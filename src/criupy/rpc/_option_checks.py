"""Is this value what CRIU takes? A check returns it as it goes on the wire, or raises OptionError.

CRIU takes nearly anything over RPC: an enumeration out of range fails without
a word, a relative path is looked up below its working directory, a file name
of "-" is its standard output. So a value is checked here for type, range and
meaning before anything is sent, and a refusal names the option, what was
expected and what came.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn, TypeVar

from criupy.errors import OptionError
from criupy.rpc._option_types import CriuPath, HasFileno, JoinNs

UINT32_MAX: Final = (1 << 32) - 1
PORT_MAX: Final = (1 << 16) - 1
PATH_MAX: Final = 4096
NAME_MAX: Final = 255

# IFNAMSIZ of the kernel without the final NUL.
INTERFACE_NAME_MAX: Final = 15

# CRIU reads the ids of a JoinNs, and a pid in the place of its file, as 16-bit numbers (criu/namespaces.c).
JOIN_NUMBER_MAX: Final = (1 << 16) - 1

_SHOWN: Final = 60
_JOINABLE: Final = ("ipc", "mnt", "net", "time", "user", "uts")
_T = TypeVar("_T")


def refuse(option: str, expected: str, value: object) -> NoReturn:
    """Raise the OptionError for a value."""
    shown = repr(value)
    if len(shown) > _SHOWN:
        shown = shown[: _SHOWN - 4] + " ..."
    raise OptionError(option, f"expected {expected}, got {shown}")


def flag(option: str, value: object) -> bool:
    if not isinstance(value, bool):
        refuse(option, "True or False", value)
    return value


def integer(low: int, high: int, what: str = "a number") -> Callable[[str, object], int]:
    """Check for a whole number in a closed range."""

    def check(option: str, value: object) -> int:
        # A bool is an int to Python, and 1 second is not what timeout=True means.
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            refuse(option, f"{what} from {low} to {high}", value)
        return value

    return check


def string(option: str, value: object, what: str) -> str:
    if not isinstance(value, str):
        refuse(option, what, value)
    if "\0" in value:
        refuse(option, f"{what} without NUL bytes", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(option, f"{what} in valid Unicode (CRIU's messages carry nothing else)", value)
    return value


def text(option: str, value: object) -> str:
    if value == "":
        refuse(option, "text that is not empty", value)
    return string(option, value, "a str")


def path(option: str, value: object) -> str:
    """Check a path that goes to CRIU as it is: one inside the tree, or relative to a directory of CRIU's."""
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if found == "":
        refuse(option, "a path that is not empty", value)
    found = string(option, found, "a path (str or os.PathLike of str)")
    if len(found.encode()) >= PATH_MAX:
        refuse(option, f"a path of fewer than {PATH_MAX} bytes", value)
    return found


def absolute(option: str, value: object) -> str:
    found = path(option, value)
    if not found.startswith("/"):
        refuse(option, "an absolute path", value)
    return found


def host_path(option: str, value: object) -> str:
    """Make a path absolute, because CRIU opens it after it has gone to its work directory."""
    return path(option, str(Path(path(option, value)).absolute()))


def host_file(option: str, value: object) -> str:
    """Check for a regular file that exists; make its path absolute."""
    found = host_path(option, value)
    try:
        mode = Path(found).stat().st_mode
    except OSError as error:
        raise OptionError(option, f"expected a file, got {found}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        refuse(option, "a regular file", found)
    return found


def host_directory(option: str, value: object) -> str:
    """Make the path of a directory absolute; CRIU may see one where this process sees nothing."""
    found = host_path(option, value)
    if Path(found).exists() and not Path(found).is_dir():
        refuse(option, "a directory", found)
    return found


def descriptor(option: str, value: object, what: str = "an open descriptor") -> tuple[int, os.stat_result]:
    """Check a descriptor, or what has one; return its number and what it is."""
    if isinstance(value, HasFileno):
        try:
            number: object = value.fileno()
        except (OSError, ValueError) as error:
            raise OptionError(option, f"expected {what}, got a closed {type(value).__name__}") from error
    else:
        number = value
    if isinstance(number, bool) or not isinstance(number, int):
        refuse(option, f"{what} (a number, or an object with fileno())", value)
    if not 0 <= number < 1 << 31:
        refuse(option, what, value)
    try:
        return number, os.fstat(number)
    except OSError as error:
        raise OptionError(option, f"expected {what}, got {number}: {error.strerror}") from error


def inherited(option: str, value: object) -> tuple[int, os.stat_result]:
    """Check a descriptor that the worker must have under the same number."""
    number, status = descriptor(option, value)
    if number <= 2:
        refuse(option, "a descriptor above 2 (0 to 2 are the worker's own)", value)
    return number, status


def directory(option: str, value: object) -> str | int | CriuPath:
    """Check a directory: a path that exists here, a descriptor of one, or a CriuPath."""
    if isinstance(value, CriuPath):
        absolute(option, value.path)
        return value
    if isinstance(value, (str, os.PathLike)):
        found = path(option, value)
        try:
            mode = Path(found).stat().st_mode
        except OSError as error:
            raise OptionError(option, f"expected a directory, got {found}: {error.strerror}") from error
        if not stat.S_ISDIR(mode):
            refuse(option, "a directory", found)
        return found
    number, status = descriptor(option, value, "a directory: a path, an open descriptor or a CriuPath")
    if not stat.S_ISDIR(status.st_mode):
        refuse(option, "a descriptor of a directory", value)
    return number


def log_file(option: str, value: object) -> str:
    name = text(option, value)
    if "/" in name or name in {".", ".."}:
        refuse(option, "a file name without directories (it is made in work_dir)", value)
    if name == "-":
        refuse(option, "a file name (CRIU takes - for its standard output)", value)
    if len(name.encode()) > NAME_MAX:
        refuse(option, f"a file name of at most {NAME_MAX} bytes", value)
    return name


def lsm_profile(option: str, value: object) -> str:
    found = text(option, value)
    if not re.fullmatch(r"(?:apparmor|selinux):.+|none:.*", found, re.DOTALL):
        refuse(option, '"apparmor:PROFILE", "selinux:LABEL" or "none:"', value)
    return found


def interface(option: str, value: object) -> str:
    """Check the name of a network interface by the kernel's rules (net/core/dev.c, dev_valid_name)."""
    name = text(option, value)
    if name in {".", ".."} or len(name.encode()) > INTERFACE_NAME_MAX or re.search(r"[/:\s]", name):
        refuse(
            option,
            f"an interface's name (at most {INTERFACE_NAME_MAX} bytes, no slash, colon or space)",
            value,
        )
    return name


def external(option: str, value: object) -> str:
    """Check the shape TYPE[ID] or TYPE[ID]:VALUE, since CRIU overlooks what it cannot read."""
    found = text(option, value)
    if not re.fullmatch(r"\w+\[.*\](?::.+)?", found, re.DOTALL) and found != "mnt[]:":
        refuse(option, "TYPE[ID] or TYPE[ID]:VALUE (criupy.rpc.external makes them)", value)
    # From 3.11 on CRIU reads a single letter here, and takes no notice of the rest.
    if found.startswith("mnt[]") and found not in {"mnt[]", "mnt[]:", "mnt[]:m", "mnt[]:s"}:
        refuse(option, 'after "mnt[]" nothing, ":m" or ":s" (for both, give two)', value)
    return found


def choice(numbers: Mapping[str, int]) -> Callable[[str, object], int]:
    """Check for a name of an enumeration."""
    names = tuple(numbers)

    def check(option: str, value: object) -> int:
        if not isinstance(value, str) or value not in numbers:
            refuse(option, alternatives(names), value)
        return numbers[value]

    return check


def alternatives(names: Sequence[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def each(option: str, value: object, check: Callable[[str, object], _T]) -> list[_T]:
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Sequence):
        refuse(option, "a sequence (a list, say)", value)
    found = []
    for index, item in enumerate(value):
        try:
            found.append(check(option, item))
        except OptionError as error:
            raise OptionError(option, f"item {index}: {error.expected}") from None
    return found


def mapping(option: str, value: object, what: str) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        refuse(option, f"a mapping of {what}", value)
    return value


def join_namespace(option: str, value: object) -> JoinNs:
    if not isinstance(value, JoinNs):
        refuse(option, "a JoinNs", value)
    if value.ns not in _JOINABLE:
        refuse(option, f"a namespace {alternatives(_JOINABLE)}", value.ns)
    given = path(option, value.ns_file)
    if given.isascii() and given.isdigit():
        if not 0 < int(given) <= JOIN_NUMBER_MAX:
            refuse(option, f"a pid from 1 to {JOIN_NUMBER_MAX} (for others /proc/PID/ns/{value.ns})", given)
    else:
        given = host_path(option, given)
    if value.extra_opt is not None:
        if value.ns != "user":
            refuse(option, "extra_opt with a user namespace only", value.extra_opt)
        ids = string(option, value.extra_opt, "UID or UID,GID")
        if not re.fullmatch(r"[0-9]+(?:,[0-9]+)?", ids, re.ASCII):
            refuse(option, 'extra_opt to be "UID" or "UID,GID"', ids)
        if any(int(number) > JOIN_NUMBER_MAX for number in ids.split(",")):
            refuse(option, f"ids up to {JOIN_NUMBER_MAX} (CRIU reads no others)", ids)
    return JoinNs(value.ns, given, value.extra_opt)
