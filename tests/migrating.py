"""A live migration with real CRIU at both ends and our daemon between, as the tests arrange it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from criupy.testing.control_linux import Control
from criupy.testing.criu_linux import (
    Criu,
    CriuJob,
    Restored,
    Source,
    lazy_dump,
    lazy_pages_daemon,
    our_command,
    restore,
    stock_command,
)
from criupy.testing.link_linux import Conditions, Link, open_link
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.testing.workload_linux import Workload, start_workload

MIB = 1 << 20


def script(room: Path, action: str, body: str) -> list[str]:
    """An action script for criu that does something at one of its stations."""
    path = room / "action.sh"
    path.write_text(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = {action} ] || exit 0\n{body}\n')
    path.chmod(0o755)
    return ["--action-script", str(path)]


@dataclass(frozen=True, slots=True, eq=False)
class Migration:
    """`source` is frozen by `dump`; `control` is that of the restored process."""

    source: Workload
    dump: Source
    daemon: CriuJob
    restored: Restored
    control: Control
    link: Link | None
    images: Path
    room: Path
    asked: float
    """When the restore was begun, by the clock of ``trio.current_time``."""

    @property
    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.room / "work" / "stats.json").read_text())
        return found

    @property
    def log(self) -> str:
        return self.daemon.log.read_text()

    async def transferring(self) -> None:
        """Wait until criu is done and the daemon, which it does not wait for, knows that the tasks run."""
        await self.restored.finished()
        await until(lambda: "restore finished" in self.log or not self.daemon.is_running)

    def speed_up(self) -> None:
        """Let the rest come at once: what had to happen during the transfer has happened."""
        assert self.link is not None
        self.link.conditions = Conditions()

    async def verify_all(self) -> None:
        for task in range(self.source.spec.tree):
            result = await self.control.worker(task).verify()
            assert result.is_good, (task, result)

    async def ends_well(self) -> None:
        """Everything arrived: all three exit with 0, and the source is killed."""
        await self.daemon.succeed()
        await self.dump.job.succeed()
        assert (await self.source.wait()).signal == 9


@contextlib.asynccontextmanager
async def migrate(
    criu: Criu,
    spec: WorkloadSpec,
    room: Path,
    *,
    stock: bool = False,
    rate: float | None = None,
    prepare: Callable[[Workload], Awaitable[None]] | None = None,
    before: Callable[[Control], None] | None = None,
    dump_extra: Iterable[str] = (),
    daemon_extra: Iterable[str] = (),
    restore_extra: Iterable[str] = (),
    lazy_parents: bool = False,
) -> AsyncIterator[Migration]:
    """Dump lazily, start our daemon, or a stock one, and the restore.

    `prepare` is done before the dump; `before` gives the process orders while it is frozen. With
    `lazy_parents` what the dump's parents hold is restored lazily, too.
    """
    images, work = room / "images", room / "work"
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(start_workload(spec, room))
        if prepare is not None:
            await prepare(source)
        pages = await stack.enter_async_context(lazy_dump(criu, source.pid, images, extra=dump_extra))
        link = None
        address = (pages.address, pages.port)
        if rate is not None:
            link = await stack.enter_async_context(open_link(address, Conditions(bandwidth=rate)))
            address = (link.address, link.port)
        control = source.control.copy(room / "restored.control")
        stack.callback(control.close)
        if before is not None:
            before(control)
        restored_from = images
        if lazy_parents:
            restored_from = room / "lazily"
            words = [sys.executable, "-m", "criupy", "lazy-parents", str(images), str(restored_from)]
            await trio.run_process(words, capture_stdout=True)
        ours = [] if stock else ["--stats-file", "stats.json"]
        daemon = await stack.enter_async_context(
            lazy_pages_daemon(
                stock_command(criu) if stock else our_command(),
                restored_from,
                work,
                source=address,
                extra=[*ours, *daemon_extra],
            )
        )
        asked = trio.current_time()
        restored = await stack.enter_async_context(
            restore(
                criu,
                restored_from,
                work,
                source.pid,
                binds={source.control.path: control.path},
                extra=restore_extra,
            )
        )
        control.gone = restored.gone
        yield Migration(source, pages, daemon, restored, control, link, images, room, asked)
