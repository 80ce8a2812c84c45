"""All the probes of ``criupy check``, on this machine, in the order in which they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from criupy.commands import _probes_criu_linux as asking
from criupy.commands import _probes_linux as probes
from criupy.commands import _probes_uffd_linux as uffd
from criupy.commands._findings import Finding, guarded
from criupy.commands._rights_linux import Process, executed, observe, program_capabilities, service_pid
from criupy.errors import CriupyError

__all__ = ["survey"]

_PROC = Path("/proc")


def survey(binary: str, socket: str | None) -> list[Finding]:
    """Ask CRIU (the program, or the service at a socket) and look at this machine."""
    search = os.environ.get("PATH", os.defpath)
    kernel = probes.Kernel(os.uname().release)
    try:
        this = observe(_PROC, "self")
    except (OSError, ValueError) as error:
        raise CriupyError(f"/proc does not tell of this process ({error}): it has to be mounted") from error
    found = _find(binary, search, this) if socket is None else _reach(socket, this)
    criu = found.process
    findings = [found.finding]
    if found.program is not None or found.socket is not None:
        findings += _ask(asking.connect(found.program, found.socket), kernel, criu)
    findings += _userfaultfd(this, criu)
    for group, name, probe, essential in (
        (probes.KERNEL, "release", lambda: probes.release(kernel), True),
        (probes.KERNEL, "choice of pids", lambda: probes.pids(_PROC, kernel, criu), True),
        (probes.KERNEL, "fs.pipe-max-size", lambda: probes.pipes(_PROC, criu), True),
        (probes.KERNEL, "RLIMIT_NOFILE", lambda: probes.descriptors(_PROC, criu), False),
        (probes.KERNEL, "kernel.yama.ptrace_scope", lambda: probes.yama(_PROC, criu), True),
        (probes.PRIVILEGES, "capabilities", lambda: probes.privileges(this, criu), True),
        (
            probes.TOOLS,
            "tools",
            lambda: probes.tools(search, lambda: asking.has_nftables(found.program)),
            False,
        ),
    ):
        findings += guarded(group, name, probe, essential=essential)
    return findings


@dataclass(frozen=True, slots=True)
class _Found:
    """A CRIU, as a program or a service or neither, and the process by whose rights it works."""

    finding: Finding
    process: Process
    program: str | None = None
    socket: str | None = None


def _find(binary: str, search: str, this: Process) -> _Found:
    name, cost = "program", "nothing can be dumped or restored"
    path, elsewhere = probes.find_program(binary, search)
    if path is not None:
        rights = replace(this, effective=executed(this, program_capabilities(path)))
        return _Found(asking.CRIU.ok(name, path), rights, program=path)
    if elsewhere is not None:
        value, remedy = f"{elsewhere}, which is not on PATH", f"give it with --criu {elsewhere}"
    elif "/" in binary:
        value, remedy = f"{binary}: no program that can be executed", "give another with --criu PATH"
    else:
        value, remedy = (
            f"no {binary} on PATH",
            "install CRIU 4.2 or newer, or give a program with --criu PATH",
        )
    return _Found(asking.CRIU.lack(name, value, cost, remedy, essential=True), this)


def _reach(path: str, this: Process) -> _Found:
    name = "service"
    try:
        pid = service_pid(path)
    except OSError as error:
        remedy = f"start one: criu service --address {path}"
        cost = "nothing can be dumped or restored through it"
        value = f"{path}: {error.strerror or error}"
        return _Found(asking.CRIU.lack(name, value, cost, remedy, essential=True), this)
    try:
        process = observe(_PROC, str(pid))
    except (OSError, ValueError) as error:
        value = f"{path}; what it may do is hidden ({error})"
        remedy = "run the check where the service runs: what follows is judged by what this process may"
        return _Found(asking.CRIU.unknown(name, value, remedy), this, socket=path)
    return _Found(asking.CRIU.ok(name, f"{path}, pid {pid}"), process, socket=path)


def _ask(connect: asking.Connect, kernel: probes.Kernel, criu: Process) -> Iterator[Finding]:
    told: list[asking.Version] = []

    def version() -> Iterator[Finding]:
        asked = asking.version(connect)
        if asked.version is not None:
            told.append(asked.version)
        yield asked.finding

    yield from guarded(asking.CRIU, "version", version, essential=True)
    if not told:
        return  # the rest would only say the same again
    yield from guarded(asking.CRIU, "traps", lambda: asking.traps(told[0], kernel), essential=False)
    yield from guarded(
        asking.CRIU,
        "criu check",
        lambda: asking.self_check(connect, unprivileged=criu.uid != 0),
        essential=True,
    )
    yield from guarded(asking.CRIU, "lazy_pages", lambda: asking.features(connect, criu.uid), essential=True)


def _userfaultfd(this: Process, criu: Process) -> Iterator[Finding]:
    try:
        tried = uffd.attempt()
    except ImportError as error:
        yield from uffd.native_part(error)
        return
    yield from uffd.native_part(None)
    yield from guarded(
        uffd.USERFAULTFD,
        "userfaultfd(2)",
        lambda: uffd.userfaultfd(_PROC, tried, this, criu),
        essential=True,
    )
