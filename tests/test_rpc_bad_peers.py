"""Both clients against a CRIU that dies, lies, or talks out of turn: one clear error each, nothing left."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from criupy import (
    CriuDied,
    CriuError,
    CriupyError,
    RemoteProtocolError,
)
from criupy.rpc import _schema_pb2 as schema
from criupy.rpc import external
from criupy.testing.rpc_peer_linux import (
    Close,
    Exit,
    Expect,
    Hang,
    Kill,
    Notify,
    Print,
    Reply,
    Script,
    SpawnChild,
    Step,
)
from rpc_clients import Recorder
from rpc_peers import (
    DONE,
    FAILED,
    PID,
    WAYS,
    client_of,
    note,
    raises,
    response,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

# ---- nonsense, and ends --------------------------------------------------------------------------

BAD: dict[str, tuple[Script, type[CriupyError], str]] = {
    "garbage": (
        [Expect(), Reply(b"garbage")],
        RemoteProtocolError,
        "this does not parse at byte 0: 67 61 72",
    ),
    "garbage unasked": ([Reply(b"garbage"), Hang()], RemoteProtocolError, "does not parse at byte 0: 67 61"),
    "cut": (
        [Expect(), Reply(b"\x08\x01\x10")],
        RemoteProtocolError,
        "this does not parse at byte 0: 08 01 10$",
    ),
    "empty": (
        [Expect(), Reply(b""), Hang()],
        RemoteProtocolError,
        "expected type and success in every response",
    ),
    "no type": (
        [Expect(), Reply(b"\x10\x01")],
        RemoteProtocolError,
        "expected type and success in every resp",
    ),
    "new type": (
        [Expect(), Reply(b"\x08\x63\x10\x01")],
        RemoteProtocolError,
        "expected type and success in every response at byte 0: 08 63 10 01",
    ),
    "wrong type": (
        [Expect(), Reply(response(schema.CHECK))],
        RemoteProtocolError,
        "^DUMP was answered as CHECK at byte 0",
    ),
    "empty success": (
        [Expect(), Reply(response(schema.EMPTY))],
        RemoteProtocolError,
        "^DUMP was answered with EMPTY, success at byte 0",
    ),
    "unknown to CRIU": (
        [Expect(), Reply(response(schema.EMPTY, success=False)), Exit()],
        CriuError,
        "^dump: CRIU failed without a word$",
    ),
    "a descriptor with the answer": (
        [Expect(), Reply(DONE.packet, ["/dev/null"])],
        RemoteProtocolError,
        "^a descriptor came with an answer at byte 0",
    ),
    "three descriptors": (
        [Expect(), Reply(note("orphan-pts-master"), ["/dev/null"] * 3), Hang()],
        RemoteProtocolError,
        "^3 descriptors came with orphan-pts-master at byte 0",
    ),
    "many descriptors": (
        [Expect(), Reply(note("orphan-pts-master"), ["/dev/null"] * 30), Hang()],
        RemoteProtocolError,
        "^more descriptors than CRIU sends, or than could be received here at byte 0",
    ),
    "a descriptor with another script": (
        [Expect(), Reply(note("pre-dump"), ["/dev/null"]), Hang()],
        RemoteProtocolError,
        "^1 descriptors came with pre-dump at byte 0",
    ),
    "no script": (
        [Expect(), Reply(note("")), Hang()],
        RemoteProtocolError,
        "^a notification without a script at byte 0",
    ),
    "no text": (
        [Expect(), Reply(note("xyz").SerializeToString().replace(b"xyz", b"\xff\xfe\xfd")), Hang()],
        RemoteProtocolError,
        "is not UTF-8|does not parse",
    ),
    "a failure cut through a character": (
        [Expect(), Reply(response(schema.DUMP, success=False, cr_errmsg=b"no file \xc3")), Exit()],
        CriuError,
        "^dump: no file \ufffd$",
    ),
    "a failure": ([Expect(), FAILED, Exit()], CriuError, r"^dump: no way \(No such process, errno 3\)"),
    "an errno that nobody knows": (
        [Expect(), Reply(response(schema.DUMP, success=False, cr_errno=-5)), Exit()],
        CriuError,
        r"^dump: CRIU failed without a word \(Unknown error -5, errno -5\)$",
    ),
    "ends at once": ([Exit(3)], CriuDied, "^dump: CRIU closed the connection without an answer( and .*)?$"),
    "ends after the request": ([Expect(), Exit(4)], CriuDied, "^dump: CRIU closed the connection without an"),
    "is killed at once": ([Kill()], CriuDied, "^dump: CRIU closed the connection without an answer"),
    "is killed after the request": (
        [Expect(), Kill(signal.SIGSEGV)],
        CriuDied,
        "^dump: CRIU closed the connection without an answer",
    ),
    "ends while notified": (
        [Expect(), Reply(note()), Exit(5)],
        CriuDied,
        "^dump: CRIU closed the connection with",
    ),
    "ends after a notification": (
        [Expect(), Notify("pre-dump"), Exit(6)],
        CriuDied,
        "^dump: CRIU closed the con",
    ),
    "closes and lives on": (
        [Expect(), Close(), Hang()],
        CriuDied,
        "^dump: CRIU closed the connection without",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_worker(kind: str, case: str, tmp_path: Path) -> None:
    script, error, message = BAD[case]
    async with client_of(kind, "swrk", tmp_path, script, grace=0.1) as (client, _):
        with raises(error, message):
            await client.call("dump", PID, images_dir=tmp_path)


async def test_a_bad_service(kind: str, tmp_path: Path) -> None:
    scripts = [script for script, _, _ in BAD.values()]
    async with client_of(kind, "service", tmp_path, *scripts, grace=0.1) as (client, _):
        for _, error, message in BAD.values():
            with raises(error, message):
                await client.call("dump", PID, images_dir=tmp_path)


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ([Exit(3)], "exit status 3"),
        ([Expect(), Exit(4)], "exit status 4"),
        ([Kill()], "signal 9"),
        ([Expect(), Kill(signal.SIGSEGV)], "signal 11"),
        ([Expect(), Reply(note()), Exit(5)], "exit status 5"),
        ([Expect(), Notify("pre-dump"), Exit(6)], "exit status 6"),
        ([Expect(), SpawnChild(keep_socket=True, keep_output=True), Exit(7)], "exit status 7"),
        ([Expect(), SpawnChild(keep_socket=True, keep_output=True), Kill(signal.SIGTERM)], "signal 15"),
    ],
    ids=str,
)
async def test_how_a_worker_ended(kind: str, tmp_path: Path, script: Script, how: str) -> None:
    async with client_of(kind, "swrk", tmp_path, script, grace=0.1) as (client, _):
        with raises(CriuDied, f"^dump: CRIU closed the connection without an answer and ended with {how}$"):
            await client.call("dump", PID, images_dir=tmp_path)


async def test_what_a_worker_said_before_its_end(kind: str, tmp_path: Path) -> None:
    script = [
        Print("criu: what is this?\n"),
        Print("criu: unrecognized option '--no-default-config'\n", "stderr"),
        Exit(1),
    ]
    async with client_of(kind, "swrk", tmp_path, script) as (client, _):
        with raises(CriuDied, "exit status 1: criu: unrecognized option '--no-default-config'$") as caught:
            await client.call("dump", PID, images_dir=tmp_path)
        assert isinstance(caught.value, CriuDied)
        assert caught.value.output.splitlines()[0] == "criu: what is this?"


async def test_a_worker_that_prints_a_lot(kind: str, tmp_path: Path) -> None:
    script = [Print("line\n" * 200_000), Print("\xff\x00 the last one\n"), Expect(), Exit(1)]
    async with client_of(kind, "swrk", tmp_path, script) as (client, _):
        with raises(CriuDied, "the last one$") as caught:
            await client.call("dump", PID, images_dir=tmp_path)
        assert isinstance(caught.value, CriuDied)
        assert len(caught.value.output) <= 1 << 16


async def test_what_a_worker_prints_where_this_process_does(kind: str, tmp_path: Path, capfd: Any) -> None:
    script = [Print("to be seen\n"), Print("as well\n", "stderr"), Expect(), Exit(1)]
    async with client_of(kind, "swrk", tmp_path, script, capture_output=False) as (client, _):
        with raises(CriuDied, "and ended with exit status 1$"):
            await client.call("dump", PID, images_dir=tmp_path)
    assert capfd.readouterr() == ("to be seen\n", "as well\n")


@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_of_one_who_read_nothing(kind: str, way: str, tmp_path: Path) -> None:
    """Its end resets the connection, and what it said before is heard nevertheless."""
    async with client_of(kind, way, tmp_path, [FAILED, Exit()], version=None) as (client, _):
        with raises(CriuError, "^dump: no way"):
            await client.call("dump", PID, images_dir=tmp_path)


WITHOUT: list[tuple[str, Reply, str]] = [
    ("version", Reply(response(schema.VERSION)), "^the answer to VERSION has no version at byte 0"),
    ("version", Reply(note()), "^a notification that was not asked for at byte 0"),
    ("feature_check", Reply(response(schema.FEATURE_CHECK)), "^the answer to FEATURE_CHECK has no features"),
    ("restore", Reply(response(schema.RESTORE)), "^the answer to RESTORE has no restore at byte 0"),
    ("page_server", Reply(response(schema.PAGE_SERVER)), "^the answer to PAGE_SERVER has no ps"),
    ("page_server_child", Reply(response(schema.PAGE_SERVER)), "^the answer to PAGE_SERVER_CHLD has no ps"),
    ("page_server_child", Reply(response(schema.PAGE_SERVER_CHLD)), "^PAGE_SERVER_CHLD was answered as"),
    ("check", Reply(note()), "^a notification that was not asked for at byte 0"),
    ("pre_dump", Reply(response(schema.PRE_DUMP)), "^FEATURE_CHECK was answered as PRE_DUMP"),
]


async def test_success_without_what_was_asked_for(kind: str, tmp_path: Path) -> None:
    scripts: list[Script] = [[Expect(), reply] for _, reply, _ in WITHOUT]
    async with client_of(kind, "service", tmp_path, *scripts, version=None) as (client, _):
        for method, _, message in WITHOUT:
            arguments = [PID] if method == "pre_dump" else []
            options = {} if method in {"version", "feature_check", "check"} else {"images_dir": tmp_path}
            with raises(RemoteProtocolError, message):
                await client.call(method, *arguments, **options)


NOWHERE: list[dict[str, Any]] = [
    {},
    {"port": 0},
    {"port": 70000, "pid": 5},
    {"port": 5},
    {"port": 5, "pid": -1},
]


async def test_a_page_server_that_is_nowhere(kind: str, tmp_path: Path) -> None:
    scripts: list[Script] = [
        [Expect(), Reply(response(schema.PAGE_SERVER, ps=schema.PageServerInfo(**ps))), Exit()]
        for ps in NOWHERE
        for _ in range(2)
    ]
    async with client_of(kind, "service", tmp_path, *scripts) as (client, peer):
        for number, ps in enumerate(NOWHERE):
            with raises(CriuError, "^page_server_child: CRIU did not say which (port|process)"):
                await client.call("page_server_child", images_dir=tmp_path)
            await until(lambda: not peer.running)
            if ps.get("port") == 5:
                assert (await client.call("page_server", images_dir=tmp_path)).port == 5
            else:
                with raises(CriuError, "^page_server: CRIU did not say which port"):
                    await client.call("page_server", images_dir=tmp_path)
            assert len(peer.connections) == 2 * (number + 1)


async def test_a_page_server_that_fails(kind: str, tmp_path: Path) -> None:
    answer = Reply(response(schema.PAGE_SERVER, success=False))
    async with client_of(kind, "swrk", tmp_path, *[[Expect(), answer]] * 3) as (client, peer):
        for _ in range(3):
            with raises(CriuError, "^page_server_child: CRIU failed without a word$"):
                await client.call("page_server_child", images_dir=tmp_path)
        assert len(peer.running) <= 1


@pytest.mark.parametrize("status", [0x137F, 0xFFFF, -1])
async def test_an_exit_status_that_is_none(kind: str, tmp_path: Path, status: int) -> None:
    script = [
        Expect(schema.PAGE_SERVER_CHLD),
        Reply(response(schema.PAGE_SERVER, ps=schema.PageServerInfo(port=5, pid=17))),
        Expect(schema.WAIT_PID),
        Reply(response(schema.WAIT_PID, status=status)),
    ]
    async with client_of(kind, "swrk", tmp_path, script) as (client, _):
        child = await client.call("page_server_child", images_dir=tmp_path)
        with raises(CriuError, f"^wait_pid: CRIU did not say how process 17 ended .but {status:#x}"):
            await client.run(child.wait)


@pytest.mark.parametrize("pid", [0, -1])
async def test_a_restored_process_that_is_none(kind: str, tmp_path: Path, pid: int) -> None:
    answer = Reply(response(schema.RESTORE, restore=schema.RestoreAnswer(pid=pid)))
    async with client_of(kind, "swrk", tmp_path, [Expect(), answer, Exit()]) as (client, _):
        with raises(CriuError, "^restore: CRIU did not say which process it started .but"):
            await client.call("restore", images_dir=tmp_path)


# ---- out of order --------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [DONE, Reply(note("post-dump"))], ids=["answer", "notification"])
@pytest.mark.parametrize("way", ["swrk", "service"])
async def test_more_while_a_notification_waits(kind: str, way: str, second: Reply, tmp_path: Path) -> None:
    script = [Expect(), Reply(note()), Reply(second.packet), Hang()]
    async with client_of(kind, way, tmp_path, script, grace=0.1) as (client, peer):
        recorder = Recorder({"pre-dump": lambda: time.sleep(0.3)})
        with raises(RemoteProtocolError, r"^CRIU sent something unasked \(notified\) at byte"):
            await client.call("dump", PID, images_dir=tmp_path, hooks=recorder)
        assert peer.answers == []


@pytest.mark.parametrize("way", WAYS)
async def test_a_second_answer_to_a_last_request(kind: str, way: str, tmp_path: Path) -> None:
    async with client_of(kind, way, tmp_path, [Expect(), DONE, DONE, Exit()]) as (client, _):
        await client.call("dump", PID, images_dir=tmp_path)


@pytest.mark.parametrize("way", WAYS)
async def test_a_second_answer_on_a_kept_connection(kind: str, way: str, tmp_path: Path) -> None:
    told = Reply(response(schema.VERSION, version=schema.VersionAnswer(major_number=4)))
    async with client_of(kind, way, tmp_path, [Expect(), told, told], version=None) as (client, peer):
        await client.call("version")
        await until(lambda: peer.connections[0].finished)
        with raises(RemoteProtocolError, r"^CRIU sent something unasked \(idle\) at byte"):
            await client.call("version")


@pytest.mark.parametrize("end", [Exit(), Kill(), Close()], ids=["exit", "kill", "close"])
async def test_a_kept_worker_that_ended_is_replaced(kind: str, tmp_path: Path, end: Step) -> None:
    told = Reply(response(schema.VERSION, version=schema.VersionAnswer(major_number=4)))
    scripts = [[Expect(), told, end], [Expect(), told]]
    async with client_of(kind, "swrk", tmp_path, *scripts, version=None, grace=0.1) as (client, peer):
        await client.call("version")
        await until(lambda: not peer.running or (isinstance(end, Close) and peer.connections[0].finished))
        assert (await client.call("version")).major == 4
        assert len(peer.connections) == 2


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["swrk", "service"])
async def test_a_long_answer(kind: str, way: str, tmp_path: Path) -> None:
    words = ["x" * size + " the end" for size in (9_000, 120_000, 300_000)]
    scripts: list[Script] = [
        [Expect(), Reply(response(schema.DUMP, success=False, cr_errmsg=text.encode())), Exit()]
        for text in words
    ]
    async with client_of(kind, way, tmp_path, *scripts) as (client, _):
        for text in words:
            with raises(CriuError) as caught:
                await client.call("dump", PID, images_dir=tmp_path)
            assert isinstance(caught.value, CriuError)
            assert caught.value.message == text


@pytest.mark.parametrize("way", WAYS)
async def test_a_long_request(kind: str, way: str, tmp_path: Path) -> None:
    names = [external.file(1, number) for number in range(5_000)]
    async with client_of(kind, way, tmp_path, [Expect(), DONE]) as (client, peer):
        await client.call("dump", PID, images_dir=tmp_path, external=names)
        (request,) = peer.requests
        assert list(request.opts.external) == names
        assert len(request.SerializeToString()) > 50_000


@pytest.mark.parametrize("way", WAYS)
async def test_too_long_a_request(kind: str, way: str, tmp_path: Path) -> None:
    names = [external.mnt("/" + "x" * 2000, str(number)) for number in range(1000)]
    async with client_of(kind, way, tmp_path, [Expect()]) as (client, peer):
        with raises(
            CriuError,
            r"^dump: a request of \d{7} bytes cannot be sent \(Message too long, errno 90\)$",
        ):
            await client.call("dump", PID, images_dir=tmp_path, external=names)
        assert peer.requests == []


async def test_too_long_an_answer_of_a_hook(kind: str, tmp_path: Path) -> None:
    names = [external.mnt("/" + "x" * 2000, str(number)) for number in range(1000)]
    script = [Expect(), Notify("query-ext-files")]
    async with client_of(kind, "swrk", tmp_path, script) as (client, peer):
        with raises(CriuError, r"a request of \d+ bytes cannot be sent \(Message too long, errno 90\)$"):
            await client.call("dump", PID, images_dir=tmp_path, hooks=Recorder(external=names))
        assert peer.answers == []
