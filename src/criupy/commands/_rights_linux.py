"""What CRIU will be allowed to do: the rights of a process, and of what it executes."""

from __future__ import annotations

import enum
import errno
import os
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "Capability",
    "FileCapabilities",
    "Process",
    "executed",
    "file_capabilities",
    "observe",
    "program_capabilities",
    "read",
    "service_pid",
]

# PROC_USER_INIT_INO in include/linux/proc_ns.h.
_INITIAL_USER_NAMESPACE: Final = "user:[4026531837]"


class Capability(enum.IntEnum):
    """The capabilities that CRIU asks for, by their number in include/uapi/linux/capability.h."""

    CAP_NET_ADMIN = 12
    CAP_SYS_PTRACE = 19
    CAP_SYS_ADMIN = 21
    CAP_SYS_RESOURCE = 24
    CAP_CHECKPOINT_RESTORE = 40


@dataclass(frozen=True, slots=True)
class Process:
    """What /proc tells of a process.

    Capability sets are masks. ``initial`` tells whether it is in the initial
    user namespace, None when that is hidden. ``nofile`` is RLIMIT_NOFILE, soft
    and hard. ``filtered``: it runs under a seccomp filter.
    """

    uid: int
    effective: int
    inheritable: int = 0
    bounding: int = 0
    ambient: int = 0
    no_new_privs: bool = False
    filtered: bool = False
    initial: bool | None = True
    nofile: tuple[int, int] = (1024, 4096)

    def has(self, *wanted: Capability) -> bool:
        """Tell whether one of these is effective, in whatever user namespace."""
        return any(self.effective >> capability & 1 for capability in wanted)

    def capable(self, *wanted: Capability) -> bool:
        """Tell whether one of these is effective where the kernel asks the initial user namespace."""
        return self.initial is not False and self.has(*wanted)


def read(proc: Path, name: str) -> str | None:
    """Return the text of a file below /proc, None where this kernel (or container) has none."""
    try:
        return (proc / name).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def observe(proc: Path, pid: str) -> Process:
    """Read what /proc tells of a process; raise OSError or ValueError where it tells too little."""
    status = dict(
        line.split(":", 1) for line in (proc / pid / "status").read_text().splitlines() if ":" in line
    )
    try:
        initial = os.readlink(proc / pid / "ns/user") == _INITIAL_USER_NAMESPACE  # noqa: PTH115 - not a path
    except OSError:
        initial = None  # another user's
    try:
        return Process(
            uid=int(status["Uid"].split()[1]),
            effective=int(status["CapEff"], 16),
            inheritable=int(status["CapInh"], 16),
            bounding=int(status["CapBnd"], 16),
            ambient=int(status.get("CapAmb", "0"), 16),
            no_new_privs=status.get("NoNewPrivs", "0").strip() == "1",
            filtered=status.get("Seccomp", "0").strip() == "2",
            initial=initial,
            nofile=_nofile((proc / pid / "limits").read_text()),
        )
    except KeyError as error:
        raise ValueError(f"{proc / pid / 'status'}: expected a line {error.args[0]}") from error


def _nofile(limits: str) -> tuple[int, int]:
    match = re.search(r"^Max open files +(\d+|unlimited) +(\d+|unlimited)", limits, re.MULTILINE)
    if match is None:
        raise ValueError("limits: expected a line 'Max open files'")
    soft, hard = (2**63 if word == "unlimited" else int(word) for word in match.groups())
    return soft, hard


@dataclass(frozen=True, slots=True)
class FileCapabilities:
    """What setcap(8) gave a program, as masks; ``effective`` is its one flag."""

    permitted: int
    inheritable: int
    effective: bool


def file_capabilities(attribute: bytes) -> FileCapabilities:
    """Decode security.capability (struct vfs_cap_data, include/uapi/linux/capability.h)."""
    try:
        magic, permitted, inheritable, permitted_high, inheritable_high = struct.unpack_from("<5I", attribute)
    except struct.error as error:
        raise ValueError(f"security.capability: expected 20 bytes, found {len(attribute)}") from error
    return FileCapabilities(
        permitted | permitted_high << 32, inheritable | inheritable_high << 32, bool(magic & 1)
    )


def executed(process: Process, program: FileCapabilities | None) -> int:
    """Return the effective capabilities of a program that a process executes (capabilities(7))."""
    if process.no_new_privs:
        program = None
    if process.uid == 0:
        return process.inheritable | process.bounding
    if program is None:
        return process.ambient
    if not program.effective:
        return 0
    return (process.inheritable & program.inheritable) | (program.permitted & process.bounding)


def program_capabilities(path: str) -> FileCapabilities | None:
    """Return what setcap(8) gave a program, None for nothing."""
    try:
        return file_capabilities(os.getxattr(path, "security.capability"))
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.ENOTSUP}:
            return None
        raise


def service_pid(path: str, timeout: float = 5.0) -> int:
    """Return the pid of the service that listens at a path, 0 when it is not in our pid namespace.

    The service starts a worker for the connection, which ends with it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.settimeout(timeout)
        asking.connect(path)
        pid: int = struct.unpack("=iII", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid
