"""What both clients need for a lazy migration: where a source listens, how it ended, what a restore needs."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import socket
import stat
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final, Literal

from criupy._descriptor import Descriptor
from criupy._network_linux import HeldNetwork
from criupy.errors import CriuError, CriuTimeout, LazyPagesError, OptionError
from criupy.rpc import _calls_linux as calls
from criupy.rpc import _schema_pb2 as schema
from criupy.rpc._calls_linux import Call
from criupy.rpc._daemon_linux import SOCKET_NAME, DaemonPlan, plan_daemon
from criupy.rpc._option_checks import host_file
from criupy.rpc._option_types import Directory
from criupy.rpc._options import TlsOptions
from criupy.rpc._results import SourceOutcome, Version

__all__ = ["LazyDumpPlan", "check_listening", "listeners", "page_socket", "plan_restore"]

_TCP_LISTEN: Final = "0A"  # include/net/tcp_states.h, as /proc/net/tcp shows it


def frame_size(version: Version) -> Literal[24, 32]:
    """Return the bytes of a page-server frame of this CRIU; it grew in 4.2 (criu/page-xfer.c)."""
    return 32 if version.at_least(4, 2) else 24


def listeners(pid: int) -> list[tuple[str, int]]:
    """List (address, port) of the TCP sockets on which a process listens, in its own network namespace."""
    inodes = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                target = str(link.readlink())
                if target.startswith("socket:["):
                    inodes.add(target[len("socket:[") : -1])
    found = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _TCP_LISTEN and words[9] in inodes:
                    found.append(_endpoint(words[1]))
    return found


def _endpoint(text: str) -> tuple[str, int]:
    """Parse an address of /proc/net/tcp: 32-bit words in the machine's order, then the port."""
    address, port = text.split(":")
    words = bytes.fromhex(address)
    if sys.byteorder == "little":
        words = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
    return str(ipaddress.ip_address(words)), int(port, 16)


def page_socket(pid: int | None, port: int) -> tuple[str, int] | None:
    """Return where the page server of a dumping CRIU listens; None if it does not, or cannot be seen."""
    if pid is None:
        return None
    found = [endpoint for endpoint in listeners(pid) if port in {0, endpoint[1]}]
    return found[0] if len(found) == 1 else None


def config_with_address(
    address: str | None, options: Mapping[str, object]
) -> tuple[dict[str, object], Descriptor | None]:
    """Add an address to the configuration that CRIU reads after the request.

    Up to 4.2 a lazy dump over RPC ignores the request's address and listens on
    all interfaces; the configuration file counts (criu#2959). It is a file in
    memory, which CRIU opens through us: one in another pid namespace cannot.
    """
    if address is None:
        return dict(options), None
    given = options.get("config_file")
    content = b""
    if given is not None:
        path = host_file("config_file", given)
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise OptionError("config_file", f"expected a readable file, {path}: {error.strerror}") from error
    memory = Descriptor(os.memfd_create("criupy-config"))
    with open(memory.fileno(), "wb", closefd=False) as file:
        file.write(content.rstrip() + f"\naddress {address}\n".encode())
    return {**options, "config_file": f"/proc/{os.getpid()}/fd/{memory.fileno()}"}, memory


def check_address(address: str | None, port: int) -> None:
    """Refuse an address that CRIU would misread."""
    if address is not None:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise OptionError(
                "address", f"expected an IP address, or None for all interfaces; got {address!r}"
            ) from None
    given: object = port
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < 1 << 16:
        raise OptionError("port", f"expected a port from 0 to 65535, got {given!r}")


def open_process(pid: int) -> Descriptor | None:
    """Return a pidfd of the process to be dumped; None where it cannot be had."""
    try:
        return Descriptor(os.pidfd_open(pid))
    except OSError:
        return None


def outcome_of(process: Descriptor | None, *, succeeded: bool) -> SourceOutcome:
    """Tell what became of the process that was dumped lazily."""
    if succeeded:
        return SourceOutcome.KILLED
    if process is None:
        return SourceOutcome.RESUMED
    poll = select.poll()
    poll.register(process.fileno(), select.POLLIN)
    return SourceOutcome.LOST if poll.poll(0) else SourceOutcome.RESUMED


def knock(address: str, port: int) -> bool:
    """Make a source that nobody has reached resume its tasks, by a connection that is reset; tell if so."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    unspecified = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - CRIU's, not ours
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.settimeout(1)  # it is on this machine, or out of reach
        try:
            sock.connect((unspecified.get(address, address), port))
        except OSError:
            return False
        return True


class LazyDumpPlan:
    """A lazy dump from its options to its end, without the waiting."""

    def __init__(
        self,
        pid: int,
        images_dir: Directory,
        options: Mapping[str, object],
        *,
        address: str | None,
        port: int,
        is_own: bool,
    ) -> None:
        check_address(address, port)
        if port == 0 and not is_own:
            raise OptionError(
                "port", "expected one from 1 on: only a worker of one's own can be asked which it chose"
            )
        self._pid = pid
        self._images_dir = images_dir
        self._options = options
        self._address = address
        self._port = port
        self._stack = contextlib.ExitStack()
        self._process: Descriptor | None = None
        self._network: HeldNetwork | None = None
        self.is_closed: bool = False
        self._criu: Descriptor | None = None

    def check_version(self, version: Version) -> Literal[24, 32]:
        """Return the frame size of this CRIU, or refuse one that cannot say when it is ready."""
        if not version.at_least(3, 15):
            raise CriuError("lazy_dump", f"CRIU 3.15 or newer is needed, this is {version}")
        return frame_size(version)

    def open(self) -> Call[None]:
        """Make the call; what it needs stays open until ``close``."""
        try:
            options, memory = config_with_address(self._address, self._options)
            if memory is not None:
                self._stack.enter_context(memory)
            call = calls.dump(
                self._pid, self._images_dir, options, lazy=True, address=self._address, port=self._port
            )
            self._process = open_process(self._pid)
            if self._process is not None:
                self._stack.enter_context(self._process)
                self._network = self._stack.enter_context(HeldNetwork(self._pid))
        except BaseException:
            self.close()
            raise
        return call

    def locate(self, pid: int | None) -> tuple[str, int]:
        """Return where the CRIU with this pid listens; it waits for our answer, so the pid is its own."""
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                self._criu = self._stack.enter_context(Descriptor(os.pidfd_open(pid)))
        found = page_socket(pid, self._port)
        if found is not None:
            return found
        if self._port:
            return self._address or "0.0.0.0", self._port  # noqa: S104 - what CRIU was told
        raise CriuError("lazy_dump", f"CRIU's listening socket was not found (process {pid})")

    def is_unreached(self, pid: int | None, address: str, port: int) -> bool:
        """Tell whether no destination has connected, nor will: CRIU accepts once.

        A CRIU that cannot be looked at is asked with a connection that is
        reset. If it takes that one, nobody else gets in.
        """
        if pid is not None:
            return page_socket(pid, self._port) is not None
        return knock(address, port)

    def stop(self, address: str, port: int) -> None:
        """End a CRIU that is no child of ours."""
        if self._criu is None:
            knock(address, port)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self._criu.fileno(), signal.SIGKILL)
            # It closes the connection before it lets go of the tasks.
            poll = select.poll()
            poll.register(self._criu.fileno(), select.POLLIN)
            poll.poll(5000)

    def aborted(self, *, seen: bool, succeeded: bool) -> SourceOutcome:
        """Tell what became of a tree whose CRIU was made to end."""
        if not seen:
            raise CriuTimeout(
                "lazy_dump",
                "CRIU was not seen to end",
                hint="look whether it runs still: as long as it does, it holds the tree frozen",
            )
        return self.outcome(succeeded=succeeded)

    def unlock_network(self) -> None:
        """Let the network of a tree go on whose CRIU was made to end; raise CriuError if it stays locked."""
        if self._network is not None:
            self._network.unlock()

    def failed(self, error: BaseException, *, tell_lock: bool = True) -> SourceOutcome:
        """Tell what became of the tree of a CRIU that failed; say it in notes, and a lock that is left."""
        outcome = self.outcome(succeeded=False)
        error.add_note(f"the dumped process: {outcome.value}")
        if tell_lock and outcome is SourceOutcome.RESUMED:
            self.tell_lock(error)
        return outcome

    def tell_lock(self, error: BaseException) -> None:
        """Say in an error that the network is still locked, if it is."""
        if self._network is not None and (note := self._network.note()):
            error.add_note(f"{note}, once no destination runs it")

    def outcome(self, *, succeeded: bool) -> SourceOutcome:
        """Tell what became of the tree."""
        return outcome_of(self._process, succeeded=succeeded)

    def close(self) -> None:
        """Close what was opened."""
        self.is_closed = True
        self._stack.close()


# ---- the destination ----------------------------------------------------------------------


def plan_restore(
    images_dir: Directory,
    options: Mapping[str, object],
    *,
    daemon: object,
    page_server: tuple[str, int] | None,
    capture: bool,
) -> tuple[Call[int], DaemonPlan | None]:
    """Make the call of a lazy restore, and the plan of the daemon that is to be started for it."""
    if page_server is None and options.get("tls"):
        raise OptionError("tls", "expected together with page_server, which the daemon talks TLS to")
    call = calls.restore(images_dir, options, lazy=True)
    try:
        work_dir = call.work_dir or Path()
        tls = () if daemon is None else _take_tls(call.request.opts)
        plan = plan_daemon(
            partial(CriuTimeout, "lazy_restore"),
            daemon,
            call.images_dir or work_dir,
            work_dir,
            page_server,
            tls=tls,
            capture=capture,
        )
    except BaseException:
        call.close()
        raise
    return call, plan


def _take_tls(message: schema.Options) -> tuple[str, ...]:
    """Take the TLS options out of a restore's message, as words for a daemon.

    CRIU's restore makes no connection, and one built without TLS would refuse them.
    """
    words: list[str] = []
    for name in TlsOptions.__annotations__:
        value = getattr(message, name)
        if value:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
        message.ClearField(name)  # type: ignore[arg-type]
    return tuple(words)


def check_listening(work_dir: Path) -> None:
    """Insist on the socket of a daemon that was started by someone else."""
    path = work_dir / SOCKET_NAME
    try:
        is_socket = stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        is_socket = False
    if not is_socket:
        raise LazyPagesError(
            f"no lazy-pages daemon listens in {work_dir}, there is no {SOCKET_NAME}: "
            "start it first with this work directory, or let lazy_restore() start one"
        )
