"""Both clients against a CRIU that hangs or floods: an error in time, or a late success, and nothing left."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from criupy import (
    CriuTimeout,
    LocalProtocolError,
    RemoteProtocolError,
)
from criupy.rpc import _schema_pb2 as schema
from criupy.testing.rpc_peer_linux import (
    DoNotRead,
    Exit,
    Expect,
    Hang,
    Ignore,
    Kill,
    Notify,
    Repeat,
    Reply,
    Script,
    Sleep,
    SpawnChild,
)
from rpc_peers import (
    DONE,
    FAILED,
    HANG,
    PID,
    RESTORED,
    client_of,
    enter,
    note,
    notes,
    raises,
    response,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

# ---- hanging -------------------------------------------------------------------------------------

HANGING: dict[str, Script] = {
    "at once": [Hang()],
    "reads nothing": [DoNotRead()],
    "after the request": [Expect(), Hang()],
    "when told to end": [Ignore(signal.SIGTERM), Expect(), Hang()],
    "after a notification": [Expect(), Notify("pre-dump"), Hang()],
    "while notified": [Expect(), Reply(note()), Hang()],
    "stopped": [Expect(), Kill(signal.SIGSTOP), Hang()],
    "with a child": [Expect(), SpawnChild(keep_socket=True, keep_output=True), Hang()],
    "with a child of a child's": [
        Ignore(signal.SIGTERM),
        SpawnChild(keep_socket=True, keep_output=True),
        SpawnChild(),
        Expect(),
        Notify("pre-dump"),
        Hang(),
    ],
    "floods": [Expect(), Repeat([Notify("pre-dump")])],
    "floods and reads nothing": [Expect(), Repeat([Reply(note())])],
}


#: Where the worker is not ours to end, fewer ways of hanging differ.
IN_SERVICE = ("at once", "after the request", "after a notification", "floods")
HANGING_WAYS = [*(("swrk", case) for case in HANGING), *(("service", case) for case in IN_SERVICE)]


@pytest.mark.parametrize(("way", "case"), HANGING_WAYS)
async def test_a_hanging_peer(kind: str, way: str, case: str, tmp_path: Path) -> None:
    async with client_of(kind, way, tmp_path, HANGING[case], request_timeout=0.2, grace=0.1) as (
        client,
        peer,
    ):
        with pytest.raises((CriuTimeout, RemoteProtocolError)) as caught:
            await client.call("dump", PID, images_dir=tmp_path)
        if isinstance(caught.value, RemoteProtocolError):
            assert case == "floods and reads nothing"
        else:
            assert re.match(r"^dump: (CRIU|the hook for pre-dump) took longer than 0\.2 s", str(caught.value))
            # A notification that comes late is answered by our end, which ends the peer.
            late = any(isinstance(step, (Notify, Repeat)) for step in HANGING[case])
            if way == "swrk" and not late:
                assert "dump: CRIU did not undo it in time and was killed" in notes(caught)
        if way == "swrk":
            peer.wait_ended()


@pytest.mark.parametrize(
    "method",
    [
        "version",
        "feature_check",
        "check",
        "restore",
        "page_server",
        "page_server_child",
        "pre_dump",
        "self_dump",
    ],
)
async def test_every_request_has_its_time(kind: str, tmp_path: Path, method: str) -> None:
    arguments = [PID] if method == "pre_dump" else []
    options: dict[str, Any] = {} if method in {"version", "feature_check"} else {"images_dir": tmp_path}
    async with client_of(kind, "swrk", tmp_path, [Hang()], version=None, grace=0.1) as (client, peer):
        with raises(CriuTimeout, r"^\w+: CRIU took longer than 0\.2 s"):
            await client.call(method, *arguments, request_timeout=0.2, **options)
        peer.wait_ended()


@pytest.mark.parametrize("method", ["dump", "open_dump", "lazy_dump", "loop"])
async def test_the_version_that_is_asked_before_has_that_time_too(
    kind: str, tmp_path: Path, method: str
) -> None:
    """An option of a later CRIU has its version asked first; a loop asks for a feature."""
    async with client_of(kind, "swrk", tmp_path, [Hang()], version=None, grace=0.1) as (client, _):
        with raises(CriuTimeout):
            if method == "dump":
                await client.call("dump", PID, images_dir=tmp_path, request_timeout=0.2, network_lock="skip")
            elif method == "loop":
                async with client.block("pre_dump_loop", PID, request_timeout=0.2) as loop:
                    await client.run(lambda: loop.pre_dump(images_dir=tmp_path))
            else:
                more = {"network_lock": "skip"} if method == "open_dump" else {}
                await enter(client, method, PID, images_dir=tmp_path, request_timeout=0.2, **more)


async def test_a_page_server_that_is_waited_for_too_long(kind: str, tmp_path: Path) -> None:
    script = [
        Expect(schema.PAGE_SERVER_CHLD),
        SpawnChild(),
        Reply(response(schema.PAGE_SERVER, ps=schema.PageServerInfo(port=5, pid=17))),
        Expect(schema.WAIT_PID),
        Hang(),
    ]
    async with client_of(kind, "swrk", tmp_path, script, grace=0.1) as (client, peer):
        child = await client.call("page_server_child", images_dir=tmp_path)
        with raises(CriuTimeout, r"^wait_pid: CRIU took longer than 0\.2 s"):
            await client.run(lambda: child.wait(request_timeout=0.2))
        peer.wait_ended()
        with raises(LocalProtocolError, "page server 17 was waited for or closed before"):
            await client.run(child.wait)


async def test_a_page_server_is_closed_with_its_client(kind: str, tmp_path: Path) -> None:
    script = [
        Expect(schema.PAGE_SERVER_CHLD),
        SpawnChild(),
        Reply(response(schema.PAGE_SERVER, ps=schema.PageServerInfo(port=5, pid=17))),
        Hang(),
    ]
    async with client_of(kind, "swrk", tmp_path, script, grace=0.1) as (client, peer):
        await client.call("page_server_child", images_dir=tmp_path)
        await client.run(client.client.close)
        peer.wait_ended()


@pytest.mark.parametrize(
    ("way", "case"), [(way, case) for way, case in HANGING_WAYS if "reads nothing" not in case]
)
async def test_a_cancelled_request(way: str, case: str, tmp_path: Path) -> None:
    async with client_of("trio", way, tmp_path, HANGING[case], grace=0.1) as (client, peer):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: client.call("dump", PID, images_dir=tmp_path))
                await until(lambda: bool(peer.requests) or case == "at once")
                await trio.sleep(0.05)
                scope.cancel()
        assert scope.cancelled_caught
        if way == "swrk":
            peer.wait_ended()


async def test_a_request_cancelled_before_it_begins(tmp_path: Path) -> None:
    async with client_of("trio", "swrk", tmp_path, [Hang()], version=None, grace=0.1) as (client, peer):
        for method in ("version", "check"):
            with trio.CancelScope() as scope:
                scope.cancel()
                await client.call(method)
            assert scope.cancelled_caught
        assert all(not connection.requests for connection in peer.connections)


# ---- a late success ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["swrk", "fd"])
async def test_success_within_grace(kind: str, way: str, tmp_path: Path) -> None:
    script = [Expect(), Sleep(0.3), DONE, Exit()]
    async with client_of(kind, way, tmp_path, script, request_timeout=0.1, grace=HANG) as (client, peer):
        await client.call("dump", PID, images_dir=tmp_path)
        peer.wait_ended()


async def test_success_within_grace_ends_an_iteration(kind: str, tmp_path: Path) -> None:
    script = [Expect(), Notify("pre-restore"), Sleep(1.2), RESTORED, Exit()]
    async with client_of(kind, "swrk", tmp_path, script, request_timeout=0.7, grace=HANG) as (client, _):
        after = False
        async with client.block("open_restore", images_dir=tmp_path) as operation:
            async for _ in client.notifications(operation):
                pass
            after = True
        assert after
        assert operation.result == 17


async def test_failure_within_grace(kind: str, tmp_path: Path) -> None:
    script = [Expect(), Sleep(0.3), FAILED, Exit()]
    async with client_of(kind, "swrk", tmp_path, script, request_timeout=0.1, grace=HANG) as (client, _):
        with raises(CriuTimeout, r"^dump: CRIU took longer than 0\.1 s$") as caught:
            await client.call("dump", PID, images_dir=tmp_path)
        assert re.match("^CRIU undid it: dump: no way", notes(caught))


async def test_a_timeout_of_another_request_is_not_swallowed(kind: str, tmp_path: Path) -> None:
    script = [Expect(), Notify("pre-dump"), Sleep(0.1), DONE, Exit()]
    async with client_of(kind, "swrk", tmp_path, script, grace=HANG) as (client, _):
        other = CriuTimeout("restore", "elsewhere")
        with raises(CriuTimeout, "^restore: elsewhere$") as caught:
            async with client.block("open_dump", PID, images_dir=tmp_path):
                raise other
        assert caught.value is other
