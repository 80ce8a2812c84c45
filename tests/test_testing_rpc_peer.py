"""The scripted peer over bare sockets: it keeps to its script, tells what it saw, and is gone afterwards."""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from criupy.rpc import _schema_pb2 as schema
from criupy.testing import _rpc_peer_program_linux
from criupy.testing._rpc_peer_program_linux import integers, start_time
from criupy.testing.criu_linux import Criu
from criupy.testing.rpc_peer_linux import (
    Close,
    DoNotRead,
    Exit,
    Expect,
    Hang,
    Ignore,
    Kill,
    Notify,
    Peer,
    Print,
    Repeat,
    Reply,
    Script,
    ScriptError,
    Sleep,
    SpawnChild,
    scripted_criu,
    scripted_service,
    scripted_worker,
    version_answer,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

DONE = schema.Response(type=schema.DUMP, success=True)
FAILED = schema.Response(type=schema.DUMP, success=False, cr_errno=3)
DUMP = schema.Request(type=schema.DUMP, opts=schema.Options(images_dir_fd=-1, pid=77))
ASK_VERSION = schema.Request(type=schema.VERSION, keep_open=True)


class Client:
    """What any client does: it starts a worker on a socket pair, and sends and reads packets."""

    def __init__(self, peer: Peer | Criu, *options: str, pass_fds: Sequence[int] = ()) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen(
                [peer.path, *options, "swrk", str(number)],
                pass_fds=[number, *pass_fds],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )

    def say(self, request: schema.Request) -> None:
        self.socket.sendall(request.SerializeToString())

    def hear(self) -> schema.Response:
        packet = self.socket.recv(1 << 20)
        assert packet, "the end of the connection"
        return schema.Response.FromString(packet)

    def ask(self, request: schema.Request) -> schema.Response:
        self.say(request)
        return self.hear()

    def answer(self, *, success: bool = True) -> None:
        self.say(schema.Request(type=schema.NOTIFY, notify_success=success))

    def sees_the_end(self, *, peek: bool = False) -> bool:
        try:
            return self.socket.recv(1, socket.MSG_PEEK if peek else 0) == b""
        except ConnectionResetError:  # it left something unread
            return True

    def wait(self) -> int:
        return self.process.wait(20)


@contextlib.contextmanager
def client_of(peer: Peer | Criu, *options: str, pass_fds: Sequence[int] = ()) -> Iterator[Client]:
    client = Client(peer, *options, pass_fds=pass_fds)
    try:
        yield client
    finally:
        client.socket.close()
        for stream in (client.process.stdout, client.process.stderr):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def talking(directory: Path, script: Script) -> Iterator[tuple[Peer, Client]]:
    """A peer with one script, and a client of it; both are gone afterwards."""
    with (
        contextlib.ExitStack() as stack,
        scripted_criu(directory, [script]) as peer,
        client_of(peer) as client,
    ):
        stack.callback(client.wait)
        yield peer, client


def until_recorded(peer: Peer, *, connections: int = 1) -> None:
    deadline = time.monotonic() + 20
    while len(peer.connections) < connections:
        assert time.monotonic() < deadline, "nothing is on record"
        time.sleep(0.001)


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def test_dump_with_notifications(tmp_path: Path) -> None:
    script = [Expect(schema.DUMP), Notify("pre-dump"), Notify("post-dump", pid=5), Reply(DONE)]
    with scripted_criu(tmp_path, [script]) as peer, client_of(peer, "--no-default-config") as client:
        notification = client.ask(DUMP)
        assert (notification.type, notification.notify.script) == (schema.NOTIFY, "pre-dump")
        assert not notification.notify.HasField("pid")
        client.answer()
        assert client.hear().notify.pid == 5
        client.answer(success=False)
        assert client.hear() == DONE
        client.socket.close()
        assert client.wait() == 0
        (connection,) = peer.connections
        assert connection.requests == [DUMP]
        assert [answer.notify_success for answer in connection.answers] == [True, False]
        assert connection.pid == client.process.pid
        assert connection.arguments[:-1] == ("--no-default-config", "swrk")
        assert (connection.script, connection.finished, connection.hung_up) == (0, True, True)
        assert peer.requests == [DUMP]
        assert len(peer.answers) == 2
        assert peer.running == []


def test_refused_notification(tmp_path: Path) -> None:
    script = [Expect(), Notify("pre-dump", refused=[Reply(FAILED), Exit(1)]), Reply(DONE)]
    for success in (True, False):
        with scripted_criu(tmp_path, [script]) as peer, client_of(peer) as client:
            client.ask(DUMP)
            client.answer(success=success)
            assert client.hear() == (DONE if success else FAILED)
            client.socket.close()
            assert client.wait() == (0 if success else 1)


def test_version_takes_no_script(tmp_path: Path) -> None:
    scripts = [[Expect(schema.DUMP), Reply(DONE)], [Expect(schema.CHECK), Exit(3)]]
    with scripted_criu(tmp_path, scripts, version=(3, 19)) as peer:
        for _ in range(2):
            with client_of(peer) as client:
                for _ in range(3):
                    answer = client.ask(ASK_VERSION)
                    assert (answer.version.major_number, answer.version.minor_number) == (3, 19)
                    assert not answer.version.HasField("sublevel")
                client.socket.close()
                assert client.wait() == 255
        with client_of(peer) as client:  # without keep_open it is the last one
            assert client.ask(schema.Request(type=schema.VERSION)).success
            assert client.sees_the_end()
            assert client.wait() == 0
        with client_of(peer) as client:
            client.ask(ASK_VERSION)
            assert client.ask(DUMP) == DONE
            client.ask(ASK_VERSION)
            client.socket.close()
            assert client.wait() == 0
        with client_of(peer) as client:
            client.say(schema.Request(type=schema.CHECK))
            assert client.wait() == 3
        assert [connection.versions for connection in peer.connections] == [3, 3, 1, 2, 0]
        assert [connection.script for connection in peer.connections] == [None, None, None, 0, 1]
        assert [request.type for request in peer.requests] == [schema.DUMP, schema.CHECK]


def test_version_by_script(tmp_path: Path) -> None:
    script = [Expect(schema.VERSION), version_answer((4, 2, 1))]
    with scripted_criu(tmp_path, [script], version=None) as peer, client_of(peer) as client:
        assert client.ask(ASK_VERSION).version.sublevel == 1
        client.socket.close()
        assert client.wait() == 0
        assert peer.requests == [ASK_VERSION]
    with pytest.raises(ValueError, match="version=None"), scripted_criu(tmp_path, [script]):
        pass


def test_last_script_repeats_when_told_so(tmp_path: Path) -> None:
    scripts = [[Expect(), Exit(5)], [Expect(), Exit(6)]]

    def statuses(peer: Peer) -> Iterator[int]:
        for _ in range(3):
            with client_of(peer) as client:
                client.say(DUMP)
                yield client.wait()

    with scripted_criu(tmp_path, scripts, repeat_last=True) as peer:
        assert list(statuses(peer)) == [5, 6, 6]
    with (
        pytest.raises(ScriptError, match=r"connection 2 .*has no script"),
        scripted_criu(tmp_path, scripts) as peer,
    ):
        assert list(statuses(peer)) == [5, 6, 255]


@pytest.mark.parametrize("size", [0, 1, 180_000, 400_000])
def test_packet_sizes(tmp_path: Path, size: int) -> None:
    with talking(tmp_path, [Expect(), Reply(b"x" * size), Exit()]) as (_, client):
        client.say(DUMP)
        assert client.socket.recv(1 << 20) == b"x" * size
        assert client.sees_the_end()


def test_a_packet_for_no_buffer(tmp_path: Path) -> None:
    with (
        pytest.raises(ScriptError, match="5000000 bytes"),
        talking(tmp_path, [Expect(), Reply(bytes(5_000_000))]) as (_, client),
    ):
        client.say(DUMP)
        assert client.sees_the_end()


def test_large_request(tmp_path: Path) -> None:
    request = schema.Request(type=schema.DUMP)
    request.opts.external.append("x" * 180_000)
    with talking(tmp_path, [Expect(schema.DUMP), Reply(DONE)]) as (peer, client):
        assert client.ask(request) == DONE
        assert peer.requests == [request]


def test_descriptors(tmp_path: Path) -> None:
    script = [Expect(), Notify("orphan-pts-master", descriptors=["/dev/ptmx"]), Reply(DONE)]
    with talking(tmp_path, script) as (_, client):
        client.say(DUMP)
        _, descriptors, _, _ = socket.recv_fds(client.socket, 1000, 3)
        try:
            assert [Path(f"/proc/self/fd/{number}").readlink() for number in descriptors] == [
                Path("/dev/ptmx")
            ]
            assert os.isatty(descriptors[0])
        finally:
            for number in descriptors:
                os.close(number)
        client.answer()
        assert client.hear() == DONE


def test_several_descriptors_with_a_reply(tmp_path: Path) -> None:
    with talking(tmp_path, [Expect(), Reply(DONE, ["/dev/null"] * 3)]) as (_, client):
        client.say(DUMP)
        data, ancillary, flags, _ = client.socket.recvmsg(1000, socket.CMSG_SPACE(4))
        numbers = array.array("i")
        for _, _, words in ancillary:
            numbers.frombytes(words[: len(words) - len(words) % numbers.itemsize])
        for number in numbers:
            os.close(number)
        assert schema.Response.FromString(data) == DONE
        assert flags & socket.MSG_CTRUNC


def test_output(tmp_path: Path) -> None:
    with talking(tmp_path, [Expect(), Print("good\n"), Print("bad\n", to="stderr"), Exit(2)]) as (_, client):
        client.say(DUMP)
        assert client.process.communicate() == (b"good\n", b"bad\n")
        assert client.wait() == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_death_by_signal(tmp_path: Path, number: signal.Signals) -> None:
    with talking(tmp_path, [Expect(), Kill(number)]) as (peer, client):
        client.say(DUMP)
        assert client.sees_the_end()
        assert client.wait() == -number
        assert peer.connections[0].finished
        assert not peer.connections[0].hung_up


def test_stopped_and_continued(tmp_path: Path) -> None:
    with talking(tmp_path, [Expect(), Kill(signal.SIGSTOP), Reply(DONE)]) as (peer, client):
        client.say(DUMP)
        os.waitid(os.P_PID, client.process.pid, os.WSTOPPED)
        assert peer.running == [client.process.pid]
        client.process.send_signal(signal.SIGCONT)
        assert client.hear() == DONE


def test_stopped_is_ended(tmp_path: Path) -> None:
    with talking(tmp_path, [Expect(), Kill(signal.SIGSTOP)]) as (_, client):
        client.say(DUMP)
        os.waitid(os.P_PID, client.process.pid, os.WSTOPPED)
    assert client.process.returncode == -signal.SIGKILL


def test_hanging_through_sigterm(tmp_path: Path) -> None:
    with talking(tmp_path, [Ignore(), SpawnChild(), Expect(), Reply(DONE), Hang()]) as (peer, client):
        client.ask(DUMP)
        (child,) = peer.children
        for pid in (client.process.pid, child):
            os.kill(pid, signal.SIGTERM)
        client.socket.close()
        deadline = time.monotonic() + 20
        while len(peer.connections[0].signals) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert sorted(peer.connections[0].signals) == sorted(
            (pid, signal.SIGTERM) for pid in (client.process.pid, child)
        )
        with pytest.raises(ScriptError, match=r"still running after 0\.05 s"):
            peer.wait_ended(0.05)
        assert sorted(peer.running) == sorted([client.process.pid, child])
    assert client.process.returncode == -signal.SIGKILL


def test_hanging_ends_with_sigterm(tmp_path: Path) -> None:
    with talking(tmp_path, [Expect(), Reply(DONE), Hang()]) as (peer, client):
        client.ask(DUMP)
        client.process.terminate()
        assert client.wait() == -signal.SIGTERM
        assert not peer.connections[0].finished


def test_closed_but_alive(tmp_path: Path) -> None:
    with talking(tmp_path, [Expect(), Close(), Hang()]) as (peer, client):
        client.say(DUMP)
        assert client.sees_the_end()
        assert peer.running == [client.process.pid]


def test_closed_and_nothing_left_to_do(tmp_path: Path) -> None:
    with talking(tmp_path, [Expect(), Close()]) as (peer, client):
        client.say(DUMP)
        assert client.sees_the_end()
        assert client.wait() == 0
        assert peer.connections[0].finished


def test_sleep(tmp_path: Path) -> None:
    with talking(tmp_path, [Expect(), Sleep(0.1), Reply(DONE)]) as (_, client):
        client.ask(ASK_VERSION)
        start = time.monotonic()
        client.ask(DUMP)
        assert time.monotonic() - start >= 0.1


def test_unread(tmp_path: Path) -> None:
    """The client's buffer fills, it hangs up, the peer ends."""
    with talking(tmp_path, [DoNotRead()]) as (peer, client):
        client.ask(ASK_VERSION)
        client.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                client.say(DUMP)
        client.socket.close()
        assert client.wait() == 0
        assert peer.requests == []
        assert peer.connections[0].finished


@pytest.mark.parametrize("keep", ["nothing", "socket", "output"])
def test_child(tmp_path: Path, keep: str) -> None:
    step = SpawnChild(keep_socket=keep == "socket", keep_output=keep == "output")
    with talking(tmp_path, [Expect(), step, Kill()]) as (peer, client):
        client.say(DUMP)
        assert client.wait() == -signal.SIGKILL
        (child,) = peer.children
        assert peer.running == [child]
        assert client.process.stdout is not None
        for file, kept in ((client.socket, keep == "socket"), (client.process.stdout, keep == "output")):
            ready, _, _ = select.select([file], [], [], 0.05 if kept else 20)
            assert bool(ready) is not kept
    assert not is_alive(child)


def test_flood(tmp_path: Path) -> None:
    """A client that never reads: the peer waits, and ends with the client."""
    flood = Repeat([Reply(bytes(50_000))])
    with talking(tmp_path, [Expect(), flood]) as (peer, client):
        client.say(DUMP)
        for _ in range(3):
            assert len(client.socket.recv(1 << 20)) == 50_000
        assert peer.running == [client.process.pid]
        client.socket.close()
        assert client.wait() == 255
        assert peer.connections[0].hung_up
    with contextlib.ExitStack() as stack:
        with scripted_criu(tmp_path, [[Expect(), flood]]) as peer:
            # it outlasts the peer: one that closes first would end the worker as well
            client = stack.enter_context(client_of(peer))
            client.say(DUMP)
            assert client.socket.recv(1 << 20)
        assert client.wait() == -signal.SIGKILL


def test_repeat_some_times(tmp_path: Path) -> None:
    with talking(tmp_path, [Expect(), Repeat([Notify("pre-dump")], 3), Reply(DONE)]) as (_, client):
        client.say(DUMP)
        for _ in range(3):
            assert client.hear().notify.script == "pre-dump"
            client.answer()
        assert client.hear() == DONE


@pytest.mark.parametrize("early", [True, False], ids=["before the answer", "after it"])
def test_client_that_dies(tmp_path: Path, early: bool) -> None:
    """A client process of its own is killed: the worker sees it and ends as CRIU would."""
    code = textwrap.dedent("""
        import socket, subprocess, sys
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = str(theirs.fileno())
        worker = subprocess.Popen([sys.argv[1], "swrk", number], pass_fds=[theirs.fileno()])
        theirs.close()
        ours.sendall(bytes.fromhex(sys.argv[2]))
        ours.recv(100000)
        print("heard", flush=True)
        ours.recv(100000)
    """)
    script = [Expect(), Notify("pre-dump"), Reply(DONE)] if early else [Expect(), Reply(DONE)]
    with scripted_criu(tmp_path, [script]) as peer:
        command = [sys.executable, "-c", code, str(peer.path), DUMP.SerializeToString().hex()]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"heard\n"
            client.kill()
        peer.wait_ended()
        (connection,) = peer.connections
        assert connection.hung_up
        assert connection.finished is not early


@pytest.mark.parametrize(
    ("script", "says", "problem"),
    [
        ([Expect(schema.CHECK)], [DUMP], "expected CHECK, got DUMP"),
        (
            [Expect(schema.CHECK)],
            [schema.Request(keep_open=True)],
            "expected CHECK, got a packet without a type",
        ),
        ([Expect(), Notify("pre-dump")], [DUMP, DUMP], "expected NOTIFY, got DUMP"),
        ([Expect()], [schema.Request(type=schema.DUMP, keep_open=True)], "got DUMP with keep_open"),
        ([Expect()], [DUMP, DUMP], "got DUMP after the end"),
        ([], [DUMP], "got DUMP after the end"),
    ],
)
def test_departing_from_the_script(
    tmp_path: Path, script: Script, says: list[schema.Request], problem: str
) -> None:
    with pytest.raises(ScriptError, match=problem), talking(tmp_path, script) as (peer, client):
        for request in says:
            client.say(request)
        assert client.wait() == 255
        assert len(peer.problems) == 1
    with pytest.raises(ZeroDivisionError) as caught, talking(tmp_path, script) as (peer, client):
        for request in says:
            client.say(request)
        client.wait()
        raise ZeroDivisionError
    assert [problem in note for note in caught.value.__notes__] == [True]


def test_a_script_that_cannot_be_performed(tmp_path: Path) -> None:
    with (
        pytest.raises(ScriptError, match="broken: FileNotFoundError"),
        talking(tmp_path, [Expect(), Reply(DONE, ["/nowhere"])]) as (_, client),
    ):
        client.say(DUMP)
        assert client.wait() == 1


def test_what_crius_worker_cannot_use(tmp_path: Path) -> None:
    for kind, blocking, problem in (
        (socket.SOCK_SEQPACKET, False, "not a blocking socket"),
        (socket.SOCK_STREAM, True, "not a SOCK_SEQPACKET socket"),
    ):
        with pytest.raises(ScriptError, match=problem), scripted_criu(tmp_path, [[]]) as peer:
            ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
            with ours, theirs:
                theirs.setblocking(blocking)
                number = theirs.fileno()
                done = subprocess.run([peer.path, "swrk", str(number)], pass_fds=[number], check=False)
            assert done.returncode == 255
    with pytest.raises(ScriptError, match="not `swrk FD`"), scripted_criu(tmp_path, [[]]) as peer:
        done = subprocess.run([peer.path, "check"], check=False, capture_output=True)
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"swrk" in done.stderr


def conversation(peer: Peer | Criu, packets: Sequence[bytes]) -> tuple[list[bytes], int]:
    """Send packets, each once the one before is answered; return the answers and the exit status."""
    heard = []
    with client_of(peer, "--no-default-config") as client:
        for packet in packets:
            client.socket.send(packet)
            heard.append(b"" if client.sees_the_end(peek=True) else client.socket.recv(1 << 20))
        client.socket.close()
        return heard, client.wait()


@pytest.mark.parametrize(
    ("packets", "script", "departs"),
    [
        ([], [], False),
        ([ASK_VERSION] * 2, [], False),
        ([ASK_VERSION, schema.Request(type=schema.VERSION)], [], False),
        ([b"\xff" * 20], [Expect(schema.DUMP)], True),
        ([b""], [Expect()], False),
        ([schema.Request(type=schema.DUMP, keep_open=True)], [Expect()], True),
        (
            [schema.Request(type=schema.EMPTY)],
            [Expect(), Reply(schema.Response(type=schema.EMPTY, success=False)), Exit(255)],
            False,
        ),
    ],
)
def test_like_criu(
    tmp_path: Path, criu: Criu, packets: list[schema.Request | bytes], script: Script, departs: bool
) -> None:
    said = [packet if isinstance(packet, bytes) else packet.SerializeToString() for packet in packets]
    with contextlib.ExitStack() as stack:
        if departs:
            stack.enter_context(pytest.raises(ScriptError))
        peer = stack.enter_context(scripted_criu(tmp_path, [script], version=criu.version))
        assert conversation(peer, said) == conversation(criu, said)


def test_closed_standard_streams(tmp_path: Path) -> None:
    """Some clients close them, and what is printed then must not go where the records go."""
    script = [Expect(), Print("out"), Print("err", to="stderr"), Reply(DONE)]
    with scripted_criu(tmp_path, [script]) as peer:
        shell = tmp_path / "closing"
        shell.write_text(f'#!/bin/sh\nexec "{peer.path}" "$@" <&- >&- 2>&-\n')
        shell.chmod(0o755)
        with client_of(Criu(shell, (4, 2, 1))) as client:
            assert client.ask(DUMP) == DONE
            client.socket.close()
            assert client.wait() == 0
        assert peer.connections[0].finished
        assert list(peer.connections[0].descriptors) == [int(peer.connections[0].arguments[-1])]


def test_leaked_descriptors_show(tmp_path: Path) -> None:
    with scripted_criu(tmp_path, [[Expect()]]) as peer, Path(os.devnull).open("rb") as leak:
        for pass_fds in ((), (leak.fileno(),)):
            with client_of(peer, pass_fds=pass_fds) as client:
                client.ask(ASK_VERSION)
                client.socket.close()
                client.wait()
        clean, leaky = peer.connections
        assert list(clean.descriptors) == [int(clean.arguments[-1])]
        assert clean.descriptors[int(clean.arguments[-1])].startswith("socket:")
        assert leaky.descriptors[leak.fileno()] == "/dev/null"


def test_service(tmp_path: Path) -> None:
    scripts = [[Expect(schema.DUMP), Reply(DONE)], [Expect(schema.DUMP), Kill()]]
    with scripted_service(tmp_path, scripts) as peer:
        connections = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        with contextlib.ExitStack() as stack:
            for number, connection in enumerate(connections):
                stack.enter_context(connection).connect(str(peer.path))
                connection.sendall(ASK_VERSION.SerializeToString())
                assert schema.Response.FromString(connection.recv(1000)).version.major_number == 4
                until_recorded(peer, connections=number + 1)
            first, second, third = connections
            first.sendall(DUMP.SerializeToString())
            assert schema.Response.FromString(first.recv(1000)) == DONE
            second.sendall(DUMP.SerializeToString())
            assert second.recv(1000) == b""
            peer.kill()
            assert third.recv(1000) == b""
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late,
                pytest.raises(ConnectionRefusedError),
            ):
                late.connect(str(peer.path))
        assert peer.requests == [DUMP, DUMP]
        assert len({connection.pid for connection in peer.connections}) == 3


def test_worker_on_a_socket_pair(tmp_path: Path) -> None:
    with scripted_worker(tmp_path, [Expect(), Reply(DONE)]) as (peer, connection):
        assert connection.getblocking()
        connection.sendall(DUMP.SerializeToString())
        assert schema.Response.FromString(connection.recv(1000)) == DONE
        connection.close()
        peer.wait_ended()
        assert peer.requests == [DUMP]


def test_two_in_one_directory(tmp_path: Path) -> None:
    room = tmp_path / "a name with 'quotes' and spaces"
    room.mkdir()
    with scripted_criu(room, [[Expect(), Exit(1)]]) as one, scripted_criu(room, [[Expect(), Exit(2)]]) as two:
        for peer, status in ((one, 1), (two, 2)):
            with client_of(peer) as client:
                client.say(DUMP)
                assert client.wait() == status


def test_a_failed_test_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        talking(tmp_path, [Ignore(), SpawnChild(), Reply(DONE), Hang()]) as (
            peer,
            client,
        ),
    ):
        client.ask(DUMP)
        assert len(peer.running) == 2
        raise ZeroDivisionError
    assert peer.running == []
    assert client.process.returncode == -signal.SIGKILL
    assert not any(map(is_alive, peer.children))


def test_nothing_begins_after_the_end(tmp_path: Path) -> None:
    with scripted_criu(tmp_path, [[Hang()]], version=None) as peer:
        pass
    with client_of(peer) as client:
        assert client.sees_the_end()
        assert client.wait() == -signal.SIGKILL


def test_the_death_of_the_test_ends_everything(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import os, signal, sys, time
        from criupy.testing.rpc_peer_linux import *
        script = [Ignore(), SpawnChild(), Hang()]
        with scripted_worker(sys.argv[1], script, version=None) as (peer, _):
            while not peer.children:
                time.sleep(0.001)
            print(*peer.running, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False, stdout=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL
    worker, child = map(int, done.stdout.split())
    deadline = time.monotonic() + 20
    while is_alive(worker) or is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_pid_of_another_process_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pid that has been given to another process since is no process of ours."""
    with talking(tmp_path, [Expect(), Reply(DONE), Hang()]) as (peer, client):
        client.ask(DUMP)
        assert peer.running == [client.process.pid]
        with monkeypatch.context() as patch:
            patch.setattr(_rpc_peer_program_linux, "start_time", lambda _: 1)
            assert peer.running == []
            peer.kill()
        assert client.process.poll() is None


def test_start_time() -> None:
    assert start_time(os.getpid()) == start_time(os.getpid()) != start_time(1)
    assert start_time(1 << 29) is None


def test_integers_of_a_message() -> None:
    request = schema.Request(type=schema.DUMP, keep_open=True, pid=1 << 31, opts=schema.Options(pid=5))
    assert integers(request.SerializeToString()) == {1: 1, 4: 1, 6: 1 << 31}
    assert integers(b"\x09" + bytes(8) + b"\x15" + bytes(4) + b"\x08\x01") == {1: 1}
    for broken in (b"\x08", b"\xff" * 20, b"\x12\x05ab", b"\x0b\x0c", b"\x09123"):
        assert integers(broken) == {}
