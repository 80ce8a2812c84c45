"""Ask the kernel who listens on a unix socket's file, without connecting.

Connecting is no way to ask: a daemon that accepts once would take the caller
for its restore. sock_diag(7) lists the listening sockets of this network
namespace with the inode each is bound to.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Listener", "find_listener"]

# include/uapi/linux: netlink.h, sock_diag.h, unix_diag.h, and TCP_LISTEN of net/tcp_states.h.
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST_DUMP: Final = 0x301
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_STATE_LISTEN: Final = 1 << 10
_UDIAG_SHOW_VFS: Final = 2
_UNIX_DIAG_VFS: Final = 1

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, seq, pid
_REQUEST: Final = struct.Struct("=BBHIIIII")  # unix_diag_req
_SOCKET: Final = struct.Struct("=BBBBIII")  # unix_diag_msg; the fifth is the socket's inode
_ATTRIBUTE: Final = struct.Struct("=HH")
_VFS: Final = struct.Struct("=II")  # inode and device of the file


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket; ``pid`` is a process that has it open, if one can be seen."""

    pid: int | None


def find_listener(file: os.stat_result) -> Listener | None:
    """Return who listens on a socket file.

    None if nobody does, if it is in another network namespace, or if this
    kernel does not tell.
    """
    # The kernel's own encoding of a device number; 32 bits of the inode is all it tells.
    wanted = (file.st_ino & 0xFFFFFFFF, os.major(file.st_dev) << 20 | os.minor(file.st_dev))
    with contextlib.suppress(OSError):
        for sock, bound in _listening():
            if bound == wanted:
                return Listener(_holder(sock))
    return None


def _listening() -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield (socket's inode, (file's inode, file's device)) of every listening unix socket with a file."""
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _STATE_LISTEN, 0, _UDIAG_SHOW_VFS, 0, 0)
    length = _HEADER.size + len(request)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as link:
        link.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + request)
        while True:
            data = link.recv(1 << 16)
            while len(data) >= _HEADER.size:
                size, kind, *_ = _HEADER.unpack_from(data)
                if kind in {_NLMSG_DONE, _NLMSG_ERROR} or size < _HEADER.size:
                    return
                yield from _parse(data[_HEADER.size : size])
                data = data[_aligned(size) :]


def _parse(message: bytes) -> Iterator[tuple[int, tuple[int, int]]]:
    sock = _SOCKET.unpack_from(message)[4]
    rest = message[_SOCKET.size :]
    while len(rest) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(rest)
        if kind == _UNIX_DIAG_VFS:
            yield sock, _VFS.unpack_from(rest, _ATTRIBUTE.size)
        rest = rest[max(_aligned(size), _ATTRIBUTE.size) :]


def _aligned(size: int) -> int:
    return (size + 3) & ~3


def _holder(sock: int) -> int | None:
    link = f"socket:[{sock}]"
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        # Processes end, and some are not ours to look into.
        with contextlib.suppress(OSError):
            if os.fspath(fd.readlink()) == link:
                return int(fd.parts[2])
    return None
