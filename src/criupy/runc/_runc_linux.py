"""The blocking client."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Unpack

from criupy.errors import RuncError
from criupy.rpc import Criu, Features, HasFileno, SourceOutcome
from criupy.rpc._daemon_linux import OUR_DAEMON
from criupy.rpc._operation_linux import insist, wait_for
from criupy.rpc._report import LogWatch
from criupy.runc._checkpoint_linux import ContainerCheckpoint
from criupy.runc._criu_linux import kill_checkpoint
from criupy.runc._left_linux import LeftCheckpoint, unlock_left
from criupy.runc._plans_linux import PAUSE, CheckpointPlan, RestorePlan, check_runs, pre_dump_words
from criupy.runc._program_linux import Command, asking_criu, lacks, make_program
from criupy.runc._restore_linux import ContainerRestore
from criupy.runc._words import CheckpointOptions, ContainerState, PreDumpOptions, RestoreOptions

__all__ = ["Runc"]

StrPath = str | os.PathLike[str]


class Runc:
    """Moves containers of runC.

    What runC and CRIU say in failing is raised as RuncError (RuncTimeout if it
    took too long), what a lazy-pages daemon says as LazyPagesError, and
    CriuError is for a CRIU that cannot even be asked what it can do.

    ``binary`` is runC's program, ``root`` the directory of its state (its
    ``--root``), ``criu`` the CRIU that it is to find. ``request_timeout``, in
    seconds, is for each request that has none of its own; without one a runC whose
    CRIU is killed may wait for ever. ``grace`` is how long runC may take to undo a
    restore that is given up, and how long CRIU may take, in a dump that is given
    up, to come to where killing it does no harm to the container.
    """

    def __init__(
        self,
        binary: StrPath = "runc",
        *,
        root: StrPath | None = None,
        criu: StrPath = "criu",
        systemd_cgroup: bool = False,
        request_timeout: float | None = None,
        grace: float = 10.0,
    ) -> None:
        self._program = make_program(
            binary,
            root,
            criu,
            systemd_cgroup=systemd_cgroup,
            request_timeout=request_timeout,
            grace=grace,
        )
        self._features: Features | None = None

    def features(self, *, request_timeout: float | None = None) -> Features:
        """Ask CRIU, once, what it can do on this kernel.

        Every request that needs something asks before. To ask here, early,
        keeps that out of the time that a container stands still.
        """
        if self._features is None:
            timeout = self._program.timeout(request_timeout)
            with asking_criu(), Criu(self._program.criu, request_timeout=timeout) as criu:
                self._features = criu.feature_check()
        return self._features

    def state(self, container: str, *, request_timeout: float | None = None) -> ContainerState | None:
        """Return what ``runc state`` tells of a container; None if there is none of that name."""
        with self._program.running("state", container) as command:
            self._end(command, request_timeout)
            return command.state()

    def pre_dump(
        self,
        container: str,
        *,
        image_path: StrPath,
        parent_path: StrPath | None = None,
        work_path: StrPath | None = None,
        request_timeout: float | None = None,
        **options: Unpack[PreDumpOptions],
    ) -> None:
        """Write the memory that changed since ``parent_path``, and let the container go on.

        ``parent_path`` is the directory of the pre-dump before, relative to ``image_path``.
        """
        words, work_dir = pre_dump_words(image_path, parent_path, work_path, options)
        deadline = time.monotonic() + self._program.timeout(request_timeout)
        self._need("mem_track", "checkpoint", container, request_timeout)
        left = max(deadline - time.monotonic(), 0.0)
        before = check_runs(container, self.state(container, request_timeout=left))
        log = LogWatch.of(work_dir, "dump.log")
        try:
            with self._program.running("checkpoint", container, words, criu_log=log) as command:
                try:
                    self._succeed(command, max(deadline - time.monotonic(), 0.0))
                except BaseException:
                    with contextlib.ExitStack() as stack:
                        kill = partial(kill_checkpoint, command.processes(), {}, stack, before.pid)
                        insist(partial(self._end_checkpoint, kill))
                    raise
        except BaseException as error:
            try:
                insist(partial(self._set_paused, container, paused=before.status == "paused"))
            except RuncError as failure:
                error.add_note(str(failure))
            raise

    def lazy_checkpoint(
        self,
        container: str,
        *,
        image_path: StrPath,
        page_server: tuple[str, int],
        parent_path: StrPath | None = None,
        work_path: StrPath | None = None,
        request_timeout: float | None = None,
        **options: Unpack[CheckpointOptions],
    ) -> ContainerCheckpoint:
        """Freeze a container and serve its memory to a destination, in a block.

        The block begins when ``image_path`` is complete and CRIU listens at
        ``page_server``, an address and a port of this host; ``request_timeout``
        counts until then. Leaving the block waits until the destination has all
        pages and runC has removed the container here. CRIU up to 4.2 takes the
        address from its configuration only (the bundle's annotation
        ``org.criu.config`` names a file with ``address ADDRESS``) and listens on
        all of them without; that is refused, with the container thawed again, unless 0.0.0.0 was asked
        for. It takes any connection that is closed for a destination that has
        all: see that only yours reaches the port.
        """
        plan = CheckpointPlan(container, image_path, page_server, parent_path, work_path, options)
        return ContainerCheckpoint(self, plan, request_timeout)

    def lazy_restore(
        self,
        container: str,
        *,
        bundle: StrPath,
        image_path: StrPath,
        work_path: StrPath | None = None,
        page_server: tuple[str, int] | None = None,
        daemon: Sequence[str] | None = OUR_DAEMON,
        stdio: tuple[int | HasFileno, int | HasFileno, int | HasFileno] | None = None,
        request_timeout: float | None = None,
        **options: Unpack[RestoreOptions],
    ) -> ContainerRestore:
        """Restore a container whose memory follows, in a block.

        Starts a lazy-pages ``daemon``, given as the words of its command and by
        default criupy's own (with options: ``("criupy-lazy-pages", "--reconnect",
        "60")``), that takes pages from ``page_server`` (host and port), or from
        the images themselves; None expects one that listens in ``work_path``, by
        default ``image_path``, already. ``stdio`` are the
        standard input, output and error that the container gets, by default
        /dev/null. The block begins when the container runs; leaving it waits for
        the last page.
        """
        plan = RestorePlan(
            container, bundle, image_path, work_path, page_server, daemon, stdio, options, request_timeout
        )
        return ContainerRestore(self, plan)

    def abort_checkpoint(self, container: str, *, force: bool = False) -> SourceOutcome:
        """End a checkpoint whose controller is gone, so that the container goes on here, and its network.

        Who started it does not matter, nor how far it has come: runC may be about to start
        CRIU, or both may have been killed and have left a frozen cgroup and a locked network.
        Only for when no destination runs the container, which once one has connected nobody
        here can know: ``force`` says that you do. A container that is paused,
        with no other trace of a checkpoint, takes ``force`` as well: somebody may want it so. One
        that was paused before the checkpoint runs then.
        """
        state = check_runs(container, self.state(container))
        left = LeftCheckpoint(container, state, self._program.root, force=force)
        try:
            return insist(partial(self._end_left, container, left))
        finally:
            left.close()

    def unlock_network(self, container: str) -> None:
        """Let a container's network go on that a failed checkpoint has left locked.

        Only when no destination runs it: two would answer for one. Raise RuncError if CRIU holds it still.
        """
        state = check_runs(container, self.state(container))
        unlock_left(container, state)

    # ---- inside --------------------------------------------------------------------------------------

    def _end_left(self, container: str, left: LeftCheckpoint) -> SourceOutcome:
        self._end_checkpoint(left.kill)
        for pidfd in left.pidfds:
            wait_for(math.inf, pidfd)
        try:
            self._set_paused(container, paused=False)
        finally:
            left.unlock_network()
        return left.outcome()

    def _end_checkpoint(self, kill: Callable[..., bool]) -> None:
        """Kill runC and CRIU, this once it does no harm to the container, or has had its time."""
        deadline = time.monotonic() + self._program.grace
        while not kill(force=time.monotonic() >= deadline):
            time.sleep(PAUSE)

    def _need(self, feature: str, command: str, container: str, request_timeout: float | None = None) -> None:
        if getattr(self.features(request_timeout=request_timeout), feature) is not True:
            raise lacks(command, container, feature)

    def _end(self, command: Command, request_timeout: float | None = None) -> int:
        """Wait for the end of a command; return its exit status."""
        deadline = time.monotonic() + self._program.timeout(request_timeout)
        while (status := command.worker.poll()) is None:
            if not wait_for(deadline, command.worker.pidfd):
                raise command.overdue()
        return status

    def _succeed(self, command: Command, request_timeout: float | None = None) -> None:
        if self._end(command, request_timeout):
            raise command.failure()

    def _run(self, name: str, container: str, *words: str) -> None:
        """Do one of runC's short commands; raise RuncError if it fails."""
        with self._program.running(name, container, words) as command:
            self._succeed(command)

    def _set_paused(self, container: str, *, paused: bool) -> None:
        """Have a container that CRIU was killed over as it was: CRIU freezes and thaws the cgroup."""
        state = self.state(container)
        if state is not None and (state.status, paused) in {("paused", False), ("running", True)}:
            self._run("pause" if paused else "resume", container)
