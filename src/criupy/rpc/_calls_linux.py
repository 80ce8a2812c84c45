"""What each call of the clients asks of CRIU: the request, what it needs, and what its answer means.

Both clients make the same calls; they differ in how they wait.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Generic, TypeVar

from criupy._descriptor import Descriptor
from criupy.errors import CriuError, ImageError, OptionError
from criupy.images import PageFlags, read_pagemap, read_pstree
from criupy.rpc import _schema_pb2 as schema
from criupy.rpc._option_checks import directory, integer
from criupy.rpc._option_encoding import encode
from criupy.rpc._option_types import CriuPath, Directory
from criupy.rpc._report import LogWatch
from criupy.rpc._results import FeatureName, Features, PageServer, Version
from criupy.rpc._transport import Transport

__all__ = ["Call"]

T = TypeVar("T")

#: Undone by CRIU itself when its client is gone, and by nobody if CRIU is killed at the wrong moment.
_DELICATE: Final = frozenset({schema.DUMP, schema.PRE_DUMP, schema.SINGLE_PRE_DUMP, schema.RESTORE})

#: What every CRIU has that this package is made for.
_OLDEST: Final = (3, 17)

FEATURES: Final[tuple[FeatureName, ...]] = ("mem_track", "lazy_pages", "pidfd_store")


@dataclass(slots=True)
class Call(Generic[T]):
    """One request with all that belongs to it; ``close`` it when it is answered."""

    name: str
    request: schema.Request
    result: Callable[[schema.Response], T]
    inherit: tuple[int, ...] = ()
    """Descriptors that the worker must have under their own numbers."""
    since: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """The version of CRIU that each option needs."""
    swrk_only: tuple[str, ...] = ()
    log: LogWatch | None = None
    images_dir: Path | None = None
    work_dir: Path | None = None
    check_images: Callable[[], None] | None = None
    """Looks into the images before anything is sent; reads files."""
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Holds what CRIU opens through us, until the answer."""
    closed: bool = False

    @property
    def delicate(self) -> bool:
        """Whether CRIU must be given time to undo what it did."""
        return self.request.type in _DELICATE

    @property
    def exec_cmd(self) -> bool:
        """Whether the worker becomes another program in the end."""
        return bool(self.request.opts.exec_cmd)

    @property
    def own_group(self) -> bool:
        """Whether the worker may have a process group of its own.

        What is restored with shell_job joins the worker's, and has to be in the foreground of its
        terminal; so has, perhaps, what the worker becomes.
        """
        return not (self.request.opts.shell_job or self.exec_cmd)

    def close(self) -> None:
        """Close the descriptors that were opened for CRIU."""
        self.closed = True
        self.stack.close()

    def check_transport(self, transport: Transport) -> None:
        """Refuse options that need a worker of our own."""
        if transport.socket is not None and self.swrk_only:
            raise OptionError(
                self.swrk_only[0], "CRIU takes it only from a worker of one's own (binary=), not in a service"
            )
        if transport.fd is not None:
            self.refuse_inherited(
                "expected with a worker of one's own (binary=): that of fd= is started already"
            )

    def refuse_inherited(self, expected: str) -> None:
        """Refuse descriptors that a worker would have to inherit at its start."""
        if self.inherit:
            raise OptionError(next(name for name in self.swrk_only if name != "rst_sibling"), expected)

    @property
    def needs_version(self) -> bool:
        """Whether any option is younger than the oldest CRIU that we know."""
        return any(needed > _OLDEST for needed in self.since.values())

    def check_version(self, version: Version) -> None:
        """Refuse options that this CRIU would silently ignore."""
        for option, needed in self.since.items():
            if not version.at_least(*needed):
                raise OptionError(
                    option, f"CRIU {needed[0]}.{needed[1]} or newer is needed, this is {version}"
                )


def _none(_: schema.Response) -> None:
    return None


_pid = integer(1, 1 << 22)  # PID_MAX_LIMIT, include/linux/threads.h


def _open_directory(option: str, value: Directory, stack: contextlib.ExitStack) -> tuple[int, Path]:
    """Return a descriptor of a directory that CRIU can open through us, and a path by which we reach it."""
    found = directory(option, value)
    if isinstance(found, CriuPath):
        raise OptionError(option, "expected a path or a descriptor: CRIU takes it by descriptor only")
    if isinstance(found, int):
        link = Path(f"/proc/self/fd/{found}")
        with contextlib.suppress(OSError):  # longer than a path may be: the link does as well
            return found, link.readlink()
        return found, link
    path = Path(found)
    try:
        opened = stack.enter_context(Descriptor(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
    except OSError as error:
        raise OptionError(option, f"expected a directory, got {path}: {error.strerror}") from error
    return opened.fileno(), path.absolute()


def _check_parent(images_dir: int, parent: str) -> None:
    """Refuse a parent that CRIU would not find, or in whose place it would take another in silence."""
    if not parent or parent.startswith("/"):  # an absolute one is found in CRIU's mount namespace
        return
    try:
        wanted = os.stat(parent, dir_fd=images_dir)
    except OSError as error:
        raise OptionError(
            "parent_img", f"expected a path that starts at the images directory; {parent}: {error.strerror}"
        ) from error
    try:
        linked = os.readlink("parent", dir_fd=images_dir)
    except OSError:
        return
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat("parent", dir_fd=images_dir), wanted):
            return
    # CRIU leaves a link that is there as it is (criu/image.c), and counts on it.
    raise OptionError(
        "parent_img", f"expected {linked}: the images directory has a link named parent to it, from before"
    )


def _call(
    name: str,
    kind: schema.RequestType.ValueType,
    result: Callable[[schema.Response], T],
    options: Mapping[str, object],
    *,
    images_dir: Directory,
    takes: str | None = None,
) -> Call[T]:
    given: object = images_dir
    if given is None:
        raise OptionError("images_dir", "expected a directory, got None")
    encoded = encode(takes or name, options)
    call = Call(
        name,
        schema.Request(type=kind, opts=encoded.message),
        result,
        inherit=encoded.inherit,
        since=encoded.since,
        swrk_only=encoded.swrk_only,
    )
    message = call.request.opts
    message.images_dir_fd = -1
    try:
        if isinstance(images_dir, CriuPath):
            directory("images_dir", images_dir)
            message.images_dir = images_dir.path
            call.images_dir = Path(images_dir.path)
            call.since = {**call.since, "images_dir": (3, 19)}
        else:
            message.images_dir_fd, call.images_dir = _open_directory("images_dir", images_dir, call.stack)
            _check_parent(message.images_dir_fd, message.parent_img)
        if encoded.work_dir is not None:
            message.work_dir_fd, call.work_dir = _open_directory("work_dir", encoded.work_dir, call.stack)
        else:
            call.work_dir = call.images_dir
        if encoded.log_file is not None:
            call.log = LogWatch.of(call.work_dir, encoded.log_file)
    except BaseException:
        call.close()
        raise
    return call


# ---- asking about CRIU itself -----------------------------------------------------


def version() -> Call[Version]:
    """Ask for the version."""
    return Call("version", schema.Request(type=schema.VERSION, keep_open=True), Version.from_response)


def feature_check(names: tuple[FeatureName, ...]) -> Call[Features]:
    """Ask for features; all of them when none is named."""
    asked = names or FEATURES
    for name in asked:
        if name not in FEATURES:
            raise OptionError("feature_check", f"expected names among {', '.join(FEATURES)}, got {name!r}")

    def result(response: schema.Response) -> Features:
        # CRIU answers false for what it was not asked.
        answer = response.features
        return Features(**{name: getattr(answer, name) for name in asked if answer.HasField(name)})

    features = schema.FeatureSet(**dict.fromkeys(asked, True))
    request = schema.Request(type=schema.FEATURE_CHECK, features=features, keep_open=True)
    return Call("feature_check", request, result)


def check(images_dir: Directory, options: Mapping[str, object]) -> Call[None]:
    """Ask CRIU to check this kernel; up to 4.1 it wants a directory for its log."""
    # From 4.2 on there is no log unless it is asked for by name.
    options = options if options.get("log_to_stderr") else {"log_file": "check.log", **options}
    return _call("check", schema.CHECK, _none, options, images_dir=images_dir)


def cpuinfo(name: str, images_dir: Directory, options: Mapping[str, object]) -> Call[None]:
    """Write, or compare with, the CPU's features in an image."""
    kind = schema.CPUINFO_DUMP if name == "cpuinfo_dump" else schema.CPUINFO_CHECK
    return _call(name, kind, _none, options, images_dir=images_dir, takes="cpuinfo")


@contextlib.contextmanager
def log_directory(given: Directory | None) -> Iterator[Directory]:
    """Provide a directory for the log of a check, which only errors are taken from."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="criupy-check-") as directory:
        yield directory


# ---- dump --------------------------------------------------------------------------------


def dump(
    pid: int,
    images_dir: Directory,
    options: Mapping[str, object],
    *,
    lazy: bool = False,
    address: str | None = None,
    port: int = 0,
) -> Call[None]:
    """Dump a tree; a lazy dump goes on until the last page has gone."""
    _pid("pid", pid)
    if pid == os.getpid():
        raise OptionError("pid", "expected another process: to dump this one use self_dump()")
    name = "lazy_dump" if lazy else "dump"
    call = _call(name, schema.DUMP, _none, options, images_dir=images_dir)
    message = call.request.opts
    message.pid = pid
    message.notify_scripts = True
    if lazy:
        message.lazy_pages = True
        message.ps.port = port
        if address is not None:
            message.ps.address = address
    return call


def self_dump(images_dir: Directory, options: Mapping[str, object]) -> Call[bool]:
    """Dump the calling process."""

    def restored(response: schema.Response) -> bool:
        return response.dump.restored

    # No notifications: they would go to a process that is frozen.
    return _call("self_dump", schema.DUMP, restored, options, images_dir=images_dir, takes="dump")


def pre_dump(pid: int, images_dir: Directory, options: Mapping[str, object], *, single: bool) -> Call[None]:
    """Write the memory that changed, and let the tasks go on."""
    _pid("pid", pid)
    kind = schema.SINGLE_PRE_DUMP if single else schema.PRE_DUMP
    call = _call("pre_dump", kind, _none, options, images_dir=images_dir)
    call.request.opts.pid = pid
    return call


# ---- restore --------------------------------------------------------------------------------


def restore(images_dir: Directory, options: Mapping[str, object], *, lazy: bool = False) -> Call[int]:
    """Restore a tree; the answer is the pid of its first process."""
    name = "lazy_restore" if lazy else "restore"

    def pid(response: schema.Response) -> int:
        return _told_pid(response.restore.pid, name)

    call = _call(name, schema.RESTORE, pid, options, images_dir=images_dir)
    call.request.opts.notify_scripts = True
    if lazy:
        call.request.opts.lazy_pages = True
    elif call.images_dir is not None:
        call.check_images = partial(_refuse_lazy_images, call.images_dir)
    return call


def _refuse_lazy_images(images_dir: Path) -> None:
    """Refuse images whose memory is elsewhere: CRIU would try to read it for ever, at full speed."""
    try:
        pids = [entry.pid for entry in read_pstree(images_dir)]
    except ImageError:
        return  # CRIU says it better
    for pid in pids:
        with contextlib.suppress(ImageError):  # zombies have none; CRIU complains of the rest
            flags = set(read_pagemap(images_dir, pid).flags)
            if any(value & PageFlags.LAZY and not value & PageFlags.PRESENT for value in flags):
                raise OptionError(
                    "images_dir",
                    f"expected a complete dump, the memory of process {pid} is still at the source of a lazy "
                    "dump: use lazy_restore(page_server=...)",
                )


# ---- page server -------------------------------------------------------------------------------


def page_server(images_dir: Directory, options: Mapping[str, object]) -> Call[PageServer]:
    """Start a page server in the background."""

    def result(response: schema.Response) -> PageServer:
        return PageServer(_port(response, "page_server"))

    return _call("page_server", schema.PAGE_SERVER, result, options, images_dir=images_dir)


def page_server_child(images_dir: Directory, options: Mapping[str, object]) -> Call[tuple[int, int]]:
    """Start a page server as the worker's child; the answer is its pid and its port."""

    def result(response: schema.Response) -> tuple[int, int]:
        name = "page_server_child"
        return _told_pid(response.ps.pid, name), _port(response, name)

    call = _call(
        "page_server_child",
        schema.PAGE_SERVER_CHLD,
        result,
        options,
        images_dir=images_dir,
        takes="page_server",
    )
    call.request.keep_open = True
    return call


def _told_pid(pid: int, name: str) -> int:
    # To kill(2), 0 and less are other processes.
    if pid <= 0:
        raise CriuError(name, f"CRIU did not say which process it started (but {pid})")
    return pid


def _port(response: schema.Response, name: str) -> int:
    port = response.ps.port
    if not 0 < port < 1 << 16:
        raise CriuError(name, f"CRIU did not say which port it listens on (but {port})")
    return port


def wait_pid(pid: int) -> Call[int]:
    """Wait for a child of the worker; the answer is its exit status, negative for a signal."""
    _pid("pid", pid)

    def result(response: schema.Response) -> int:
        try:
            return os.waitstatus_to_exitcode(response.status)
        except ValueError:
            raise CriuError(
                "wait_pid", f"CRIU did not say how process {pid} ended (but {response.status:#x})"
            ) from None

    return Call("wait_pid", schema.Request(type=schema.WAIT_PID, pid=pid), result)
