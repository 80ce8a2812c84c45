"""Real dumps served by the page server to our daemon and to CRIU's, and restored: every byte compared."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from criupy.page_server import Config, Ending, PageServer, open_page_server
from criupy.testing.certificates import Certificates
from criupy.testing.control_linux import Order
from criupy.testing.criu_linux import (
    Criu,
    dump,
    find_criu,
    lazy_pages_daemon,
    our_command,
    restore,
    stock_command,
)
from criupy.testing.link_linux import Link, open_link, random_cuts
from criupy.testing.spec import WorkloadSpec
from criupy.testing.workload_linux import Workload, start_workload
from page_server_command import Running, command

pytestmark = [pytest.mark.criu, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

MIB = 1 << 20
SPEC = WorkloadSpec(size=48 * MIB, areas=3, tree=2, fragmented=True)


@pytest.fixture
def versions() -> tuple[Criu, Criu]:
    """The oldest CRIU that works here, which dumps, and the newest: either restores what it dumped."""
    found, reasons = find_criu()
    if not found:
        pytest.skip("; ".join(reasons))
    return found[-1], found[0]


async def restore_and_verify(
    criu: Criu,
    server: PageServer | Running | Link,
    workload: Workload,
    room: Path,
    name: str,
    daemon: tuple[str, ...],
    extra: Sequence[str] = (),
) -> None:
    """Restore a copy of the workload elsewhere, touching it all the while, and look at every byte."""
    work = room / name
    await trio.Path(work).mkdir()
    control = workload.control.copy(work / "control")
    with contextlib.closing(control):
        control.worker().start_touching(Order.RANDOM, count=5000)
        async with (
            lazy_pages_daemon(
                daemon, room / "images", work, source=(server.address, server.port), extra=extra
            ) as lazy_pages,
            restore(
                criu, room / "images", work, workload.pid, binds={workload.control.path: control.path}
            ) as restored,
        ):
            control.gone = restored.gone
            await restored.finished()
            assert (await control.worker().wait()).is_good
            await lazy_pages.succeed()
            for task in range(workload.spec.tree):
                assert (await control.worker(task).verify()).is_good


async def test_ten_restores_in_a_row(versions: tuple[Criu, Criu], room: Path) -> None:
    spec = WorkloadSpec(size=12 * MIB, areas=3, tree=2, fragmented=True)
    async with start_workload(spec, room) as workload:
        await dump(versions[0], workload.pid, room / "images")
        async with open_page_server(Config(room / "images")) as server:
            for n in range(10):
                criu = versions[n // 2 % 2]
                daemon = stock_command(criu) if n % 2 else our_command()
                await restore_and_verify(criu, server, workload, room, f"work{n}", daemon)
            assert dict(server.statistics.endings) == {"closed": 10}


async def test_five_restores_at_the_same_time(versions: tuple[Criu, Criu], room: Path) -> None:
    async with start_workload(SPEC, room) as workload:
        await dump(versions[0], workload.pid, room / "images")
        async with open_page_server(Config(room / "images")) as server:
            async with trio.open_nursery() as nursery:
                for n in range(5):
                    criu = versions[n // 2 % 2]
                    daemon = stock_command(criu) if n % 2 else our_command()
                    nursery.start_soon(restore_and_verify, criu, server, workload, room, f"work{n}", daemon)
            server.stop()
            await server.wait()
            assert server.last is not None
            assert server.last.ending is Ending.CLOSED


@pytest.mark.spread
@pytest.mark.parametrize("ours", [True, False], ids=["our-daemon", "stock-daemon"])
async def test_the_command_for_one_restore(criu: Criu, room: Path, ours: bool) -> None:
    daemon = our_command() if ours else stock_command(criu)
    async with start_workload(SPEC, room) as workload:
        await dump(criu, workload.pid, room / "images")
        await trio.Path(room / "serving").mkdir()
        with command(room / "images", room / "serving", "--once") as served:
            await restore_and_verify(criu, served, workload, room, "restoring", daemon)
            assert await trio.to_thread.run_sync(served.ended) == 0
            assert served.errors == served.warnings == []


@pytest.mark.parametrize("ours", [True, False], ids=["our-daemon", "stock-daemon"])
@pytest.mark.parametrize(
    ("pair", "secure"),
    [("older", False), ("newer", False), ("mixed", False), ("mixed", True)],
    ids=["older", "newer", "mixed", "mixed-tls"],
)
async def test_each_pair_of_versions(
    two_criu: tuple[Criu, Criu], room: Path, certificates: Certificates, pair: str, ours: bool, secure: bool
) -> None:
    """The images tell the size of frames of who wrote them, and the server takes that of who asks.

    Images of a newer CRIU an older one cannot restore, whoever serves their pages.
    """
    older, newer = two_criu
    dumping, restoring = {"older": (older, older), "newer": (newer, newer), "mixed": (older, newer)}[pair]
    tls = certificates.files("server") if secure else None
    extra = certificates.options("client") if secure else []
    async with start_workload(SPEC, room) as workload:
        await dump(dumping, workload.pid, room / "images")
        async with open_page_server(Config(room / "images", tls=tls)) as server:
            daemon = our_command() if ours else stock_command(restoring)
            await restore_and_verify(restoring, server, workload, room, "restoring", daemon, extra)
            server.stop()
            await server.wait()
            assert server.last is not None
            assert server.last.frame_size == (dumping.frame_size if ours else restoring.frame_size)


@pytest.mark.spread
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_a_link_that_is_cut_twenty_times(
    criu: Criu, room: Path, certificates: Certificates, secure: bool
) -> None:
    tls = certificates.files("server") if secure else None
    extra = [
        "--reconnect",
        "20",
        "--link-timeout",
        "250ms",
        *(certificates.options("client") if secure else []),
    ]
    async with start_workload(SPEC, room) as workload:
        await dump(criu, workload.pid, room / "images")
        async with open_page_server(Config(room / "images", tls=tls)) as server:
            cuts = random_cuts(criu.frame_size, nr=20, within=SPEC.tree * SPEC.size // 2, down=0.02)
            async with open_link((server.address, server.port), script=cuts) as link:
                await restore_and_verify(criu, link, workload, room, "restoring", our_command(), extra)
                assert link.cuts == 20
