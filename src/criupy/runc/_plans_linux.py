"""A checkpoint and a restore from their options to their ends, without the waiting."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from criupy._descriptor import Descriptor
from criupy._kill_linux import descendants, kill_trees
from criupy._network_linux import HeldNetwork, lock_note
from criupy._proc_linux import is_named, parent_of, tracer_of
from criupy.errors import OptionError, RuncError, RuncTimeout
from criupy.rpc import HasFileno, SourceOutcome
from criupy.rpc._daemon_linux import DaemonPlan, check_page_server, plan_daemon
from criupy.rpc._lazy_linux import open_process, outcome_of, page_socket
from criupy.rpc._report import LogWatch
from criupy.rpc._worker_linux import HeldInterrupt
from criupy.runc._criu_linux import criu_of, kill_checkpoint
from criupy.runc._left_linux import unlock
from criupy.runc._mounts_linux import release_cgroups, release_root
from criupy.runc._program_linux import CRIU, Command, Program, no_such_container
from criupy.runc._words import (
    CheckpointOptions,
    ContainerState,
    PreDumpOptions,
    RestoreOptions,
    check_container,
    option_words,
    path_word,
)

__all__ = ["PAUSE", "CheckpointPlan", "RestorePlan", "check_runs", "has_zero", "pre_dump_words"]

StrPath = str | os.PathLike[str]

#: Between two looks at what a runC that is given up has started meanwhile, in seconds.
PAUSE = 0.02

#: CRIU's last word of a restore that succeeded (criu/cr-restore.c).
_FINISHED = "Restore finished successfully"


def _places(
    image_path: StrPath, parent_path: StrPath | None, work_path: StrPath | None
) -> tuple[list[str], Path]:
    """Return the words for the directories of a checkpoint, and where CRIU's log will be."""
    image_dir = path_word("image_path", image_path)
    work_dir = image_dir if work_path is None else path_word("work_path", work_path)
    words = ["--image-path", image_dir, "--work-path", work_dir]
    if parent_path is not None:
        parent = os.fspath(parent_path)
        if Path(parent).is_absolute() or not Path(image_dir, parent).is_dir():
            raise OptionError(
                "parent_path", f"expected a directory, relative to image_path ({image_dir}); got {parent!r}"
            )
        words += ["--parent-path", parent]
    return words, Path(work_dir)


def pre_dump_words(
    image_path: StrPath,
    parent_path: StrPath | None,
    work_path: StrPath | None,
    options: Mapping[str, object],
) -> tuple[list[str], Path]:
    """Return the words of a pre-dump, and where CRIU's log will be."""
    words, work_dir = _places(image_path, parent_path, work_path)
    return ["--pre-dump", *words, *option_words(PreDumpOptions, options)], work_dir


def has_zero(status_fd: int) -> bool:
    """Tell whether CRIU has said that it is ready."""
    try:
        return os.read(status_fd, 1) == b"\0"
    except BlockingIOError:
        return False


class CheckpointPlan:
    """A lazy checkpoint."""

    def __init__(
        self,
        container: str,
        image_path: StrPath,
        page_server: tuple[str, int],
        parent_path: StrPath | None,
        work_path: StrPath | None,
        options: Mapping[str, object],
    ) -> None:
        self.container: str = check_container(container)
        check_page_server("page_server", page_server)
        try:
            ip_address(page_server[0])
        except ValueError:
            raise OptionError(
                "page_server", f"expected the IP address of this host to listen on, got {page_server[0]!r}"
            ) from None
        self.page_server: tuple[str, int] = page_server
        self._words, self._work_dir = _places(image_path, parent_path, work_path)
        self._words += option_words(CheckpointOptions, options)
        self.image_path: Path = Path(path_word("image_path", image_path))
        self._stack = contextlib.ExitStack()
        self._pid = 0
        self._process: Descriptor | None = None
        self._network: HeldNetwork | None = None
        self.is_closed: bool = False
        self._criu: tuple[int, Descriptor] | None = None
        self._status_pipe = ""
        self.was_paused: bool = False

    def watch(self, state: ContainerState | None) -> None:
        """Look at the container that is to be frozen, so that its end can be told."""
        state = check_runs(self.container, state)
        if tracer := tracer_of(state.pid):
            raise RuncError(
                "checkpoint",
                self.container,
                f"process {tracer} traces it: another checkpoint is under way, or a debugger",
                hint="abort_checkpoint() ends one whose controller is gone",
            )
        self.was_paused = state.status == "paused"
        self._pid = state.pid
        self._process = open_process(state.pid)
        if self._process is not None:
            self._stack.enter_context(self._process)
        self._network = self._stack.enter_context(HeldNetwork(state.pid))

    def start(self, program: Program, status_fd: int) -> Command:
        """Start runC."""
        self._status_pipe = os.readlink(f"/proc/self/fd/{status_fd}")  # noqa: PTH115 - no path of a file
        host, port = self.page_server
        words = ["--lazy-pages", "--page-server", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
        return program.start(
            "checkpoint",
            self.container,
            [*words, "--status-fd", str(status_fd), *self._words],
            pass_fds=(status_fd,),
            criu_log=LogWatch.of(self._work_dir, "dump.log"),
        )

    def locate(self, command: Command) -> tuple[str, int]:
        """Find the CRIU that serves the pages, and return where it listens."""
        self.find_criu(command)
        found = None if self._criu is None else page_socket(self._criu[0], self.page_server[1])
        if found is not None and ip_address(found[0]) != ip_address(self.page_server[0]):
            raise RuncError(
                "checkpoint",
                self.container,
                f"CRIU listens on {found[0]}, not on {self.page_server[0]}",
                hint=(
                    "up to 4.2 CRIU takes the address from its configuration only: put `address "
                    f"{self.page_server[0]}` into a file that the bundle's annotation org.criu.config names "
                    f"(or /etc/criu/runc.conf), or ask for {found[0]}"
                ),
            )
        # A destination that was quick has it already: CRIU listens for one only.
        return found or self.page_server

    def find_criu(self, command: Command) -> None:
        """Find CRIU, by the status descriptor that it inherits, or by its name; also when runC was killed."""
        if self._criu is not None:
            return
        worker = command.worker
        found = [] if worker.poll() is not None else list(descendants(worker.pid))
        # CRIU has forked some of that name, too.
        found = [pid for pid in found if is_named(pid, CRIU) and not is_named(parent_of(pid) or 0, CRIU)]
        for pid in found or self._other_holders(worker.pid):
            with contextlib.suppress(ProcessLookupError):
                self._criu = (pid, self._stack.enter_context(Descriptor(os.pidfd_open(pid))))
                return

    def _other_holders(self, runc: int) -> Iterator[int]:
        """Yield who has the status descriptor, but runC and what was forked of ourselves meanwhile."""
        ours = Path("/proc/self/exe")
        for pid in _holders(self._status_pipe):
            with contextlib.suppress(OSError):
                if pid != runc and not Path(f"/proc/{pid}/exe").samefile(ours):
                    yield pid

    @property
    def criu(self) -> Descriptor | None:
        """The process of CRIU, which outlives a runC that is killed; None before it is known."""
        return None if self._criu is None else self._criu[1]

    def is_unreached(self) -> bool:
        """Tell whether no destination has connected: CRIU listens until the first one has."""
        return self._criu is not None and page_socket(self._criu[0], self.page_server[1]) is not None

    def kill(self, command: Command, *, force: bool) -> bool:
        """End runC and CRIU, so that the container goes on; as kill_checkpoint() does, and return whether."""
        self.find_criu(command)
        known = self._criu
        holders = {} if known is None else {known[0]: known[1].fileno()}
        done = kill_checkpoint(command.processes(), holders, self._stack, self._pid, force=force)
        self.find_criu(command)  # that runC has started just now, and that is nobody's child now
        return done and self._criu is known

    def outcome(self, *, succeeded: bool) -> SourceOutcome:
        """Tell what became of the container."""
        return outcome_of(self._process, succeeded=succeeded)

    def unlock_network(self) -> None:
        """Let the container's network go on, or whatever follows it there."""
        if self._network is not None:
            unlock(self.container, self._network)

    @property
    def is_held(self) -> bool:
        """Whether another CRIU holds it, which came at the same time and was quicker."""
        return criu_of(self._pid) != 0

    def failed(self, error: RuncError, *, tell_lock: bool = True) -> SourceOutcome:
        """Tell what became of a container whose checkpoint failed, and say it in the error, with a lock."""
        outcome = self.outcome(succeeded=False)
        self.tell(error, outcome)
        if tell_lock and outcome is SourceOutcome.RESUMED and not self.is_held:
            self._tell_lock(error)
        return outcome

    def tell(self, error: BaseException, outcome: SourceOutcome) -> None:
        """Say in an error what became of the container."""
        what = "held by another checkpoint" if self.is_held else outcome.value
        error.add_note(f"the container: {what}")

    def _tell_lock(self, error: RuncError) -> None:
        if self._network is not None and (note := self._network.note()):
            error.add_note(f"{note}, once no destination runs it")

    def close(self) -> None:
        """Close what was opened."""
        self.is_closed = True
        self._stack.close()


def check_runs(container: str, state: ContainerState | None) -> ContainerState:
    """Refuse a container that is not there or does not run."""
    if state is None:
        raise no_such_container("checkpoint", container)
    if state.status not in {"running", "paused"}:
        raise RuncError("checkpoint", container, f"expected it to run, it is {state.status}")
    return state


def _holders(target: str) -> Iterator[int]:
    """Yield the other processes that have something open, as their links in /proc name it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if any(os.readlink(link) == target for link in (entry / "fd").iterdir()):  # noqa: PTH115
                    yield int(entry.name)


class RestorePlan:
    """A lazy restore."""

    def __init__(
        self,
        container: str,
        bundle: StrPath,
        image_path: StrPath,
        work_path: StrPath | None,
        page_server: tuple[str, int] | None,
        daemon: Sequence[str] | None,
        stdio: tuple[int | HasFileno, int | HasFileno, int | HasFileno] | None,
        options: Mapping[str, object],
        request_timeout: float | None,
    ) -> None:
        self.container: str = check_container(container)
        image_dir = path_word("image_path", image_path)
        self.work_dir: Path = Path(image_dir if work_path is None else path_word("work_path", work_path))
        bundle_dir = path_word("bundle", bundle)
        self._network = _network_in(bundle_dir)
        self._words = ["--detach", "--lazy-pages", "--bundle", bundle_dir]
        self._words += ["--image-path", image_dir, "--work-path", str(self.work_dir)]
        self._words += option_words(RestoreOptions, options)
        given: object = stdio
        if given is not None and not (isinstance(given, tuple) and len(given) == 3):
            raise OptionError("stdio", f"expected three descriptors, got {stdio!r}")
        self._stdio = None if stdio is None else tuple(map(_number, stdio))
        self.request_timeout = request_timeout
        self._log: LogWatch | None = None
        self.daemon: DaemonPlan | None = plan_daemon(
            partial(RuncTimeout, "restore", container),
            daemon,
            Path(image_dir),
            self.work_dir,
            page_server,
            capture=True,
        )

    def refuse(self, state: ContainerState | None) -> None:
        """Refuse a name that is taken: runC would, and what it leaves then could not be told from ours."""
        if state is not None:
            raise RuncError(
                "restore",
                self.container,
                f"there is a container of that name already, and it is {state.status}",
                hint="take another name, or another root for this side",
            )

    def start(self, program: Program) -> Command:
        """Start runC."""
        self._log = LogWatch.of(self.work_dir, "restore.log")
        with self._streams() as stdio:
            return program.start(
                "restore",
                self.container,
                self._words,
                stdio=stdio,
                criu_log=self._log,
            )

    @property
    def has_our_daemon(self) -> bool:
        """Whether SIGTERM makes the daemon veto a restore that is not finished."""
        return self.daemon is not None and self.daemon.is_ours

    def may_run(self, daemon_status: int | None) -> bool:
        """Tell of a restore that was given up whether its tasks may run, so that nobody may kill them.

        Our own daemon knows: told to end, it vetoes a restore that is not
        finished, and so has failed; or it goes on, or has done all. Of others,
        and where nobody had come to it, CRIU's log tells, a moment after it lets the tasks run.
        """
        if self.has_our_daemon and daemon_status != 0:
            return daemon_status is None
        return self._log is not None and _FINISHED in self._log.text()

    def kill_criu(self, command: Command) -> None:
        """Kill all that runC has started, tasks included: it then undoes what it has done itself."""
        with HeldInterrupt(), contextlib.ExitStack() as stack:
            roots = []
            for pid in descendants(command.worker.pid):
                with contextlib.suppress(ProcessLookupError):
                    pidfd = stack.enter_context(Descriptor(os.pidfd_open(pid)))
                    roots.append((pid, pidfd.fileno()))
            kill_trees(roots)

    def runs(self, error: BaseException) -> None:
        """Say in an error that the container runs here all the same."""
        error.add_note(f"container {self.container} was restored nevertheless, and runs")

    def tidy(self, program: Program, command: Command, error: BaseException) -> None:
        """Do away with what is dangerous of a restore that was killed, and say in the error what is left."""
        if left := release_cgroups(self.work_dir):
            error.add_note(f"CRIU was killed and has left the host's cgroups mounted at {left}: unmount them")
        if self._network is not None and (note := lock_note(self._network)):
            error.add_note(f"{note}, before it is tried again")
        if (command.worker.poll() or 0) >= 0:
            return
        left = release_root(program.root, self.container)
        error.add_note(
            f"runC was killed and may have left {self.container} half made: runc delete --force removes that"
            if left is None
            else f"runC was killed and has left {left} mounted: unmount it, or runc delete empties it"
        )

    @contextlib.contextmanager
    def _streams(self) -> Iterator[tuple[int, int, int]]:
        if self._stdio is not None:
            yield self._stdio[0], self._stdio[1], self._stdio[2]
            return
        with Descriptor(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) as null:
            yield (null.fileno(),) * 3


def _network_in(bundle: str) -> str | None:
    """Return the path of the network namespace that a container is to join; None for one of its own."""
    try:
        config = json.loads(Path(bundle, "config.json").read_bytes())
        namespaces = config.get("linux", {}).get("namespaces", [])
        found = [each.get("path") for each in namespaces if each.get("type") == "network"]
    except FileNotFoundError as error:
        raise OptionError("bundle", f"expected a bundle, there is no {bundle}/config.json") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise OptionError("bundle", f"expected a bundle, {bundle}/config.json: {error}") from error
    return found[0] if found and isinstance(found[0], str) and found[0] else None


def _number(stream: object) -> int:
    number = stream if isinstance(stream, int) else stream.fileno() if isinstance(stream, HasFileno) else -1
    try:
        os.fstat(-1 if isinstance(number, bool) else number)
    except OSError:
        raise OptionError("stdio", f"expected three open descriptors, got {stream!r}") from None
    return number
