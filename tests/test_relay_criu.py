"""A relay between a real CRIU that holds a frozen process and its destination."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy.testing.certificates import Certificates
from criupy.testing.control_linux import Control, Order
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
from criupy.testing.link_linux import Conditions, Cut, Event, Link, Loss, Stall, open_link, random_cuts
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.testing.workload_linux import Workload, start_workload
from criupy.wire.extension import Hello, Lane, Refusal
from criupy.wire.page_server import Command, Frame
from migrating import script
from page_server_clients import GET
from page_server_command import Running, command

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

MIB = 1 << 20
SPEC = WorkloadSpec(size=32 * MIB, areas=2, tree=2)


@dataclass(frozen=True, slots=True, eq=False)
class Relayed:
    source: Workload
    dump: Source
    relay: Running
    link: Link
    images: Path
    room: Path

    @contextlib.asynccontextmanager
    async def destination(
        self, criu: Criu, *words: str, stock: bool = False, restoring: Iterable[str] = ()
    ) -> AsyncIterator[tuple[CriuJob, Restored, Control]]:
        work = self.room / "work"
        control = self.source.control.copy(self.room / "restored.control")
        async with (
            lazy_pages_daemon(
                stock_command(criu) if stock else our_command(),
                self.images,
                work,
                source=(self.link.address, self.link.port),
                extra=words,
            ) as daemon,
            restore(
                criu,
                self.images,
                work,
                self.source.pid,
                binds={self.source.control.path: control.path},
                extra=restoring,
            ) as restored,
        ):
            control.gone = restored.gone
            try:
                yield daemon, restored, control
            finally:
                control.close()


@contextlib.asynccontextmanager
async def relayed(
    criu: Criu,
    room: Path,
    *words: str,
    conditions: Conditions | None = None,
    script: tuple[Event, ...] = (),
    spec: WorkloadSpec = SPEC,
) -> AsyncIterator[Relayed]:
    images, work = room / "images", room / "relay"
    work.mkdir()
    async with start_workload(spec, room) as source, lazy_dump(criu, source.pid, images) as dump:
        upstream = f"{dump.address}:{dump.port}"
        with command(images, work, "--upstream", upstream, *words, lazy_pages=False) as relay:
            async with open_link((relay.address, relay.port), conditions, script) as link:
                yield Relayed(source, dump, relay, link, images, room)


async def all_good(r: Relayed, control: Control) -> None:
    for task in range(r.source.spec.tree):
        result = await control.worker(task).verify()
        assert result.is_good, (task, result)


async def ended(relay: Running) -> int:
    return await trio.to_thread.run_sync(relay.ended)


async def all_ends_well(r: Relayed, daemon: CriuJob, control: Control) -> None:
    """Every page is right, the source is killed, and all others exit with 0."""
    await all_good(r, control)
    await daemon.succeed()
    await r.dump.job.succeed()
    assert (await r.source.wait()).signal == 9
    assert await ended(r.relay) == 0
    assert r.relay.errors == []


async def source_goes_on(r: Relayed) -> None:
    assert (await r.dump.job.wait()).code == 1
    for task in range(SPEC.tree):
        assert (await r.source.control.worker(task).verify()).is_good


def is_frozen(r: Relayed) -> bool:
    """The dump still waits, and its process does nothing."""
    status = Path(f"/proc/{r.source.pid}/status").read_text()
    return r.dump.job.is_running and "State:\tt" in status


async def abort(r: Relayed) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "criupy.page_server", "--abort", "-W", str(r.room / "relay")]
    return await trio.to_thread.run_sync(
        partial(subprocess.run, words, capture_output=True, text=True, check=False)
    )


# ---- all goes well ---------------------------------------------------------------------------------------


async def test_ours(criu: Criu, room: Path) -> None:
    async with relayed(criu, room) as r, r.destination(criu) as (daemon, restored, control):
        control.worker().start_touching(Order.RANDOM, count=2000)
        await restored.finished()
        assert (await control.worker().wait()).is_good
        await all_ends_well(r, daemon, control)
        assert "a relay: two lanes, vectored requests" in daemon.log.read_text()
        assert r.relay.warnings == []


@pytest.mark.parametrize("words", [(), ("--cache", "1M")], ids=["", "small-cache"])
async def test_a_stock_daemon_of_the_other_frame_size(
    two_criu: tuple[Criu, Criu], room: Path, words: tuple[str, ...]
) -> None:
    """Dumped by the older CRIU, restored by the newer; the other way round CRIU cannot."""
    older, newer = two_criu
    async with (
        relayed(older, room, *words) as r,
        r.destination(newer, stock=True) as (daemon, restored, control),
    ):
        await restored.finished()
        await all_ends_well(r, daemon, control)
    assert "frames of 24 bytes" in r.relay.log


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_a_link_that_is_cut_twenty_times(
    criu: Criu, room: Path, certificates: Certificates, secure: bool
) -> None:
    cuts = random_cuts(criu.frame_size, nr=20, within=SPEC.tree * SPEC.size * 3 // 4, down=0.02)
    server = certificates.options("server") if secure else []
    client = certificates.options("client") if secure else []
    async with (
        relayed(criu, room, *server, script=cuts) as r,
        r.destination(criu, "--reconnect", "20", "--link-timeout", "500ms", *client) as (
            daemon,
            restored,
            control,
        ),
    ):
        control.worker().start_touching(Order.RANDOM, count=2000)
        await restored.finished()
        assert (await control.worker().wait()).is_good
        await all_ends_well(r, daemon, control)
        assert r.link.cuts == 20
        if secure:
            assert "resumed" in daemon.log.read_text()


@pytest.mark.parametrize(
    ("conditions", "script"),
    [
        (Conditions(bandwidth=1e6), ()),
        (Conditions(), tuple(Event(n * 100_000, Stall(0.1)) for n in range(1, 10))),
        (Conditions(piece=1), ()),
    ],
    ids=["slow", "stalling", "byte-by-byte"],
)
async def test_a_poor_link(criu: Criu, room: Path, conditions: Conditions, script: tuple[Event, ...]) -> None:
    spec = WorkloadSpec(size=(256 << 10) if conditions.piece else 2 * MIB)
    async with (
        relayed(criu, room, conditions=conditions, script=script, spec=spec) as r,
        r.destination(criu) as (daemon, restored, control),
    ):
        await restored.finished()
        await all_ends_well(r, daemon, control)


# ---- the destination fails -------------------------------------------------------------------------------


async def test_an_abort_before_restore_finished_lets_the_source_go_on(criu: Criu, room: Path) -> None:
    async with relayed(criu, room) as r:
        async with r.destination(criu, restoring=script(room, "post-restore", "exit 1")) as (daemon, _, _):
            assert (await daemon.wait()).code == 1
            assert "a live source goes on" in daemon.log.read_text()
        await source_goes_on(r)
        assert await ended(r.relay) == 1
        assert "the destination has given up" in r.relay.log


async def test_a_destination_that_is_gone_leaves_the_source_frozen_until_an_operator_decides(
    criu: Criu, room: Path
) -> None:
    async with relayed(criu, room, conditions=Conditions(bandwidth=20e6)) as r:
        async with r.destination(criu) as (daemon, restored, _):
            await restored.finished()
            await until(lambda: "the restore has finished" in r.relay.log)
            daemon.kept.kill()
            restored.kill()
        await until(lambda: "the destination is lost" in r.relay.log)
        await trio.sleep(0.5)
        assert is_frozen(r)
        done = await abort(r)
        assert (done.returncode, done.stdout) == (0, "the source goes on\n"), done.stderr
        await source_goes_on(r)
        assert await ended(r.relay) == 1
        assert "an operator decided so (the destination said that its tasks run)" in r.relay.log
        again = await abort(r)
        assert again.returncode == 1
        assert "no relay is there" in again.stderr


async def test_or_until_the_hold_timeout(criu: Criu, room: Path) -> None:
    async with relayed(criu, room, "--hold-timeout", "2", conditions=Conditions(bandwidth=20e6)) as r:
        async with r.destination(criu, "--link-timeout", "1") as (daemon, restored, _):
            await restored.finished()
            await until(lambda: "the restore has finished" in r.relay.log)
            daemon.kept.kill()
            restored.kill()
        await until(lambda: "the destination is lost" in r.relay.log)
        assert is_frozen(r)
        await source_goes_on(r)
        assert await ended(r.relay) == 1
        assert "nothing was heard of the destination for 2 s" in r.relay.log


async def test_a_link_that_does_not_come_back_ends_the_tasks_before_the_source_goes_on(
    criu: Criu, room: Path
) -> None:
    """The tasks are killed although they would be poisoned by default, since the source will go on."""
    script = (Event(8 * MIB, Cut(Loss.RST, down=1000.0)),)
    async with (
        relayed(criu, room, "--hold-timeout", "4", script=script) as r,
        r.destination(criu, "--link-timeout", "1", "--reconnect", "1") as (daemon, restored, _),
    ):
        await restored.finished()
        assert (await restored.task_ended()).signal == 9
        assert is_frozen(r)
        await source_goes_on(r)
        assert (await daemon.wait()).code == 1
        assert "the tasks were killed" in daemon.log.read_text()
        assert "--abort on its host" in daemon.log.read_text()


# ---- the relay fails -------------------------------------------------------------------------------------


async def test_a_relay_that_crashes_before_the_first_page_lets_the_source_go_on(
    criu: Criu, room: Path
) -> None:
    async with relayed(criu, room) as r:
        r.relay.process.kill()
        await source_goes_on(r)


async def test_a_relay_that_crashes_later_leaves_the_source_to_its_holder(criu: Criu, room: Path) -> None:
    async with relayed(criu, room, conditions=Conditions(bandwidth=20e6)) as r:
        async with r.destination(criu, "--on-failure", "kill") as (daemon, restored, _):
            await restored.finished()
            await r.link.reached(MIB)
            r.relay.process.kill()
            assert (await daemon.wait()).code == 1
            assert (await restored.task_ended()).signal == 9
        assert is_frozen(r)
        done = await abort(r)
        assert (done.returncode, done.stdout) == (0, "the source goes on\n"), done.stderr
        await source_goes_on(r)


# ---- who else comes --------------------------------------------------------------------------------------


async def test_a_second_destination_is_refused_and_the_first_unharmed(criu: Criu, room: Path) -> None:
    async with relayed(criu, room, conditions=Conditions(bandwidth=40e6)) as r:
        key = json.loads((r.images / "criupy-relay.json").read_text())["key"]
        pid = r.source.pid
        async with r.destination(criu) as (daemon, restored, control):
            await restored.finished()
            await r.link.reached(1)  # the first has come; the link is ours and stands still while we block
            good, bad = bytes.fromhex(key), bytes(32)
            for hello, reason in [
                (Hello(b"o" * 16, Lane.BULK, 1).encode(good), Refusal.TAKEN),
                (Hello(b"o" * 16, Lane.BULK, 1).encode(bad), Refusal.KEY),
            ]:
                with r.relay.connect() as other:
                    other.sock.sendall(hello)
                    assert Frame.decode(other.receive(32), 32) == Frame(Command.REFUSED, reason)
                    assert other.is_over()
            with r.relay.connect() as other:
                other.send(GET, 1, 0x10000, pid)
                assert other.is_over()
            await all_ends_well(r, daemon, control)


# ---- the spool -------------------------------------------------------------------------------------------


async def test_a_spool_outlives_source_and_relay(criu: Criu, room: Path) -> None:
    """The source ends as soon as everything is on disk and the tasks run; the relay may be killed then."""
    spool = room / "spool"
    async with (
        relayed(criu, room, "--spool", str(spool), conditions=Conditions(bandwidth=10e6)) as r,
        r.destination(criu, "--reconnect", "20") as (daemon, restored, control),
    ):
        await restored.finished()
        await r.dump.job.succeed()
        assert (await r.source.wait()).signal == 9
        r.relay.process.kill()
        await trio.to_thread.run_sync(r.relay.process.wait)
        assert daemon.is_running
        (room / "again").mkdir()
        words = ("--upstream", "127.0.0.1:1", "--spool", str(spool), "--port", str(r.link.target[1]))
        with command(r.images, room / "again", *words, lazy_pages=False) as again:
            r.link.conditions = Conditions()
            await all_good(r, control)
            await daemon.succeed()
            again.stop()
            assert await ended(again) == 0


async def test_a_spool_without_a_destination_is_a_plain_image(criu: Criu, room: Path) -> None:
    spool = room / "spool"
    async with relayed(criu, room, "--spool", str(spool), "--close-when-spooled") as r:
        await r.dump.job.succeed()
        assert (await r.source.wait()).signal == 9
        r.relay.stop()
        assert await ended(r.relay) == 0
        control = r.source.control.copy(room / "restored.control")
        async with restore(
            criu, spool, room / "work", r.source.pid, lazy=False, binds={r.source.control.path: control.path}
        ) as restored:
            control.gone = restored.gone
            await restored.finished()
            await all_good(r, control)
            control.close()
