"""Both clients against a CRIU that hangs or floods: an error in time, or a late success, and nothing left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from criupy import (
    CriuDied,
    CriuTimeout,
    LocalProtocolError,
    OptionError,
    RemoteProtocolError,
    SourceOutcome,
)
from criupy.rpc import _schema_pb2 as schema
from criupy.rpc._async_daemon_linux import AsyncDaemon
from criupy.rpc._exchange_linux import Exchange
from criupy.rpc._lazy_linux import LazyDumpPlan
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
    is_child,
    note,
    notes,
    raises,
    response,
    until,
)
from rpc_victims import sleeper, state_of

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
        Hang(),  # a notification would end a late one, and leave its children to nobody
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


@pytest.mark.parametrize("then", ["wait", "close"])
async def test_a_page_server_whose_wait_was_refused(kind: str, then: str, tmp_path: Path) -> None:
    script = [
        Expect(schema.PAGE_SERVER_CHLD),
        SpawnChild(),
        Reply(response(schema.PAGE_SERVER, ps=schema.PageServerInfo(port=5, pid=17))),
        Expect(schema.WAIT_PID),
        Reply(response(schema.WAIT_PID, status=0)),
    ]
    async with client_of(kind, "swrk", tmp_path, script, grace=0.1) as (client, peer):
        child = await client.call("page_server_child", images_dir=tmp_path)
        with raises(OptionError, "^request_timeout: expected seconds"):
            await client.run(lambda: child.wait(request_timeout=-1))
        if client.is_async and then == "close":
            with trio.CancelScope() as scope:
                scope.cancel()
                await child.wait()
            assert scope.cancelled_caught
        if then == "wait":
            assert await client.run(child.wait) == 0
            assert len(peer.requests) == 2
        else:
            await client.run(child.close)
            peer.wait_ended()


@pytest.mark.parametrize("end", ["close", "wait"])
async def test_a_page_server_that_is_another_process(kind: str, end: str, tmp_path: Path) -> None:
    """The number comes from the peer, which may count in another pid namespace."""
    with sleeper(os.getuid()) as other:
        script = [
            Expect(schema.PAGE_SERVER_CHLD),
            Reply(response(schema.PAGE_SERVER, ps=schema.PageServerInfo(port=5, pid=other.pid))),
            *([Expect(schema.WAIT_PID), Hang()] if end == "wait" else []),
        ]
        async with client_of(kind, "service", tmp_path, script, grace=0.1) as (client, _):
            child = await client.call("page_server_child", images_dir=tmp_path)
            if end == "wait":
                with raises(CriuTimeout):
                    await client.run(lambda: child.wait(request_timeout=0.1))
            await client.run(child.close)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.1)


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
    script = [Expect(), Notify("pre-restore"), Sleep(0.7), RESTORED, Exit()]
    async with client_of(kind, "swrk", tmp_path, script, request_timeout=0.4, grace=HANG) as (client, _):
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


# ---- interrupted ---------------------------------------------------------------------------------


async def test_an_interruption_of_the_undoing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C, say: CRIU is not waited for any longer."""

    def interrupt(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Exchange, "take_undone", interrupt)
    script = [Ignore(signal.SIGTERM), Expect(), Sleep(0.3), FAILED, Hang()]
    async with client_of(kind, "swrk", tmp_path, script, request_timeout=0.1, grace=HANG) as (client, peer):
        with raises(ZeroDivisionError):
            await client.call("dump", PID, images_dir=tmp_path)
        peer.wait_ended()


#: A daemon that is ready at once, and ends a little later.
DAEMON = """
import os, sys, time
fd = int(sys.argv[sys.argv.index("--status-fd") + 1])
os.write(fd, b"\\0")
os.close(fd)
time.sleep(0.3)
"""


async def test_an_interruption_while_the_daemon_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = AsyncDaemon.wait
    interruptions = [KeyboardInterrupt()]

    async def interrupted_once(daemon: AsyncDaemon) -> None:
        if interruptions:
            raise interruptions.pop()
        await wait(daemon)

    monkeypatch.setattr(AsyncDaemon, "wait", interrupted_once)
    daemon = [sys.executable, "-I", "-S", "-c", DAEMON]
    async with client_of("trio", "swrk", tmp_path, [Expect(), RESTORED, Exit()]) as (client, _):
        with raises(KeyboardInterrupt):
            async with client.block("lazy_restore", images_dir=tmp_path, daemon=daemon) as restored:
                assert restored.daemon.poll() is None
        assert restored.daemon.poll() == 0


# ---- a lazy dump ---------------------------------------------------------------------------------

SERVING: Script = [Expect(schema.DUMP), Notify("pre-dump"), Notify("post-dump"), Notify("status-ready")]


@pytest.mark.parametrize("way", ["swrk", "service"])
async def test_nonsense_while_pages_are_served(kind: str, way: str, tmp_path: Path) -> None:
    script = [*SERVING, Reply(b"\xff\xff\xff"), Hang()]
    with sleeper(os.getuid()) as victim:
        async with client_of(kind, way, tmp_path, script, grace=0.1) as (client, peer):
            with raises(RemoteProtocolError) as caught:
                async with client.block("lazy_dump", victim.pid, images_dir=tmp_path, port=5) as source:
                    pass
            assert source.outcome is SourceOutcome.RESUMED
            assert "the dumped process: resumed" in notes(caught)
            if way == "swrk":
                (pid,) = (connection.pid for connection in peer.connections if connection.requests)
                assert not is_child(pid)


async def test_an_abort_when_the_worker_of_a_service_is_gone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pid may be another's by then."""

    def refuse(pid: int, flags: int = 0) -> int:
        raise AssertionError(pid, flags)

    with sleeper(os.getuid()) as victim:
        async with client_of(kind, "service", tmp_path, [*SERVING, Exit()], grace=0.1) as (client, peer):
            async with client.block("lazy_dump", victim.pid, images_dir=tmp_path, port=5) as source:
                (pid,) = (connection.pid for connection in peer.connections if connection.requests)
                await until(lambda: state_of(pid) in {None, "Z"})
                with monkeypatch.context() as patch:
                    patch.setattr(os, "pidfd_open", refuse)
                    assert await client.run(source.abort) is SourceOutcome.RESUMED
            assert source.outcome is SourceOutcome.RESUMED
            assert victim.poll() is None


async def test_an_abort_when_the_task_that_waits_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = LazyDumpPlan.stop
    waiting = trio.CancelScope()

    def cancel_and_stop(plan: LazyDumpPlan, address: str, port: int) -> None:
        trio.from_thread.run_sync(waiting.cancel)
        trio.from_thread.run(trio.testing.wait_all_tasks_blocked)
        stop(plan, address, port)

    async def wait(source: Any) -> None:
        with waiting:
            await source.wait()

    monkeypatch.setattr(LazyDumpPlan, "stop", cancel_and_stop)
    with sleeper(os.getuid()) as victim:
        async with client_of("trio", "service", tmp_path, [*SERVING, Hang()], grace=5) as (client, _):
            async with (
                client.block("lazy_dump", victim.pid, images_dir=tmp_path, port=5) as source,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(wait, source)
                await trio.testing.wait_all_tasks_blocked(0.1)
                with trio.fail_after(10):
                    assert await source.abort() is SourceOutcome.RESUMED
            assert waiting.cancelled_caught
            assert source.outcome is SourceOutcome.RESUMED


async def test_an_abort_that_nothing_comes_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another task waits, as without it, CRIU has its time to end, and can be told again."""

    async def wait(source: Any) -> None:
        with raises(CriuDied, "^lazy_dump: "):
            await source.wait()

    script = [*SERVING, Hang()]
    async with (
        client_of("trio", "service", tmp_path, script, grace=0.5) as (client, _),
        client.block("lazy_dump", PID, images_dir=tmp_path, port=5) as source,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(wait, source)
        await trio.testing.wait_all_tasks_blocked(0.1)
        with monkeypatch.context() as patch:
            patch.setattr(LazyDumpPlan, "stop", lambda *_: None)
            with raises(CriuTimeout, "^lazy_dump: CRIU was not seen to end - look whether"):
                await source.abort()
        assert source.outcome is None
        assert await source.abort() is SourceOutcome.RESUMED
