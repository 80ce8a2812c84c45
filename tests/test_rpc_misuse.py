"""Both clients used wrongly, or for what this CRIU cannot do: refused before anything is sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import rpc_clients
from criupy import (
    CriuError,
    CriuTimeout,
    LocalProtocolError,
    OptionError,
)
from criupy.testing.rpc_peer_linux import (
    Exit,
    Expect,
    Hang,
    Notify,
    scripted_worker,
)
from rpc_peers import (
    DONE,
    PID,
    WAYS,
    client_of,
    enter,
    inside,
    raises,
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


async def test_the_mode_of_a_given_descriptor_is_left_alone(kind: str, tmp_path: Path) -> None:
    for blocking in (True, False):
        with scripted_worker(tmp_path, [Expect(), DONE, Exit()]) as (_, sock):
            sock.setblocking(blocking)
            async with rpc_clients.open_client(kind, fd=sock.fileno()) as client:
                await client.call("dump", PID, images_dir=tmp_path)
            assert os.get_blocking(sock.fileno()) is blocking


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
