"""Names of resources outside of the dumped tree: strings for ``external=``, keys for ``inherit_fd=``.

CRIU compares these strings as they are and overlooks one that it cannot
read, so a wrong number base or a missing bracket shows only as a dump or a
restore that fails for another reason. Functions named ``restore_...`` give
the other side's spelling where it differs. What was dumped as a file, a
terminal, a network or a pid namespace comes back through ``inherit_fd``: with
the same string that was given for a file or a terminal, and with the name
alone that was given for a namespace.

A bad argument is an OptionError of the option ``external`` or ``inherit_fd``.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from criupy._elsewhere import need_linux
from criupy.errors import OptionError
from criupy.rpc import _option_checks as check
from criupy.rpc._option_types import HasFileno, StrPath

__all__ = [
    "dev",
    "file",
    "key_of",
    "macvlan",
    "mnt",
    "mnt_auto",
    "net",
    "pid",
    "restore_dev",
    "restore_mnt",
    "tty",
    "unix",
    "veth",
]

_OPTION: Final = "external"
_UINT64_MAX: Final = (1 << 64) - 1
_number = check.integer(0, check.UINT32_MAX)
_wide_number = check.integer(0, _UINT64_MAX)


def mnt(mountpoint: StrPath, name: str) -> str:
    """Dump: call what is mounted at ``mountpoint``, a path in the tree, ``name`` in the images."""
    return f"mnt[{_id(check.absolute(_OPTION, mountpoint))}]:{check.text(_OPTION, name)}"


def restore_mnt(name: str, path: StrPath) -> str:
    """Restore: mount ``path`` of the host where ``mnt`` found ``name``."""
    return f"mnt[{_id(check.text(_OPTION, name))}]:{check.absolute(_OPTION, path)}"


def mnt_auto(*, masters: bool = False, sharing: bool = False) -> tuple[str, ...]:
    """Both: find mounts from outside by comparing with CRIU's own; ``external=[*mnt_auto(), ...]``.

    ``masters`` and ``sharing``, on a dump, take slave mounts and mounts shared
    with the host as well. CRIU from 3.11 on reads one such letter a string,
    hence the tuple.
    """
    letters = [
        letter
        for letter, wanted in (
            ("m", check.flag(_OPTION, masters)),
            ("s", check.flag(_OPTION, sharing)),
        )
        if wanted
    ]
    return tuple(f"mnt[]:{letter}" for letter in letters) or ("mnt[]",)


def dev(major: int, minor: int, name: str) -> str:
    """Dump: call the mounted block device of these numbers ``name`` in the images."""
    return f"dev[{_number(_OPTION, major)}/{_number(_OPTION, minor)}]:{_id(check.text(_OPTION, name))}"


def restore_dev(name: str, path: StrPath) -> str:
    """Restore: mount the block device ``path`` where ``dev`` found ``name``."""
    return f"dev[{_id(check.text(_OPTION, name))}]:{check.absolute(_OPTION, path)}"


def file(mnt_id: int, inode: int) -> str:
    """Dump an open file of a mount outside of the tree, and its key for the restore.

    ``mnt_id`` is what ``/proc/PID/fdinfo/N`` says, ``inode`` is st_ino. The
    file that takes its place must have the same size.
    """
    return f"file[{_number(_OPTION, mnt_id):x}:{_wide_number(_OPTION, inode):x}]"


def tty(rdev: int, dev: int) -> str:
    """Dump a terminal outside of the tree, and its key for the restore: st_rdev and st_dev of it."""
    # Images keep 32 bits of both.
    return f"tty[{_number(_OPTION, rdev):x}:{_number(_OPTION, dev):x}]"


def unix(inode: int) -> str:
    """Dump: let the nameless Unix socket of this inode lose its other end, which is outside of the tree."""
    return f"unix[{check.integer(1, check.UINT32_MAX)(_OPTION, inode)}]"


def net(inode: int, name: str) -> str:
    """Dump: leave out the network namespace of this inode; ``name`` is its key for the restore. CRIU 3.11."""
    return f"net[{_number(_OPTION, inode)}]:{check.text(_OPTION, name)}"


def pid(inode: int, name: str) -> str:
    """Dump: leave out the pid namespace of this inode; ``name`` is its key for the restore. CRIU 3.15."""
    return f"pid[{_number(_OPTION, inode)}]:{check.text(_OPTION, name)}"


def veth(inner: str, outer: str, bridge: str | None = None) -> str:
    """Restore: call the host's end of the tree's veth device ``outer``, and attach it to a bridge."""
    attached = "" if bridge is None else f"@{check.interface(_OPTION, bridge)}"
    if "@" in check.interface(_OPTION, outer):
        check.refuse(_OPTION, "an interface's name without @, which begins the bridge's", outer)
    return f"veth[{check.interface(_OPTION, inner)}]:{outer}{attached}"


def macvlan(inner: str, outer: str) -> str:
    """Restore: bind the tree's macvlan device to the host's interface ``outer``, which exists already."""
    return f"macvlan[{check.interface(_OPTION, inner)}]:{check.interface(_OPTION, outer)}"


def _id(text: str) -> str:
    # CRIU ends the id at the first of these.
    if "]:" in text:
        check.refuse(_OPTION, 'text without "]:"', text)
    return text


def key_of(fd: int | HasFileno) -> str:
    """Tell how CRIU's images call what is open here, for ``inherit_fd``. On Linux only.

    A pipe is ``pipe:[INODE]`` at either end, a Unix socket ``socket:[INODE]``,
    a memfd ``/memfd:NAME``. A terminal is ``tty[RDEV:DEV]`` and anything
    in a file system ``file[MNT_ID:INODE]``, if it was dumped with these very
    strings in ``external``; the images know other files by path.
    """
    need_linux("criupy.rpc.external.key_of")
    number, status = check.descriptor("inherit_fd", fd)
    mode = status.st_mode
    link = os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115 (it is not a path)
    if stat.S_ISFIFO(mode) and link.startswith("pipe:["):
        return f"pipe:[{status.st_ino}]"
    if stat.S_ISSOCK(mode):
        return _socket_key(number, status)
    if stat.S_ISCHR(mode) and os.isatty(number):
        return tty(status.st_rdev, status.st_dev)
    if link.startswith("/memfd:"):
        return link.removesuffix(" (deleted)")
    if not link.startswith("/"):
        raise OptionError(
            "inherit_fd",
            f"expected a pipe, a Unix socket, a terminal or a file, got {link}"
            + (": its key is the name given to net() or pid()" if link.startswith(("net:", "pid:")) else ""),
        )
    return file(_mnt_id(number), status.st_ino)


def _socket_key(number: int, status: os.stat_result) -> str:
    import socket

    with socket.socket(fileno=os.dup(number)) as copy:
        family = copy.family
    if family != socket.AF_UNIX:
        raise OptionError(
            "inherit_fd",
            f"expected a Unix socket (CRIU inherits no others), got one of family {family!r}",
        )
    return f"socket:[{status.st_ino}]"


def _mnt_id(number: int) -> int:
    with Path(f"/proc/self/fdinfo/{number}").open(encoding="ascii") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name == "mnt_id":
                return int(value)
    raise OSError(f"/proc/self/fdinfo/{number} tells no mnt_id")
