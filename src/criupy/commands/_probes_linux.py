"""The probes of kernel, limits, privileges and tools; each takes what it judges, and changes nothing.

What is asked of CRIU is in _probes_criu_linux, what is tried with userfaultfd
in _probes_uffd_linux.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criupy.commands._findings import Finding, Group
from criupy.commands._rights_linux import Capability, Process, read

__all__ = [
    "KERNEL",
    "PRIVILEGES",
    "TOOLS",
    "Kernel",
    "descriptors",
    "find_program",
    "pids",
    "pipes",
    "privileges",
    "release",
    "tools",
    "yama",
]

KERNEL: Final = Group("kernel")
PRIVILEGES: Final = Group("privileges")
TOOLS: Final = Group("tools")

MIB: Final = 1 << 20
# CRIU's pipes are as long as 8 pages of struct pipe_buffer describe (criu/include/page-pipe.h), which the
# kernel rounds up to a power of two: 4 MiB with pages of 4 KiB.
PIPE_SIZE: Final = 1 << (8 * mmap.PAGESIZE // 40 * mmap.PAGESIZE - 1).bit_length()

_SBIN: Final = os.pathsep.join(("/usr/local/sbin", "/usr/sbin", "/sbin"))


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's release, as uname(2) tells it."""

    release: str

    def at_least(self, major: int, minor: int) -> bool:
        """Tell whether it is this version or a later one."""
        match = re.match(r"(\d+)\.(\d+)", self.release)
        if match is None:
            raise ValueError(f"kernel release {self.release!r}: expected it to begin with two numbers")
        return (int(match[1]), int(match[2])) >= (major, minor)

    def __str__(self) -> str:
        return f"Linux {self.release}"


def release(kernel: Kernel) -> Iterator[Finding]:
    """Judge the kernel's age."""
    if kernel.at_least(4, 11):
        yield KERNEL.ok("release", kernel.release)
    else:
        yield KERNEL.lack(
            "release",
            kernel.release,
            "no restore can be lazy: userfaultfd's events came with 4.11",
            "boot a newer kernel, 5.9 or later if you can",
            essential=True,
        )


def pids(proc: Path, kernel: Kernel, criu: Process) -> Iterator[Finding]:
    """Judge whether restored tasks can get their old pids: by clone3 with set_tid, or by ns_last_pid."""
    name = "choice of pids"
    cost = "nothing can be restored: a task must get the pid that it had"
    if read(proc, "sys/kernel/ns_last_pid") is None:
        yield KERNEL.lack(
            name,
            "no kernel.ns_last_pid",
            "nothing can be dumped or restored",
            "boot a kernel with CONFIG_CHECKPOINT_RESTORE=y (in a container: look that /proc/sys is there)",
            essential=True,
        )
    elif not criu.has(Capability.CAP_SYS_ADMIN, Capability.CAP_CHECKPOINT_RESTORE):
        # The file is writable for everybody by its mode; the kernel asks again at the write.
        value = "not allowed: neither clone3 with set_tid nor kernel.ns_last_pid"
        remedy = "give CRIU CAP_CHECKPOINT_RESTORE (Linux 5.9) or CAP_SYS_ADMIN"
        yield KERNEL.lack(name, value, cost, remedy, essential=True)
    elif kernel.at_least(5, 5):
        yield KERNEL.ok(name, "clone3 with set_tid")
    elif os.access(proc / "sys/kernel/ns_last_pid", os.W_OK):
        yield KERNEL.ok(name, "kernel.ns_last_pid")
    else:
        value = "kernel.ns_last_pid cannot be written, and clone3 with set_tid came with 5.5"
        yield KERNEL.lack(name, value, cost, "mount /proc/sys writable", essential=True)


def pipes(proc: Path, criu: Process) -> Iterator[Finding]:
    """Judge the limits of the pipes in which a lazy dump holds the memory."""
    name = "fs.pipe-max-size"
    limit = _number(proc, "sys/fs/pipe-max-size")
    unlimited = criu.capable(Capability.CAP_SYS_RESOURCE)
    if limit >= PIPE_SIZE:
        yield KERNEL.ok(name, str(limit))
    elif unlimited:
        yield KERNEL.ok(name, f"{limit}: no limit to CRIU, which has CAP_SYS_RESOURCE")
    else:
        yield KERNEL.lack(
            name,
            f"{limit}; the source of a lazy migration needs pipes of {PIPE_SIZE}",
            "CRIU does not notice that its pipe stayed small: the first larger request breaks the lazy dump "
            "('page-pipe: tee: 65536' or 'page-pipe: splice: -1: Bad file descriptor')",
            f"on the source: sysctl -w fs.pipe-max-size={max(PIPE_SIZE, 8 * MIB)}",
            essential=True,
        )
    if unlimited or criu.capable(Capability.CAP_SYS_ADMIN):
        return
    for kind in ("soft", "hard"):
        pages = _number(proc, f"sys/fs/pipe-user-pages-{kind}")
        if pages:  # 0 is no limit
            yield KERNEL.lack(
                f"fs.pipe-user-pages-{kind}",
                f"{pages} pages",
                "this limits a user's pipes unless CRIU has CAP_SYS_RESOURCE or CAP_SYS_ADMIN: a lazy dump "
                f"of more than about {pages * mmap.PAGESIZE // MIB} MiB breaks",
                f"on the source: sysctl -w fs.pipe-user-pages-{kind}=0, or give CRIU one of the two",
            )


def descriptors(proc: Path, criu: Process) -> Iterator[Finding]:
    """Judge how much memory a lazy dump can hold: a pipe takes two descriptors."""
    name = "RLIMIT_NOFILE"
    soft, hard = criu.nofile
    highest = _number(proc, "sys/fs/nr_open")
    # CRIU asks for fs.nr_open, and stays at the soft limit where that is refused.
    raised = criu.capable(Capability.CAP_SYS_RESOURCE) or hard >= highest
    limit = highest if raised else soft
    most = limit // 2 * PIPE_SIZE
    value = f"{limit}{', to which CRIU raises it' if raised else ''}: lazy dumps of up to {_gib(most)}"
    total = re.search(r"^MemTotal: +(\d+) kB", read(proc, "meminfo") or "", re.MULTILINE)
    memory = most if total is None else int(total[1]) << 10
    if most >= memory:
        yield KERNEL.ok(name, value)
    else:
        yield KERNEL.lack(
            name,
            f"{value}, on a machine with {_gib(memory)}",
            "a larger process cannot be dumped lazily: CRIU holds its memory in pipes, 2 descriptors for "
            f"each {PIPE_SIZE // MIB} MiB",
            "raise the soft limit before criu starts (ulimit -n, LimitNOFILE=), or give it CAP_SYS_RESOURCE",
        )


def yama(proc: Path, criu: Process) -> Iterator[Finding]:
    """Judge Yama's say over ptrace: 0 as ever, 1 for own children, 2 for CAP_SYS_PTRACE, 3 for nobody."""
    name = "kernel.yama.ptrace_scope"
    scope = read(proc, "sys/kernel/yama/ptrace_scope")
    if scope is None:
        yield KERNEL.ok(name, "no Yama here")
    elif scope == "3":
        yield KERNEL.lack(
            name,
            "3: nobody may ptrace",
            "nothing can be dumped or restored",
            "only a reboot lowers it: find who sets it to 3 (/etc/sysctl.d) and choose 0, 1 or 2",
            essential=True,
        )
    elif scope == "0":
        yield KERNEL.ok(name, scope)
    elif criu.has(Capability.CAP_SYS_PTRACE):
        yield KERNEL.ok(name, f"{scope}: no obstacle to CRIU, which has CAP_SYS_PTRACE")
    else:
        yield KERNEL.lack(
            name,
            f"{scope}: only for CAP_SYS_PTRACE{' and for own children' if scope == '1' else ''}",
            "no other process can be dumped",
            "give CRIU CAP_SYS_PTRACE, or sysctl -w kernel.yama.ptrace_scope=0",
            essential=True,
        )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A capability, one that includes it, and what it costs to have neither."""

    capability: Capability
    superior: Capability | None
    cost: str
    essential: bool = False


_WANTED: Final = (
    _Wanted(
        Capability.CAP_CHECKPOINT_RESTORE,
        Capability.CAP_SYS_ADMIN,
        "CRIU refuses to work: it may neither choose pids nor read what other tasks have mapped",
        essential=True,
    ),
    _Wanted(
        Capability.CAP_SYS_PTRACE,
        None,
        "other users' processes cannot be dumped, and no restore can be lazy: only with it the kernel tells "
        "through userfaultfd that a task forks",
        essential=True,
    ),
    _Wanted(
        Capability.CAP_SYS_ADMIN,
        None,
        "tasks in namespaces or mounts of their own (containers) cannot be dumped or restored",
    ),
    _Wanted(
        Capability.CAP_NET_ADMIN,
        None,
        "TCP connections (TCP_REPAIR) and network namespaces cannot be dumped or restored",
    ),
    _Wanted(
        Capability.CAP_SYS_RESOURCE,
        None,
        "tasks that changed their uid cannot be dumped (CRIU may not read their limits), and limits above "
        "CRIU's own not be restored; every log of CRIU has a harmless error about RLIMIT_NOFILE",
    ),
)


_IN_BOUNDING_SET: Final = (
    "start CRIU with it in the bounding set (a container's --cap-add, a unit's CapabilityBoundingSet=)"
)


def privileges(this: Process, criu: Process) -> Iterator[Finding]:
    """Judge what CRIU may do: setcap(8) may have made that more than what this process may."""
    if criu.uid == 0:
        yield PRIVILEGES.ok("user", "root" if this.uid == 0 else f"root (this process: uid {this.uid})")
    else:
        yield PRIVILEGES.lack(
            "user",
            f"uid {criu.uid}",
            "CRIU works only with its option unprivileged: on processes of this user, and never lazily",
            "run as root",
            essential=True,
        )
    for wanted in _WANTED:
        name = wanted.capability.name
        if criu.has(wanted.capability):
            yield PRIVILEGES.ok(name, "effective")
        elif wanted.superior is not None and criu.has(wanted.superior):
            yield PRIVILEGES.ok(name, f"included in {wanted.superior.name}")
        else:
            remedy = _IN_BOUNDING_SET if criu.uid == 0 else "run as root"
            if criu.uid and wanted.capability is Capability.CAP_CHECKPOINT_RESTORE:
                remedy += (
                    ", or for plain dumps and restores: setcap cap_checkpoint_restore+eip on the program"
                )
            yield PRIVILEGES.lack(name, "missing", wanted.cost, remedy, essential=wanted.essential)
    yield from _confinement(criu)


def _confinement(criu: Process) -> Iterator[Finding]:
    name = "user namespace"
    if criu.initial:
        yield PRIVILEGES.ok(name, "the initial one")
    elif criu.initial is None:
        yield PRIVILEGES.unknown(name, "hidden", "run the check as the user that CRIU runs as")
    else:
        yield PRIVILEGES.lack(
            name,
            "not the initial one",
            "no restore can be lazy, and no limit raised: for userfaultfd's fork event and limits only the "
            "capabilities of the initial one count",
            "run CRIU on the host, outside of the container",
            essential=True,
        )
    if criu.filtered:
        yield PRIVILEGES.lack(
            "seccomp",
            "a filter is in force",
            "what it forbids fails, with EPERM or ENOSYS, whatever the capabilities are; Docker's forbids "
            "userfaultfd, for one",
            "run outside of the container, or with another filter (--security-opt seccomp=unconfined)",
        )


def find_program(name: str, search: str) -> tuple[str | None, str | None]:
    """Look for a program; return where it is on the search path, or else where it is off it."""
    found = shutil.which(name, path=search)
    return found, None if found else shutil.which(name, path=_SBIN)


def tools(search: str, nftables: Callable[[], bool | None]) -> Iterator[Finding]:
    """Judge the programs that CRIU starts for tasks in namespaces of their own.

    ``nftables`` tells whether CRIU can lock a network by itself, with
    libnftables; None when that cannot be found out.
    """
    yield _network_lock(search, nftables)
    for name, package, what in (
        ("ip", "iproute2", "a network namespace (CRIU saves and restores addresses and routes with it)"),
        ("tar", "tar", "a mount namespace with a tmpfs (CRIU packs its files with it)"),
    ):
        found, elsewhere = find_program(name, search)
        if found:
            yield TOOLS.ok(name, found)
        else:
            value = f"{elsewhere}, which is not on PATH" if elsewhere else "not on PATH"
            cost = f"no dump or restore of tasks that have {what}"
            yield TOOLS.lack(name, value, cost, _obtain(package, elsewhere))


def _network_lock(search: str, nftables: Callable[[], bool | None]) -> Finding:
    name = "network lock"
    places = {tool: find_program(tool, search) for tool in ("iptables-restore", "ip6tables-restore")}
    absent = [tool for tool, (found, _) in places.items() if found is None]
    if not absent:
        return TOOLS.ok(name, ", ".join(found for found, _ in places.values() if found))
    value = f"no {' and no '.join(absent)} on PATH"
    remedy = _obtain("iptables", next((elsewhere for _, elsewhere in places.values() if elsewhere), None))
    usable = nftables()
    if usable:
        value += "; this CRIU can lock with nftables"
        remedy += "; or dump and restore with --network-lock nftables"
    elif usable is None:
        value += "; whether this CRIU can lock with nftables could not be found out"
    cost = "tasks that have a network namespace of their own (containers) cannot be dumped by default"
    return TOOLS.lack(name, value, cost, f"{remedy}; or with --network-lock skip if connections may break")


def _obtain(package: str, elsewhere: str | None) -> str:
    return f"add {Path(elsewhere).parent} to PATH" if elsewhere else f"install {package}"


def _number(proc: Path, name: str) -> int:
    text = read(proc, name)
    if text is None:
        raise FileNotFoundError(f"{proc / name} is not there")
    return int(text)


def _gib(length: int) -> str:
    return f"{length / (1 << 30):.1f} GiB" if length < 1 << 50 else "any size"
