"""Hooks that fail, iterations that are left, and the terminal of a notification, with both clients."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import trio

from criupy import (
    AsyncHooks,
    CriuTimeout,
    Hooks,
    LocalProtocolError,
    OptionError,
)
from criupy.rpc import Descriptor, Refused
from criupy.rpc import _schema_pb2 as schema
from criupy.testing.rpc_peer_linux import (
    Exit,
    Expect,
    Hang,
    Kill,
    Notify,
    Reply,
    Script,
    Sleep,
    Step,
)
from rpc_clients import Recorder
from rpc_peers import (
    DONE,
    FAILED,
    HANG,
    PID,
    RESTORED,
    WAYS,
    client_of,
    descriptors,
    enter,
    note,
    notes,
    raises,
    response,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

# ---- hooks and iterations ------------------------------------------------------------------------

REFUSABLE: Script = [Expect(), Notify("pre-dump", refused=[FAILED, Exit()]), DONE, Exit()]


@pytest.mark.parametrize("way", WAYS)
async def test_a_hook_that_raises(kind: str, way: str, tmp_path: Path) -> None:
    def act() -> None:
        raise ZeroDivisionError("in the hook")

    async with client_of(kind, way, tmp_path, REFUSABLE) as (client, peer):
        with raises(ZeroDivisionError, "^in the hook$") as caught:
            await client.call("dump", PID, images_dir=tmp_path, hooks=Recorder({"pre-dump": act}))
        assert notes(caught).startswith("CRIU undid it: dump: no way")
        assert [answer.notify_success for answer in peer.answers] == [False]


async def test_a_hook_that_raises_too_late(kind: str, tmp_path: Path) -> None:
    def act() -> None:
        raise ZeroDivisionError

    script = [Expect(), Notify("post-resume"), RESTORED, Exit()]
    async with client_of(kind, "swrk", tmp_path, script) as (client, _):
        with raises(ZeroDivisionError) as caught:
            await client.call("restore", images_dir=tmp_path, hooks=Recorder({"post-resume": act}))
        assert "completed it as pid 17" in notes(caught)


async def test_a_hook_that_returns_something_else(kind: str, tmp_path: Path) -> None:
    wrong: list[Any] = ["a string", b"bytes", 5, [5], ["a", None], True, {"a": 1}.items()]
    script = [Expect(), Notify("query-ext-files", refused=[FAILED, Exit()]), DONE, Exit()]
    async with client_of(kind, "service", tmp_path, *[script] * len(wrong)) as (client, _):
        for value in wrong:
            with raises(TypeError, r"^query_ext_files: expected a sequence of strings, got "):
                await client.call("dump", PID, images_dir=tmp_path, hooks=Recorder(external=value))


async def test_a_hook_that_returns_what_it_may(kind: str, tmp_path: Path) -> None:
    right: list[Any] = [None, [], (), ["mnt[/a]:a"], ("mnt[/a]:a", "mnt[/b]:b")]
    script = [Expect(), Notify("query-ext-files"), DONE, Exit()]
    async with client_of(kind, "service", tmp_path, *[script] * len(right)) as (client, peer):
        for value in right:
            await client.call("dump", PID, images_dir=tmp_path, hooks=Recorder(external=value))
            assert list(peer.answers[-1].opts.external) == list(value or ())


async def test_hooks_of_the_other_client(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path) as (client, peer):
        wrong: Sequence[Any] = (Hooks() if kind == "trio" else AsyncHooks(), Hooks, AsyncHooks, print, "x", 0)
        for hooks in wrong:
            for method, arguments in (
                ("dump", [PID]),
                ("restore", []),
                ("lazy_dump", [PID]),
                ("lazy_restore", []),
            ):
                with raises(OptionError, "^hooks: expected an instance of a subclass of (Async)?Hooks, got"):
                    if method.startswith("lazy"):
                        await enter(client, method, *arguments, images_dir=tmp_path, hooks=hooks)
                    else:
                        await client.call(method, *arguments, images_dir=tmp_path, hooks=hooks)
            with raises(OptionError, "^hooks: expected"):
                async with client.block("pre_dump_loop", PID) as loop:
                    await client.run(lambda: loop.dump(images_dir=tmp_path, hooks=hooks))  # noqa: B023
        assert peer.connections == []


async def test_a_hook_that_is_not_async(tmp_path: Path) -> None:
    class Sync(AsyncHooks):
        def pre_dump(self) -> None:  # type: ignore[override]
            pass

    async with client_of("trio", "swrk", tmp_path, REFUSABLE) as (client, _):
        with raises(TypeError):
            await client.call("dump", PID, images_dir=tmp_path, hooks=Sync())


async def test_a_hook_that_never_returns(tmp_path: Path) -> None:
    class Stuck(AsyncHooks):
        async def pre_dump(self) -> None:
            await trio.sleep_forever()

    async with client_of("trio", "swrk", tmp_path, REFUSABLE, request_timeout=1.0) as (client, peer):
        with raises(CriuTimeout, r"^dump: the hook for pre-dump took longer than 1 s") as caught:
            await client.call("dump", PID, images_dir=tmp_path, hooks=Stuck())
        assert notes(caught).startswith("CRIU undid it: dump: no way")
        assert [answer.notify_success for answer in peer.answers] == [False]


async def test_a_hook_that_takes_too_long(tmp_path: Path) -> None:
    class Slow(Hooks):
        def pre_dump(self) -> None:
            time.sleep(0.4)

    script = [Expect(), Notify("pre-dump"), Hang()]
    async with client_of("blocking", "swrk", tmp_path, script, request_timeout=0.2, grace=0.1) as (client, _):
        with raises(CriuTimeout, r"^dump: the hook for pre-dump took longer than 0\.2 s"):
            await client.call("dump", PID, images_dir=tmp_path, hooks=Slow())


async def test_a_hook_is_cancelled(tmp_path: Path) -> None:
    class Stuck(AsyncHooks):
        async def pre_dump(self) -> None:
            scope.cancel()
            await trio.sleep_forever()

    async with client_of("trio", "swrk", tmp_path, REFUSABLE) as (client, peer):
        with trio.CancelScope() as scope:
            await client.call("dump", PID, images_dir=tmp_path, hooks=Stuck())
        assert scope.cancelled_caught
        assert [answer.notify_success for answer in peer.answers] == [False]


@pytest.mark.parametrize("way", WAYS)
async def test_refusing_in_an_iteration(kind: str, way: str, tmp_path: Path) -> None:
    async with client_of(kind, way, tmp_path, REFUSABLE) as (client, peer):
        with raises(Refused, "^pre-dump was refused: not now$") as caught:
            async with client.block("open_dump", PID, images_dir=tmp_path) as operation:
                async for notification in client.notifications(operation):
                    notification.refuse("not now")
        assert notes(caught).startswith("CRIU undid it: dump: no way")
        assert [answer.notify_success for answer in peer.answers] == [False]


async def test_a_refusal_after_which_criu_dies(kind: str, tmp_path: Path) -> None:
    script = [Expect(), Notify("pre-dump", refused=[Exit(1)])]
    async with client_of(kind, "swrk", tmp_path, script) as (client, _):
        with raises(Refused, "^pre-dump was refused: not now$"):
            async with client.block("open_dump", PID, images_dir=tmp_path) as operation:
                async for notification in client.notifications(operation):
                    notification.refuse("not now")


@pytest.mark.parametrize(("end", "how"), [(Kill(signal.SIGSEGV), "signal 11"), (Exit(1), "exit status 1")])
async def test_a_refusal_that_criu_does_not_answer(kind: str, tmp_path: Path, end: Step, how: str) -> None:
    """It may not have undone it."""

    def act() -> None:
        raise ZeroDivisionError

    script = [Expect(), Notify("pre-restore", refused=[end])]
    async with client_of(kind, "swrk", tmp_path, script) as (client, _):
        with raises(ZeroDivisionError) as caught:
            await client.call("restore", images_dir=tmp_path, hooks=Recorder({"pre-restore": act}))
        assert notes(caught) == (
            f"restore: CRIU closed the connection without an answer and ended with {how}"
        )


async def test_a_refused_restore_that_says_no_pid(kind: str, tmp_path: Path) -> None:
    def act() -> None:
        raise ZeroDivisionError

    answer = Reply(response(schema.RESTORE, restore=schema.RestoreAnswer(pid=0)))
    script = [Expect(), Notify("pre-restore"), answer, Hang()]
    async with client_of(kind, "swrk", tmp_path, script, grace=0.1) as (client, _):
        with raises(ZeroDivisionError) as caught:
            await client.call("restore", images_dir=tmp_path, hooks=Recorder({"pre-restore": act}))
        assert notes(caught) == "restore: CRIU had gone too far to undo it, and completed it"


async def test_leaving_an_iteration_accepts_what_is_left(kind: str, tmp_path: Path) -> None:
    script = [Expect(), Notify("pre-dump"), Notify("query-ext-files"), Notify("post-dump"), DONE, Exit()]
    async with client_of(kind, "swrk", tmp_path, script) as (client, peer):
        async with (
            client.block("open_dump", PID, images_dir=tmp_path) as operation,
            aclosing(client.notifications(operation)) as notifications,
        ):
            async for notification in notifications:
                assert notification.script == "pre-dump"
                break
        assert operation.result is None
        assert [answer.notify_success for answer in peer.answers] == [True] * 3


async def test_a_block_without_an_iteration(kind: str, tmp_path: Path) -> None:
    script = [Expect(), Notify("pre-restore"), RESTORED, Exit()]
    async with client_of(kind, "swrk", tmp_path, script) as (client, _):
        async with client.block("open_restore", images_dir=tmp_path) as operation:
            with raises(LocalProtocolError, "^restore: it is not answered yet$"):
                assert operation.result
        assert operation.result == 17


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
async def test_an_exception_in_the_block(kind: str, error: type[BaseException], tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path, REFUSABLE) as (client, peer):
        with raises(error) as caught:
            async with (
                client.block("open_dump", PID, images_dir=tmp_path) as operation,
                aclosing(client.notifications(operation)) as notifications,
            ):
                async for _ in notifications:
                    raise error
        assert notes(caught).startswith("CRIU undid it: dump: no way")
        assert [answer.notify_success for answer in peer.answers] == [False]


async def test_an_exception_in_the_block_before_any_notification(kind: str, tmp_path: Path) -> None:
    script = [Expect(), Hang()]
    async with client_of(kind, "swrk", tmp_path, script, grace=0.1) as (client, peer):
        with raises(ZeroDivisionError) as caught:
            async with client.block("open_dump", PID, images_dir=tmp_path):
                raise ZeroDivisionError
        assert notes(caught) == "dump: CRIU did not undo it in time and was killed"
        peer.wait_ended()


# ---- a terminal ----------------------------------------------------------------------------------

NOT_RESTORED = [Reply(response(schema.RESTORE, success=False)), Exit()]
MASTER = Notify("orphan-pts-master", descriptors=["/dev/ptmx"], refused=NOT_RESTORED)
TERMINAL: Script = [Expect(), MASTER, RESTORED, Exit()]


async def test_a_terminal_that_nobody_takes(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path, TERMINAL) as (client, peer):
        with raises(Refused, "^orphan-pts-master was refused: nobody took the terminal's master"):
            await client.call("restore", images_dir=tmp_path)
        assert [answer.notify_success for answer in peer.answers] == [False]
        assert not any("ptmx" in name for name in descriptors())


async def test_a_terminal_that_is_taken(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path, TERMINAL) as (client, _):
        recorder = Recorder()
        await client.call("restore", images_dir=tmp_path, hooks=recorder)
        assert recorder.master is not None
        with recorder.master as master:
            assert os.isatty(master.fileno())
            assert not os.get_inheritable(master.fileno())
            assert os.ttyname(master.fileno()).startswith("/dev/")


async def test_a_terminal_that_is_taken_in_an_iteration(kind: str, tmp_path: Path) -> None:
    async with client_of(kind, "swrk", tmp_path, TERMINAL) as (client, _):
        held: list[Descriptor] = []
        async with (
            client.block("open_restore", images_dir=tmp_path) as operation,
            aclosing(client.notifications(operation)) as notifications,
        ):
            async for notification in notifications:
                assert notification.descriptor is not None
                held.append(Descriptor(notification.descriptor.detach()))
        (master,) = held
        with master:
            assert os.isatty(master.fileno())
        assert operation.result == 17


@pytest.mark.parametrize("fail", ["raise", "refuse", "time"])
async def test_a_terminal_of_a_restore_that_fails(kind: str, tmp_path: Path, fail: str) -> None:
    master = Notify(MASTER.script, descriptors=MASTER.descriptors) if fail == "time" else MASTER
    script = [Expect(), master, Hang()]
    limit: dict[str, Any] = {"request_timeout": 0.3, "grace": 0.1} if fail == "time" else {}
    async with client_of(kind, "swrk", tmp_path, script, **limit) as (client, _):
        with raises({"raise": ZeroDivisionError, "refuse": Refused, "time": CriuTimeout}[fail]):
            async with (
                client.block("open_restore", images_dir=tmp_path) as operation,
                aclosing(client.notifications(operation)) as notifications,
            ):
                async for notification in notifications:
                    if fail == "raise":
                        raise ZeroDivisionError
                    if fail == "refuse":
                        notification.refuse("not now")


async def test_terminals_that_come_too_late(kind: str, tmp_path: Path) -> None:
    """They come while the request is undone, and are closed."""
    script = [Expect(), Sleep(0.4), Reply(note("orphan-pts-master"), MASTER.descriptors), Exit(1)]
    async with client_of(kind, "swrk", tmp_path, script, request_timeout=0.2, grace=HANG) as (client, _):
        with raises(CriuTimeout):
            await client.call("restore", images_dir=tmp_path)
