"""TLS with stock CRIU at the other end, in both directions: GnuTLS there, OpenSSL here."""

from __future__ import annotations

from pathlib import Path

import pytest

from criupy.page_server import Config, Ending, open_page_server
from criupy.testing.certificates import Certificates
from criupy.testing.control_linux import Order
from criupy.testing.criu_linux import (
    Criu,
    dump,
    lazy_pages_daemon,
    our_command,
    page_server,
    restore,
    stock_command,
)
from criupy.testing.spec import WorkloadSpec
from criupy.testing.workload_linux import start_workload
from migrating import MIB, Migration, migrate
from test_tls_key_updates import wear_out

pytestmark = [pytest.mark.criu, pytest.mark.spread, pytest.mark.usefixtures("workload_program")]

SPEC = WorkloadSpec(size=24 * MIB, areas=3, tree=2)


async def failure(m: Migration) -> str:
    """Wait for the daemon's failure, which the source survives; return the log.

    criu restore asks nobody whether it may finish, so that it may have done so
    before a source that looks at certificates late has said what it thinks of ours.
    Then its tasks are killed, because the source goes on.
    """
    ended = await m.daemon.wait()
    assert ended.code == 1
    if (await m.restored.job.wait()).code == 0:
        assert "the tasks were killed" in m.log
        assert (await m.restored.task_ended()).signal == 9
    assert "a live source goes on" in m.log
    assert (await m.dump.job.wait()).code == 1
    assert await m.source.is_running()
    return m.log


async def test_a_live_source(criu: Criu, room: Path, certificates: Certificates) -> None:
    async with migrate(
        criu,
        SPEC,
        room,
        dump_extra=certificates.options("server", revocations=True),
        daemon_extra=certificates.options("client", revocations=True),
    ) as m:
        await m.restored.finished()
        await m.ends_well()
        await m.verify_all()
        assert "by TLSv1.3" in m.log


async def test_an_abort_lets_a_live_source_go_on(criu: Criu, room: Path, certificates: Certificates) -> None:
    """The daemon is linked to the source when the restore fails."""
    async with migrate(
        criu,
        SPEC,
        room,
        dump_extra=certificates.options("server"),
        daemon_extra=certificates.options("client"),
        restore_extra=["--action-script", "/bin/false"],
    ) as m:
        assert "by TLSv1.3" in await failure(m)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("stranger", "client", "is not signed by a CA that is trusted here"),
        ("expired", "client", "has expired on 2"),
        ("elsewhere", "client", "its certificate is for DNS:elsewhere.example"),
        ("server", "stranger", "as CRIU does with a certificate that it does not accept"),
        ("server", "elsewhere", "as CRIU does with a certificate that it does not accept"),
    ],
)
async def test_a_live_source_and_a_wrong_certificate(
    criu: Criu, room: Path, certificates: Certificates, theirs: str, ours: str, said: str
) -> None:
    async with migrate(
        criu,
        SPEC,
        room,
        dump_extra=certificates.options(theirs),
        daemon_extra=certificates.options(ours),
    ) as m:
        assert said in await failure(m)


async def test_only_the_source_has_tls(criu: Criu, room: Path, certificates: Certificates) -> None:
    async with migrate(criu, SPEC, room, dump_extra=certificates.options("server")) as m:
        assert "the page server wants TLS: see --tls" in await failure(m)


async def test_only_the_destination_has_tls(criu: Criu, room: Path, certificates: Certificates) -> None:
    async with migrate(criu, SPEC, room, daemon_extra=certificates.options("client")) as m:
        assert "was it told to use TLS (--tls)?" in await failure(m)


@pytest.mark.parametrize("verify_name", [True, False])
async def test_a_stock_page_server(
    criu: Criu, room: Path, certificates: Certificates, verify_name: bool
) -> None:
    images, work = room / "images", room / "work"
    names = ("server", "client") if verify_name else ("elsewhere", "elsewhere")
    theirs, ours = (certificates.options(name, verify_name=verify_name) for name in names)
    async with start_workload(SPEC, room) as source:
        await dump(criu, source.pid, images)
        control = source.control.copy(room / "restored.control")
        async with (
            page_server(criu, images, work, extra=theirs) as pages,
            lazy_pages_daemon(
                our_command(),
                images,
                work,
                source=(pages.address, pages.port),
                extra=[*ours, "--frame", str(criu.frame_size)],
            ) as daemon,
            restore(criu, images, work, source.pid, binds={source.control.path: control.path}) as restored,
        ):
            control.gone = restored.gone
            await restored.finished()
            await daemon.succeed()
            await pages.job.succeed()
            for task in range(SPEC.tree):
                assert (await control.worker(task).verify()).is_good
        control.close()


@pytest.mark.parametrize("verify_name", [True, False])
async def test_a_stock_daemon(criu: Criu, room: Path, certificates: Certificates, verify_name: bool) -> None:
    images, work = room / "images", room / "work"
    ours, theirs = ("server", "client") if verify_name else ("elsewhere", "elsewhere")
    async with start_workload(SPEC, room) as source:
        await dump(criu, source.pid, images)
        control = source.control.copy(room / "restored.control")
        config = Config(images, once=True, tls=certificates.files(ours, verify_name=verify_name))
        async with (
            open_page_server(config) as server,
            lazy_pages_daemon(
                stock_command(criu),
                images,
                work,
                source=(server.address, server.port),
                extra=certificates.options(theirs, verify_name=verify_name),
            ) as daemon,
            restore(criu, images, work, source.pid, binds={source.control.path: control.path}) as restored,
        ):
            control.gone = restored.gone
            for task in range(SPEC.tree):
                control.worker(task).start_touching(Order.RANDOM, count=500)
            await restored.finished()
            await daemon.succeed()
            await server.wait()
            assert server.last is not None
            assert server.last.ending is Ending.CLOSED
            for task in range(SPEC.tree):
                assert (await control.worker(task).wait()).is_good
                assert (await control.worker(task).verify()).is_good
        control.close()


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("server", "stranger", "is not signed by a CA that is trusted here"),
        ("server", "elsewhere", "is for DNS:elsewhere.example"),
        ("stranger", "client", "it ended the TLS session right after the handshake"),
        ("server", None, "was not told to use it"),
        (None, "client", "speaks TLS"),
    ],
)
async def test_a_stock_daemon_and_a_refusal(
    criu: Criu,
    room: Path,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
    ours: str | None,
    theirs: str | None,
    said: str,
) -> None:
    images, work = room / "images", room / "work"
    async with start_workload(SPEC, room) as source:
        await dump(criu, source.pid, images)
        tls = None if ours is None else certificates.files(ours)
        async with open_page_server(Config(images, tls=tls)) as server:
            extra = [] if theirs is None else certificates.options(theirs)
            where = (server.address, server.port)
            async with (
                lazy_pages_daemon(stock_command(criu), images, work, source=where, extra=extra) as daemon,
                restore(criu, images, work, source.pid) as restored,
            ):
                assert (await daemon.wait()).code == 1
                await restored.job.wait()  # a stock daemon's failure need not be one for it
            server.stop()
            await server.wait()
    assert said in caplog.text


async def test_new_keys_for_a_stock_daemon(
    criu: Criu, room: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few: of more than 8 a second GnuTLS says that they are too many."""
    wear_out(monkeypatch, SPEC.size * SPEC.tree // 5)
    images, work = room / "images", room / "work"
    async with start_workload(SPEC, room) as source:
        await dump(criu, source.pid, images)
        control = source.control.copy(room / "restored.control")
        async with (
            open_page_server(Config(images, once=True, tls=certificates.files("server"))) as server,
            lazy_pages_daemon(
                stock_command(criu),
                images,
                work,
                source=(server.address, server.port),
                extra=certificates.options("client"),
            ) as daemon,
            restore(criu, images, work, source.pid, binds={source.control.path: control.path}) as restored,
        ):
            control.gone = restored.gone
            await restored.finished()
            await daemon.succeed()
            await server.wait()
            for task in range(SPEC.tree):
                assert (await control.worker(task).verify()).is_good
        control.close()
