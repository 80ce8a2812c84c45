"""The types that options take, and the numbers under which enumerations travel.

Wire numbers are those of images/rpc.proto in CRIU's source, unless a comment
names another file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

__all__ = [
    "CgroupsMode",
    "CpuCapability",
    "CriuPath",
    "Directory",
    "EmptyNamespace",
    "HasFileno",
    "ImageIoMode",
    "JoinNs",
    "JoinableNamespace",
    "NetworkLock",
    "PreDumpMode",
    "Release",
    "StrPath",
]

StrPath: TypeAlias = str | os.PathLike[str]

#: Major and minor number of a CRIU.
Release: TypeAlias = tuple[int, int]


@runtime_checkable
class HasFileno(Protocol):
    """What has a descriptor: a file, a socket, an event loop's wrapper of one."""

    def fileno(self) -> int: ...


@dataclass(frozen=True, slots=True)
class CriuPath:
    """A path that CRIU itself opens, where it otherwise gets a descriptor of this process.

    For a service in another pid namespace, which cannot see this process's
    descriptors. Needs CRIU 3.19; up to 4.1.1 CRIU takes only a symbolic link
    here, because it reads the link. The path is absolute, as CRIU sees it.
    """

    path: str


#: A directory: its path, a descriptor of it, or the path under which only CRIU sees it.
Directory: TypeAlias = StrPath | int | HasFileno | CriuPath


@dataclass(frozen=True, slots=True)
class JoinNs:
    """A namespace that exists, for the restored tasks to live in.

    ``ns_file`` is a file that stands for it (``/proc/PID/ns/net``, a bind
    mount of one) or a pid in digits; CRIU takes pids up to 65535 only.
    ``extra_opt``, for a user namespace alone, is ``"UID"`` or ``"UID,GID"``:
    who to become in it.
    """

    ns: JoinableNamespace
    ns_file: StrPath
    extra_opt: str | None = None


# CRIU's manual does not list mnt, its code takes it.
JoinableNamespace: TypeAlias = Literal["ipc", "mnt", "net", "time", "user", "uts"]
NetworkLock: TypeAlias = Literal["iptables", "nftables", "skip"]
PreDumpMode: TypeAlias = Literal["splice", "read"]
CgroupsMode: TypeAlias = Literal["ignore", "none", "props", "soft", "full", "strict", "default"]
ImageIoMode: TypeAlias = Literal["writeback", "direct"]
CpuCapability: TypeAlias = Literal["none", "fpu", "cpu", "ins", "all"]
EmptyNamespace: TypeAlias = Literal["net"]


def _numbers(**numbers: int) -> Mapping[str, int]:
    return MappingProxyType(numbers)


NETWORK_LOCK: Final = _numbers(iptables=1, nftables=2, skip=3)
PRE_DUMP_MODE: Final = _numbers(splice=1, read=2)
CGROUPS_MODE: Final = _numbers(ignore=0, none=1, props=2, soft=3, full=4, strict=5, default=6)
IMAGE_IO_MODE: Final = _numbers(writeback=0, direct=1)

# Bits, from criu/include/cr_options.h.
CPU_CAPABILITY: Final = _numbers(none=0, fpu=1, cpu=2, ins=4, all=7)

# CLONE_NEWNET, from include/uapi/linux/sched.h of the kernel.
EMPTY_NAMESPACE: Final = _numbers(net=0x40000000)

#: The first CRIU that can join the namespace, where that is later than 3.0.
JOINABLE_SINCE: Final[Mapping[str, Release]] = MappingProxyType({"time": (3, 14)})
