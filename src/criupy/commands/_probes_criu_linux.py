"""The probes that ask CRIU itself, each over a connection of its own: a worker may die of a question."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from criupy.commands._findings import Finding, Group
from criupy.commands._probes_linux import Kernel
from criupy.errors import CriuError, CriuUnavailable

__all__ = [
    "CRIU",
    "Asked",
    "Client",
    "Connect",
    "Version",
    "connect",
    "features",
    "has_nftables",
    "self_check",
    "traps",
    "version",
]

CRIU: Final = Group("CRIU")

TIMEOUT: Final = 30.0
"""Seconds that CRIU has for each answer."""


class Version(Protocol):
    """What is asked of criupy.rpc's versions, besides how they are written."""

    def at_least(self, major: int, minor: int) -> bool: ...


class _Features(Protocol):
    @property
    def mem_track(self) -> bool | None: ...
    @property
    def lazy_pages(self) -> bool | None: ...
    @property
    def pidfd_store(self) -> bool | None: ...


class Client(Protocol):
    """What is asked of criupy.rpc's client."""

    def version(self) -> Version: ...
    def feature_check(self) -> _Features: ...
    def check(self, *, unprivileged: bool = ...) -> None: ...


Connect = Callable[[], AbstractContextManager[Client]]


def connect(binary: str | None, socket: str | None) -> Connect:
    """Return what connects to a CRIU program or to the service at a socket."""

    def client() -> AbstractContextManager[Client]:
        from criupy.rpc import Criu  # here, so that a broken installation is a finding like others

        return Criu(binary, socket=socket, request_timeout=TIMEOUT)

    return client


@dataclass(frozen=True, slots=True)
class Asked:
    """CRIU's version, None where it did not tell, and what is to be said of it."""

    version: Version | None
    finding: Finding


def version(connect: Connect) -> Asked:
    """Ask for the version, which shows whether this CRIU starts at all."""
    try:
        with connect() as criu:
            told = criu.version()
    except CriuError as error:
        if isinstance(error, CriuUnavailable):
            remedy = (
                "give a program that can be started with --criu, or the socket of a service with --socket"
            )
        else:
            remedy = (
                "a CRIU much older than the kernel may not start on it (3.17 does not on 6.18): "
                "see what `criu --version` prints, and install 4.2 or newer"
            )
        cost = "nothing can be dumped or restored"
        return Asked(None, CRIU.lack("version", _told(error), cost, error.hint or remedy, essential=True))
    return Asked(told, CRIU.ok("version", str(told)))


def traps(version: Version, kernel: Kernel) -> Iterator[Finding]:
    """Judge what is known of this version and cannot be asked of it."""
    size, which = (32, "from 4.2 on") if version.at_least(4, 2) else (24, "up to 4.1")
    yield CRIU.ok("page-server frames", f"{size} bytes, as CRIU {which}: both ends have to agree")
    if kernel.at_least(6, 16) and not version.at_least(4, 2):
        yield CRIU.lack(
            "sockets",
            f"CRIU {version} asks all for SO_PASSCRED, which since 6.16 only Unix sockets have",
            "processes that have other than Unix sockets cannot be dumped",
            "use CRIU 4.2 or newer",
        )
    else:
        yield CRIU.ok("sockets", f"CRIU {version} knows those of {kernel}")
    name = "address of a lazy dump"
    if version.at_least(4, 3):
        yield CRIU.ok(name, "heeded over RPC")
    else:
        yield CRIU.lack(
            name,
            "not heeded over RPC: CRIU listens on 0.0.0.0",
            "whoever reaches the port can read the memory that runC or another RPC client dumps lazily",
            "give these a config_file with `address ADDR` (runC reads /etc/criu/runc.conf) or close the port "
            "with a firewall; criupy does the first itself, and `criu dump --address` is not concerned",
        )


def self_check(connect: Connect, *, unprivileged: bool) -> Iterator[Finding]:
    """Let CRIU check what it needs in every dump and restore."""
    name = "criu check"
    try:
        with connect() as criu:
            if unprivileged:
                criu.check(unprivileged=True)
            else:
                criu.check()  # older CRIUs do not know the option
    except CriuError as error:
        yield CRIU.lack(
            name,
            _told(error),
            "CRIU itself says that it cannot dump and restore here",
            error.hint or "; ".join(error.log_errors[-3:]) or "run `criu check` to see all that it says",
            essential=True,
        )
    else:
        yield CRIU.ok(name, "passes")


@dataclass(frozen=True, slots=True)
class _Feature:
    name: str
    cost: str
    remedy: str
    essential: bool = False


_FEATURES: Final = (
    _Feature(
        "lazy_pages",
        "no restore can be lazy: CRIU found no userfaultfd with the events fork, remap, remove and unmap",
        "see userfaultfd below; where all is well there, CRIU remembers what once was: remove /run/criu.kdat",
        essential=True,
    ),
    _Feature(
        "mem_track",
        "no pre-dumps, so no pre-copy migration: the kernel does not tell which pages were written",
        "boot a kernel with CONFIG_MEM_SOFT_DIRTY=y; plain and lazy dumps do not need it",
    ),
    _Feature(
        "pidfd_store",
        "CRIU can only guess, by start times, whether a pid was given to another task between two pre-dumps",
        "boot Linux 5.6 or newer (pidfd_getfd)",
    ),
)


def features(connect: Connect, uid: int) -> Iterator[Finding]:
    """Ask which of the features that CRIU's RPC knows are there; ``uid`` is CRIU's user."""
    try:
        with connect() as criu:
            told = criu.feature_check()
    except CriuError as error:
        if uid == 0:
            remedy = f"its check has to pass first; it said: {_told(error)}"
            for feature in _FEATURES:
                yield CRIU.unknown(feature.name, "CRIU could not tell", remedy, essential=feature.essential)
        else:
            yield from _features_of_a_user(uid)
        return
    for feature in _FEATURES:
        has: bool | None = getattr(told, feature.name)
        if has:
            yield CRIU.ok(feature.name, "yes")
        elif has is None:
            value = "this CRIU does not know the question"
            yield CRIU.unknown(feature.name, value, "use a newer CRIU", essential=feature.essential)
        else:
            yield CRIU.lack(feature.name, "no", feature.cost, feature.remedy, essential=feature.essential)


def _features_of_a_user(uid: int) -> Iterator[Finding]:
    # The question cannot be put with the option unprivileged, without which CRIU does nothing for a user.
    for feature in _FEATURES:
        if feature.name == "lazy_pages":
            yield CRIU.lack(
                feature.name,
                f"not for uid {uid}",
                "no restore can be lazy: with its option unprivileged CRIU does not use userfaultfd",
                "run as root",
                essential=True,
            )
        else:
            yield CRIU.unknown(feature.name, f"not told to uid {uid}", "ask as root")


def has_nftables(binary: str | None) -> bool | None:
    """Ask a CRIU program whether it can lock a network with nftables; None where it cannot tell."""
    if binary is None:  # RPC has no such question, so a service cannot be asked
        return None
    with tempfile.TemporaryDirectory(prefix="criupy-check-") as folder:
        words = [binary, "check", "--no-default-config", "--feature", "network_lock_nftables"]
        try:
            ended = subprocess.run(
                words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
    if b"is supported" in ended.stdout:
        return True
    # What CRIU says when it did get as far as to look (criu/cr-check.c).
    return False if b"nftables" in ended.stderr.lower() else None


def _told(error: CriuError) -> str:
    printed = [line.strip() for line in error.output.splitlines() if line.strip()]
    said = [error.message]
    if error.message in printed:  # CRIU had nothing but what it printed, which begins at the beginning
        said = printed[:2]
    elif printed and not error.log_errors:
        said.append(printed[0])
    return " ".join(" ".join(said).split())
