"""What is said to runC and what it says: options as words of a command line, states, logs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, get_args, get_type_hints

from criupy.errors import OptionError

__all__ = [
    "CheckpointOptions",
    "ContainerState",
    "PreDumpOptions",
    "RestoreOptions",
    "check_container",
    "errors_of",
    "option_words",
    "parse_state",
]


class PreDumpOptions(TypedDict, total=False):
    """Options of ``runc checkpoint --pre-dump``, each the one of that name with dashes."""

    tcp_established: bool
    """Allow connected TCP sockets."""
    ext_unix_sk: bool
    """Allow Unix sockets whose other end is outside of the container."""
    shell_job: bool
    """Allow a session or a terminal of somebody else."""
    file_locks: bool
    """Allow file locks, which nobody outside of the container may use."""
    manage_cgroups_mode: Literal["soft", "full", "strict", "ignore"]
    """What CRIU does with cgroups; soft where nothing is said, ignore from runC 1.2 on."""


class CheckpointOptions(PreDumpOptions, total=False):
    """Options of ``runc checkpoint``, each the one of that name with dashes."""

    link_remap: bool
    """Give names to files that were unlinked but have others (runC 1.3)."""
    tcp_skip_in_flight: bool
    """Leave out connections that are not established yet (runC 1.3)."""


class RestoreOptions(TypedDict, total=False):
    """Options of ``runc restore``, each the one of that name with dashes."""

    tcp_established: bool
    """Restore connected TCP sockets."""
    ext_unix_sk: bool
    """Allow Unix sockets whose other end is outside of the container."""
    shell_job: bool
    """Allow a session or a terminal of somebody else."""
    file_locks: bool
    """Restore file locks."""
    manage_cgroups_mode: Literal["soft", "full", "strict", "ignore"]
    """What CRIU does with cgroups; soft where nothing is said, ignore from runC 1.2 on."""
    no_pivot: bool
    """Do without pivot_root(2), which a root file system in a ramdisk does not allow."""
    lsm_profile: str
    """The LSM profile to restore with, as TYPE:NAME."""
    lsm_mount_context: str
    """The LSM mount context to restore with."""


@dataclass(frozen=True, slots=True)
class ContainerState:
    """What ``runc state`` tells of a container: ``pid`` is its first process, 0 when it has none.

    ``status`` is created, running, paused or stopped.
    """

    id: str
    status: str
    pid: int
    bundle: Path


def check_container(name: str) -> str:
    """Return a container's name, or refuse what runC would take for something else."""
    given: object = name
    if not isinstance(given, str) or not given or given.startswith("-"):
        raise OptionError("container", f"expected a container's name, got {name!r}")
    return given


def option_words(kind: type, options: Mapping[str, object]) -> list[str]:
    """Spell options as runC takes them."""
    known = get_type_hints(kind)
    words = []
    for name, value in options.items():
        if name not in known:
            raise OptionError(name, f"is no option here; there are {', '.join(sorted(known))}")
        flag = f"--{name.replace('_', '-')}"
        if known[name] is bool:
            if not isinstance(value, bool):
                raise OptionError(name, f"expected a bool, got {value!r}")
            words += [flag] if value else []
        elif choices := get_args(known[name]):
            if value not in choices:
                raise OptionError(name, f"expected one of {', '.join(choices)}; got {value!r}")
            words += [flag, str(value)]
        elif isinstance(value, str) and value and not value.startswith("-"):
            words += [flag, value]
        else:
            raise OptionError(name, f"expected a word, got {value!r}")
    return words


def path_word(option: str, value: str | os.PathLike[str]) -> str:
    """Return a path from the root on: ``runc restore`` changes to the bundle before it opens the others."""
    given: object = value
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise OptionError(option, f"expected a path, got {value!r}")
    return os.path.abspath(os.fspath(given))  # noqa: PTH100 - links stay as they are


def errors_of(log: str) -> tuple[str, ...]:
    """Return the error messages of a log in runC's JSON format, oldest first."""
    found = []
    for line in log.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off when it was killed, or a library's own words
        if isinstance(entry, dict) and entry.get("level") in {"error", "fatal"}:
            message = str(entry.get("msg", ""))
            found.append(f"{message}: {entry['error']}" if "error" in entry else message)
    return tuple(found)


def parse_state(text: str) -> ContainerState:
    """Read what ``runc state`` prints; raise ValueError if it is something else."""
    try:
        found = json.loads(text)
        return ContainerState(
            str(found["id"]), str(found["status"]), int(found["pid"]), Path(found["bundle"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no state of a container: {text!r}") from error
