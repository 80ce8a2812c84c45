"""The probes of userfaultfd: descriptors are really opened, asked and closed again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criupy.commands._findings import Finding, Group
from criupy.commands._rights_linux import Capability, Process, read

__all__ = ["EVENTS", "POISON", "USERFAULTFD", "Attempt", "attempt", "native_part", "userfaultfd"]

USERFAULTFD: Final = Group("userfaultfd")

# include/uapi/linux/userfaultfd.h
_USER_MODE_ONLY: Final = 1
EVENTS: Final = {"fork": 1 << 1, "remap": 1 << 2, "remove": 1 << 3, "unmap": 1 << 6}
POISON: Final = 1 << 14

_NEEDED: Final = sum(EVENTS.values())


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of opening a userfaultfd as CRIU does.

    ``opened`` and ``enabled`` are 0 or the errno of userfaultfd(2) and of
    UFFDIO_API with the four events; ``features`` is what the kernel offers,
    None where not even a restricted descriptor can be had.
    """

    opened: int
    features: int | None
    enabled: int


def attempt() -> Attempt:
    """Open throw-away descriptors; raise ImportError without the native part."""
    from criupy._uffd._native import ffi, lib

    def api(flags: int, features: int) -> tuple[int, int, int | None]:
        """Return the errno of userfaultfd(2), that of UFFDIO_API, and the features."""
        uffd = lib.criupy_uffd_open(os.O_CLOEXEC | os.O_NONBLOCK | flags)
        if uffd < 0:
            return -uffd, 0, None
        offered = ffi.new("uint64_t *")
        try:
            refused = -lib.criupy_uffd_api(uffd, features, offered)
        finally:
            os.close(uffd)
        return 0, refused, None if refused else int(offered[0])

    # UFFDIO_API works once per descriptor, so a question is a descriptor.
    opened, refused, features = api(0, 0)
    if opened:
        features = api(_USER_MODE_ONLY, 0)[2]
    enabled = refused or (api(0, _NEEDED)[1] if not opened else 0)
    return Attempt(opened, features, enabled)


def native_part(missing: ImportError | None) -> Iterator[Finding]:
    """Tell whether criupy's own daemon can work in this installation."""
    name = "criupy's native part"
    if missing is None:
        yield USERFAULTFD.ok(name, "loads")
    else:
        yield USERFAULTFD.lack(
            name,
            " ".join(str(missing).split()),
            "criupy-lazy-pages cannot run here, userfaultfd not be tried (criu lazy-pages may still work)",
            "build criupy here, or install a wheel made for Linux on this architecture; one named "
            "*-none-any has no native part",
            essential=True,
        )


def userfaultfd(proc: Path, tried: Attempt, this: Process, criu: Process) -> Iterator[Finding]:
    """Judge what came of the attempt, made with the rights of this process, for CRIU's."""
    # setcap(8) on the program, or a service: CRIU may what we may not.
    elsewhere = criu.capable(Capability.CAP_SYS_PTRACE) and not this.capable(Capability.CAP_SYS_PTRACE)
    if tried.opened == errno.EPERM and elsewhere:
        yield USERFAULTFD.unknown("userfaultfd(2)", "not allowed to this process, unlike CRIU", _TRY)
    else:
        yield _system_call(tried.opened, this)
    if tried.features is not None:
        yield _events(tried.features, tried, elsewhere=elsewhere)
        yield _poison(tried.features)
    yield _sysctl(read(proc, "sys/vm/unprivileged_userfaultfd"), criu)


_TRY: Final = (
    "run the check with CAP_SYS_PTRACE to try what CRIU may do; its lazy_pages above is its own word"
)


def _system_call(error: int, this: Process) -> Finding:
    name = "userfaultfd(2)"
    if not error:
        return USERFAULTFD.ok(name, "opens")
    if error == errno.ENOSYS:
        remedy = "boot a kernel with CONFIG_USERFAULTFD=y"
        if this.filtered:
            remedy += ", or get rid of the seccomp filter, which may be what refuses it"
    elif error == errno.EPERM and not this.capable(Capability.CAP_SYS_PTRACE):
        remedy = (
            "give CRIU CAP_SYS_PTRACE in the initial user namespace; "
            "vm.unprivileged_userfaultfd alone is not enough"
        )
    elif error == errno.EPERM:
        remedy = (
            "CAP_SYS_PTRACE is there, so a seccomp filter or an LSM refuses it: run outside of the container"
        )
    else:
        remedy = "userfaultfd(2) tells what this error means"
    return USERFAULTFD.lack(name, os.strerror(error), "no restore can be lazy", remedy, essential=True)


def _events(features: int, tried: Attempt, *, elsewhere: bool) -> Finding:
    name = "events"
    cost = "no restore can be lazy: CRIU needs the events fork, remap, remove and unmap"
    absent = [event for event, bit in EVENTS.items() if not features & bit]
    if absent:
        return USERFAULTFD.lack(
            name, f"no {', '.join(absent)}", cost, "boot Linux 4.11 or newer", essential=True
        )
    value = ", ".join(EVENTS)
    if tried.opened:
        return USERFAULTFD.ok(name, f"{value}: offered, not tried")
    if not tried.enabled:
        return USERFAULTFD.ok(name, value)
    value += f": offered, but refused ({os.strerror(tried.enabled)})"
    if elsewhere:
        return USERFAULTFD.unknown(name, f"{value} to this process, unlike CRIU", _TRY)
    remedy = "give CRIU CAP_SYS_PTRACE in the initial user namespace: the fork event is for nobody else"
    return USERFAULTFD.lack(name, value, cost, remedy, essential=True)


def _poison(features: int) -> Finding:
    name = "poison"
    if features & POISON:
        return USERFAULTFD.ok(name, "a page that never comes can be made a SIGBUS")
    return USERFAULTFD.lack(
        name,
        "not offered",
        "when pages are lost, criupy-lazy-pages kills the tasks that miss them, "
        "also with --on-failure=poison",
        "boot Linux 6.6 or newer",
    )


def _sysctl(value: str | None, criu: Process) -> Finding:
    name = "vm.unprivileged_userfaultfd"
    if value is None:
        return USERFAULTFD.ok(name, "not in this kernel: it came with 5.2")
    if value != "0":
        return USERFAULTFD.ok(name, f"{value}: for all, but the fork event takes CAP_SYS_PTRACE all the same")
    if criu.capable(Capability.CAP_SYS_PTRACE):
        more = "only tasks in a user namespace of their own need 1 to be restored lazily"
        return USERFAULTFD.ok(name, f"0: no obstacle to CRIU, which has CAP_SYS_PTRACE; {more}")
    return USERFAULTFD.ok(name, "0: only for CAP_SYS_PTRACE, which CRIU needs in any case")
