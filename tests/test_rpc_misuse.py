"""Both clients used wrongly, or for what this CRIU cannot do: refused before anything is sent."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import rpc_clients
from criupy import (
    CriuError,
    CriuTimeout,
    LocalProtocolError,
    OptionError,
)
from criupy.rpc import _schema_pb2 as schema
from criupy.testing.rpc_peer_linux import (
    Exit,
    Expect,
    Hang,
    Notify,
    Reply,
    scripted_worker,
)
from rpc_peers import (
    DONE,
    PID,
    RESTORED,
    WAYS,
    client_of,
    enter,
    inside,
    raises,
    response,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")

# ---- used wrongly --------------------------------------------------------------------------------


async def test_an_operation_used_before_it_is_entered(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path, [Expect(), DONE, Exit()]) as (client, peer):
        operation = getattr(client.client, "open_dump")(PID, images_dir=tmp_path)  # noqa: B009
        with raises(LocalProtocolError, "^dump: enter the block first$"):
            assert operation.result
        with raises(LocalProtocolError, "^dump: enter the block first$"):
            async for _ in client.notifications(operation):
                pass
        assert peer.connections == []
        await inside(client, operation)
        assert operation.result is None


async def test_an_operation_entered_twice(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path, [Expect(), DONE, Exit()]) as (client, peer):
        operation = getattr(client.client, "open_dump")(PID, images_dir=tmp_path)  # noqa: B009
        await inside(client, operation)
        with raises(LocalProtocolError, "^dump: the block can be entered once$"):
            await inside(client, operation)
        assert operation.result is None
        assert len(peer.connections) == 1


async def test_an_operation_used_after_it_failed(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path, [Expect(), Hang()], request_timeout=0.2, grace=0.1) as (
        client,
        _,
    ):
        operation = getattr(client.client, "open_dump")(PID, images_dir=tmp_path)  # noqa: B009
        with raises(CriuTimeout):
            await inside(client, operation)
        async for _ in client.notifications(operation):
            pytest.fail("it is over")
        with raises(LocalProtocolError, "^dump: it is not answered yet$"):
            assert operation.result


async def test_a_loop_used_before_it_is_entered(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path) as (client, peer):
        loop = getattr(client.client, "pre_dump_loop")(PID)  # noqa: B009
        for _ in range(2):
            for use in (loop.pre_dump, loop.dump):
                with raises(LocalProtocolError, "^pre_dump_loop: enter the block first$"):
                    await client.run(lambda: use(images_dir=tmp_path))  # noqa: B023
            await inside(client, loop)
        assert peer.connections == []


async def test_a_client_used_after_it_was_closed(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path) as (client, peer):
        await client.call("version")
        for _ in range(2):
            await client.run(client.client.close)
        peer.wait_ended()
        for method in ("version", "feature_check", "check"):
            with raises(LocalProtocolError, f"^{method}: the client is closed$"):
                await client.call(method)
        with raises(LocalProtocolError, "^dump: the client is closed$"):
            await client.call("dump", PID, images_dir=tmp_path)
        with raises(LocalProtocolError, "^restore: the client is closed$"):
            await enter(client, "open_restore", images_dir=tmp_path)
        with raises(LocalProtocolError, "^feature_check: the client is closed$"):
            async with client.block("pre_dump_loop", PID) as loop:
                await client.run(lambda: loop.pre_dump(images_dir=tmp_path))
        assert len(peer.connections) == 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_closed_while_an_operation_runs(kind: str, way: str, tmp_path: Path) -> None:
    script = [Expect(), Notify("pre-dump"), DONE, Exit()]
    async with client_of(kind, way, tmp_path, script) as (client, _):
        async with client.block("open_dump", PID, images_dir=tmp_path) as operation:
            await client.run(client.client.close)
        assert operation.result is None


async def test_a_descriptor_that_criu_has_ended(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "fd", tmp_path, [Expect(), DONE, Exit()]) as (client, _):
        await client.call("version")
        await client.call("dump", PID, images_dir=tmp_path)
        with raises(LocalProtocolError, r"^dump: the connection of fd=\d+ is in use, or CRIU has ended it$"):
            await client.call("dump", PID, images_dir=tmp_path)
        with raises(
            LocalProtocolError, r"^version: the connection of fd=\d+ is in use, or CRIU has ended it$"
        ):
            await client.call("version")


async def test_a_descriptor_in_use(kind: str, tmp_path: Path) -> None:
    script = [Expect(), Notify("pre-dump"), DONE, Exit()]
    async with (
        client_of(kind, "fd", tmp_path, script) as (client, _),
        client.block("open_dump", PID, images_dir=tmp_path),
    ):
        with raises(LocalProtocolError, r"^version: the connection of fd=\d+ is in use, or CRIU"):
            await client.call("version")


@contextlib.contextmanager
def default_timeout(seconds: float | None) -> Iterator[None]:
    """With it Python makes every new socket one that does not block."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@pytest.mark.parametrize("default", [None, 5])
async def test_the_mode_of_a_given_descriptor_is_left_alone(
    kind: str, tmp_path: Path, default: float | None
) -> None:
    for blocking in (True, False):
        with scripted_worker(tmp_path, [Expect(), DONE, Exit()]) as (_, sock):
            sock.setblocking(blocking)
            with default_timeout(default):
                async with rpc_clients.open_client(kind, fd=sock.fileno()) as client:
                    assert os.get_blocking(sock.fileno()) is blocking
                    await client.call("dump", PID, images_dir=tmp_path)
            assert os.get_blocking(sock.fileno()) is blocking


@pytest.mark.parametrize("way", ["swrk", "service"])
async def test_pythons_default_timeout_of_sockets(kind: str, way: str, tmp_path: Path) -> None:
    script = [Expect(schema.DUMP), Notify("pre-dump"), DONE, Exit()]
    async with client_of(kind, way, tmp_path, script) as (client, _):
        with default_timeout(5):
            await client.call("dump", PID, images_dir=tmp_path)


# ---- what this CRIU cannot do --------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
async def test_an_option_of_a_later_criu(kind: str, way: str, tmp_path: Path) -> None:
    async with client_of(kind, way, tmp_path, [Expect()], version=(3, 18, 0)) as (client, peer):
        with raises(OptionError, r"^network_lock: CRIU 3\.19 or newer is needed, this is 3\.18$"):
            await client.call("dump", PID, images_dir=tmp_path, network_lock="skip")
        with raises(OptionError, r"^leave_stopped: CRIU 3\.19 or newer is needed, this is 3\.18$"):
            await enter(client, "open_dump", PID, images_dir=tmp_path, leave_stopped=True)
        assert peer.requests == []


async def test_an_option_of_this_criu(kind: str, tmp_path: Path) -> None:
    script = [Expect(), DONE, Exit()]
    async with client_of(kind, "swrk", tmp_path, script, version=(3, 19)) as (client, peer):
        await client.call("dump", PID, images_dir=tmp_path, network_lock="skip")
        (request,) = peer.requests
        assert request.opts.network_lock == 3  # SKIP


async def test_options_that_a_service_cannot_take(kind: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        async with client_of(kind, "service", tmp_path) as (client, peer):
            for options, name in (
                ({"inherit_fd": {"pipe:[5]": reading}}, "inherit_fd"),
                ({"rst_sibling": True}, "rst_sibling"),
            ):
                with raises(OptionError, f"^{name}: CRIU takes it only from a worker of one's own"):
                    await client.call("restore", images_dir=tmp_path, **options)
            assert peer.connections == []
    finally:
        os.close(reading)
        os.close(writing)


async def test_a_lazy_dump_of_an_old_criu(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path, version=(3, 14)) as (client, peer):
        with raises(CriuError, r"^lazy_dump: CRIU 3\.15 or newer is needed, this is 3\.14"):
            await enter(client, "lazy_dump", PID, images_dir=tmp_path)
        assert peer.requests == []


@pytest.mark.parametrize("daemon", [("criu", "lazy-pages"), None])
async def test_tls_without_a_page_server(kind: str, tmp_path: Path, daemon: object) -> None:
    async with client_of(kind, "swrk", tmp_path) as (client, peer):
        with raises(OptionError, "^tls: expected together with page_server"):
            await enter(client, "lazy_restore", images_dir=tmp_path, daemon=daemon, tls=True)
        assert peer.requests == []


#: A daemon that keeps its words, and is ready.
DAEMON = """
import os, sys
open("words", "w").write(" ".join(sys.argv[1:]))
os.write(int(sys.argv[sys.argv.index("--status-fd") + 1]), b"\\0")
"""


async def test_tls_is_told_to_the_daemon_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CRIU that was built without it refuses it, whatever the request."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pem").touch()
    options = {"tls": True, "tls_cacert": "a.pem", "tls_key": Path("a.pem"), "tls_no_cn_verify": True}
    daemon = [sys.executable, "-I", "-S", "-c", DAEMON]
    async with client_of(kind, "swrk", tmp_path, [Expect(), RESTORED, Exit()]) as (client, peer):
        async with client.block(
            "lazy_restore",
            images_dir=tmp_path,
            daemon=daemon,
            page_server=("host", 7),
            tls_cert=None,
            **options,
        ):
            pass
        (request,) = peer.requests
    assert request.opts.lazy_pages
    assert not [field.name for field, _ in request.opts.ListFields() if field.name.startswith("tls")]
    pem = tmp_path / "a.pem"
    words = (tmp_path / "words").read_text()
    assert words.partition(" --page-server ")[2] == (
        f"--address host --port 7 --tls --tls-cacert {pem} --tls-key {pem} --tls-no-cn-verify"
    )


async def test_descriptors_for_a_worker_that_runs_already(kind: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        async with client_of(kind, "fd", tmp_path, []) as (client, peer):
            with raises(OptionError, "^inherit_fd: expected with a worker of one's own"):
                await client.call("restore", images_dir=tmp_path, inherit_fd={"pipe:[5]": reading})
            assert peer.requests == []
    finally:
        os.close(reading)
        os.close(writing)


async def test_a_configuration_file_that_is_no_path(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path) as (client, peer):
        for wrong in (5, True, ["criu.conf"]):
            with raises(OptionError, "^config_file: expected "):
                await enter(client, "lazy_dump", PID, images_dir=tmp_path, config_file=wrong)
        assert peer.requests == []


# ---- a loop of pre-dumps -------------------------------------------------------------------------

FEATURES = [
    Expect(schema.FEATURE_CHECK),
    Reply(response(schema.FEATURE_CHECK, features=schema.FeatureSet(mem_track=True))),
]
PRE_DUMP = [Expect(schema.PRE_DUMP), Reply(response(schema.PRE_DUMP))]


async def test_every_request_of_a_loop_is_checked(kind: str, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    asked = [*FEATURES, *FEATURES]  # a first request that is refused begins no loop
    script = [*PRE_DUMP, *PRE_DUMP, Expect(schema.DUMP), DONE, Exit()]
    with ours, theirs:
        async with client_of(kind, "swrk", tmp_path, asked, script) as (client, peer):
            async with client.block("pre_dump_loop", PID) as loop:
                for name, method in (("1", loop.pre_dump), ("2", loop.pre_dump), ("3", loop.dump)):
                    (tmp_path / name).mkdir()
                    call = partial(method, images_dir=tmp_path / name)
                    with raises(OptionError, r"^image_io_mode: CRIU 4\.3 or newer is needed"):
                        await client.run(partial(call, image_io_mode="direct"))
                    if name != "1":
                        with raises(OptionError, "^ps_socket: expected with the first request of a loop"):
                            await client.run(partial(call, ps_socket=ours))
                    await client.run(call)
            assert len(peer.requests) == 5


async def test_a_loop_over_a_given_descriptor(kind: str, tmp_path: Path) -> None:
    script = [*FEATURES, *PRE_DUMP, *PRE_DUMP, Expect(schema.DUMP), DONE, Exit()]
    async with (
        client_of(kind, "fd", tmp_path, script, version=(4, 3)) as (client, peer),
        client.block("pre_dump_loop", PID) as loop,
    ):
        for name, method in (("1", loop.pre_dump), ("2", loop.pre_dump), ("3", loop.dump)):
            (tmp_path / name).mkdir()
            await client.run(partial(method, images_dir=tmp_path / name, image_io_mode="direct"))
        assert len(peer.requests) == 4
