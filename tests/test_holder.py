"""The second holder of the socket to a source: what the source sees when the relay has died."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import trio

from criupy.errors import PageServerError
from criupy.page_server import _held_linux
from criupy.page_server._control_linux import SOCKET_NAME, ask, listen
from criupy.page_server._held_linux import Holder
from criupy.testing.criu_linux import Criu, lazy_dump
from criupy.testing.spec import WorkloadSpec
from criupy.testing.workload_linux import start_workload
from page_server_clients import CLOSE, FRAMES, GET, PAGE, Destination, frame, loopback

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

HANG = 30.0
#: Long enough for what must not happen to happen.
QUIET = 0.3


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@dataclass(eq=False)
class Relay:
    """A process with a holder; `path` is that of its control socket."""

    process: subprocess.Popen[str]
    path: Path
    log: Path
    holder: int = 0
    holder_fd: int = -1

    def do(self, *steps: str) -> None:
        for step in steps:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(step + "\n")
            self.process.stdin.flush()
            said = self.process.stdout.readline()
            if step == "start":
                self.holder = int(said)
                self.holder_fd = os.pidfd_open(self.holder)

    def crash(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def is_held(self) -> bool:
        return not select.select([self.holder_fd], [], [], 0)[0]

    def holder_ended(self) -> None:
        assert select.select([self.holder_fd], [], [], HANG)[0]

    def lines(self) -> list[str]:
        """Return what the holder has said, without who it is."""
        return [line.partition(": ")[2] for line in self.log.read_text().splitlines()]

    def abort(self) -> str:
        return ask(self.path, "abort", HANG)


@contextlib.contextmanager
def relay(
    upstream: socket.socket,
    room: Path,
    *,
    frame_size: int = 32,
    hold_timeout: float | None = None,
    keep: bool = False,
    log: int | None = None,
) -> Iterator[Relay]:
    """Start the process; unless `keep`, it and its holder are the only ones who have the socket then."""
    control = listen(room / SOCKET_NAME)
    seconds = "-" if hold_timeout is None else str(hold_timeout)
    numbers = (upstream.fileno(), control.fileno())
    with (room / "log").open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                Path(__file__).with_name("holding_relay.py"),
                *map(str, (*numbers, frame_size, seconds)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file if log is None else log,
            text=True,
            pass_fds=numbers,
        )
    control.close()
    if not keep:
        upstream.close()
    running = Relay(process, room / SOCKET_NAME, room / "log")
    try:
        yield running
    finally:
        process.kill()
        process.communicate()
        if running.holder_fd >= 0:
            if running.is_held:
                signal.pidfd_send_signal(running.holder_fd, signal.SIGKILL)
            os.close(running.holder_fd)


@dataclass(eq=False)
class ScriptedSource:
    """The end of a connection that a source has."""

    sock: socket.socket
    data: bytes = b""

    def end(self) -> Literal["fin", "reset"]:
        """Read, and answer nothing, up to the end."""
        self.sock.settimeout(HANG)
        try:
            while piece := self.sock.recv(1 << 16):
                self.data += piece
        except ConnectionResetError:
            return "reset"
        return "fin"

    def is_quiet(self) -> bool:
        """Tell whether neither a byte nor an end comes."""
        return not select.select([self.sock], [], [], QUIET)[0]


@pytest.fixture
def source() -> Iterator[tuple[socket.socket, ScriptedSource]]:
    ours, theirs = loopback()
    with ours, theirs:
        yield ours, ScriptedSource(theirs)


Ends = tuple[socket.socket, ScriptedSource]


def test_before_it_is_given_a_crash_is_a_crash(source: Ends, tmp_path: Path) -> None:
    ours, theirs = source
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with relay(ours, tmp_path) as r:
        r.do("start")
        r.crash()
        assert theirs.end() == "reset"
        r.holder_ended()
        assert r.lines() == []


def test_it_keeps_the_source_frozen_until_abort(source: Ends, tmp_path: Path) -> None:
    ours, theirs = source
    host, port = ours.getpeername()
    with relay(ours, tmp_path) as r:
        r.do("start", "give", "closing", "holding")
        r.crash()
        assert theirs.is_quiet()
        assert r.is_held
        with pytest.raises(PageServerError, match=r"^expected abort, not 'status'$"):
            ask(r.path, "status", HANG)
        assert r.abort() == "the source goes on"
        assert theirs.end() == "reset"
        r.holder_ended()
        assert r.lines() == [
            f"the relay has died; the source at {host}, port {port}, stays frozen until --abort",
            "--abort: the source goes on",
        ]
        with pytest.raises(PageServerError, match="no relay is there, nor anybody who holds its source"):
            r.abort()


def test_a_reset_though_somebody_else_has_the_socket_too(source: Ends, tmp_path: Path) -> None:
    ours, theirs = source
    with relay(ours, tmp_path, keep=True) as r:
        r.do("start", "give")
        r.crash()
        assert theirs.is_quiet()
        r.abort()
        assert theirs.end() == "reset"


def test_the_time_is_up(source: Ends, tmp_path: Path) -> None:
    ours, theirs = source
    with relay(ours, tmp_path, hold_timeout=1.0) as r:
        r.do("start", "give")
        time.sleep(1.2)  # while the relay lives no time runs out
        began = time.monotonic()
        r.crash()
        assert theirs.end() == "reset"
        assert 1.0 <= time.monotonic() - began < 10.0
        r.holder_ended()
        assert r.lines()[-1] == "no --abort within 1 seconds: the source goes on"


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_source_that_goes_away_by_itself(source: Ends, tmp_path: Path, how: str, when: str) -> None:
    ours, theirs = source
    with relay(ours, tmp_path) as r:
        r.do("start", "give")
        theirs.sock.sendall(bytes(1000))  # that nobody will read
        if how == "reset":
            theirs.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if when == "before":
            theirs.sock.close()
        r.crash()
        if when == "after":
            until(lambda: len(r.lines()) == 1)
            theirs.sock.close()
        r.holder_ended()
        assert r.lines()[-1] == "the source has gone by itself"


def test_what_stops_a_service_does_not_stop_it(source: Ends, tmp_path: Path) -> None:
    ours, theirs = source
    with relay(ours, tmp_path) as r:
        r.do("start", "give")
        assert os.getsid(r.holder) == r.holder
        for _ in range(2):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.pidfd_send_signal(r.holder_fd, number)
            r.crash()
            assert theirs.is_quiet()
            assert r.is_held
        signal.pidfd_send_signal(r.holder_fd, signal.SIGKILL)
        assert theirs.end() == "reset"


def test_when_both_are_killed_the_source_goes_on(source: Ends, tmp_path: Path) -> None:
    ours, theirs = source
    with relay(ours, tmp_path) as r:
        r.do("start", "give")
        signal.pidfd_send_signal(r.holder_fd, signal.SIGKILL)
        r.holder_ended()
        assert theirs.is_quiet()
        r.crash()
        assert theirs.end() == "reset"


def test_done_tells_the_source_nothing(source: Ends, tmp_path: Path) -> None:
    ours, theirs = source
    with relay(ours, tmp_path, keep=True) as r:
        r.do("start", "give", "done")
        r.holder_ended()
        assert theirs.is_quiet()
        assert r.lines() == []


def test_somebody_at_the_control_socket_who_says_nothing(source: Ends, tmp_path: Path) -> None:
    ours, theirs = source
    with relay(ours, tmp_path) as r:
        r.do("start", "give")
        r.crash()
        with socket.socket(socket.AF_UNIX) as mute, socket.socket(socket.AF_UNIX) as gone:
            gone.connect(str(r.path))
            gone.close()
            mute.connect(str(r.path))
            assert theirs.is_quiet()
            assert r.abort() == "the source goes on"
        assert theirs.end() == "reset"


# ---- closing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 32])
@pytest.mark.parametrize("said", ["nothing", "a-byte", "a-part", "all"])
def test_closing_is_an_end_between_two_frames(source: Ends, tmp_path: Path, size: int, said: str) -> None:
    """However much of CLOSE the relay has said, the source sees at most one, and a plain end."""
    ours, theirs = source
    get = frame(size, GET, 1, PAGE, 7)
    close = FRAMES[size].pack(CLOSE, 0 if size == 24 else bytes(4), 0, 0, *([0] if size == 32 else []))
    part = {"nothing": 0, "a-byte": 1, "a-part": size - 5, "all": size}[said]
    ours.sendall(get + close[:part])
    with relay(ours, tmp_path, frame_size=size) as r:
        r.do("start", "give", "closing")
        theirs.sock.sendall(bytes(100_000))  # an answer that was under way
        r.crash()
        assert theirs.end() == "fin"
        assert theirs.data == get + (close if part else b"")
        assert r.is_held
        with pytest.raises(PageServerError, match="the destination has all pages and runs"):
            r.abort()
        theirs.sock.close()
        r.holder_ended()
        assert r.lines()[-1] == "the source has ended"


def test_closing_a_source_that_takes_nothing_more(source: Ends, tmp_path: Path) -> None:
    """What the relay asked for fills all buffers: the end comes behind it."""
    ours, theirs = source
    sent = 0
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += ours.send(bytes(10007))
    with relay(ours, tmp_path, frame_size=24) as r:
        r.do("start", "give", "closing")
        r.crash()
        until(lambda: len(r.lines()) == 1)
        time.sleep(QUIET)
        assert theirs.end() == "fin"
        assert len(theirs.data) == -(-sent // 24) * 24
        theirs.sock.close()
        r.holder_ended()


def test_an_end_stays_one_when_the_holder_is_killed(source: Ends, tmp_path: Path) -> None:
    ours, theirs = source
    with relay(ours, tmp_path) as r:
        r.do("start", "give", "closing")
        r.crash()
        assert theirs.end() == "fin"
        signal.pidfd_send_signal(r.holder_fd, signal.SIGKILL)
        r.holder_ended()
        time.sleep(QUIET)
        assert theirs.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_closing_a_source_that_resets(source: Ends, tmp_path: Path) -> None:
    ours, theirs = source
    with relay(ours, tmp_path) as r:
        r.do("start", "give", "closing")
        theirs.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.sock.close()
        r.crash()
        r.holder_ended()
        assert "the source has ended the connection: " in r.lines()[-1]


@pytest.mark.parametrize("how", ["full", "gone"])
def test_a_log_that_nobody_reads(source: Ends, tmp_path: Path, how: str) -> None:
    """A pipe that is full, or whose reader is gone, stops nothing."""
    ours, theirs = source
    reading, writing = os.pipe()
    if how == "full":
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
    else:
        os.close(reading)
    with relay(ours, tmp_path, log=writing) as r:
        os.close(writing)
        r.do("start", "give")
        r.crash()
        assert theirs.is_quiet()
        assert r.abort() == "the source goes on"
        assert theirs.end() == "reset"
        r.holder_ended()
    if how == "full":
        os.close(reading)


# ---- the relay's side -------------------------------------------------------------------------------


@pytest.fixture
def control(tmp_path: Path) -> Iterator[socket.socket]:
    with listen(tmp_path / SOCKET_NAME) as listener:
        yield listener


def test_a_holder_that_dies_is_noticed(source: Ends, control: socket.socket) -> None:
    ours, theirs = source
    holder = Holder()
    holder.start()
    holder.give(ours.fileno(), control.fileno(), 32, None)
    assert not holder.has_died
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    until(lambda: holder.has_died)
    with pytest.raises(PageServerError, match="the holder has died"):
        holder.tell("closing")
    assert theirs.is_quiet()  # we have the source still
    holder.done()
    holder.done()
    assert not holder.has_died
    holder.start()
    holder.done()


def test_a_relay_that_has_closed_its_socket_before(source: Ends, control: socket.socket) -> None:
    """The end is put off until the holder is done, and then what it would have been."""
    ours, theirs = source
    holder = Holder()
    holder.start()
    holder.give(ours.fileno(), control.fileno(), 32, None)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    ours.close()
    assert theirs.is_quiet()
    holder.done()
    assert theirs.end() == "fin"


def test_calls_out_of_order() -> None:
    holder = Holder()
    holder.done()
    with pytest.raises(ValueError, match="has not been started"):
        holder.tell("holding")
    holder.start()
    with pytest.raises(ValueError, match="it has been started"):
        holder.start()
    holder.done()


def test_a_holder_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(PageServerError, match=r"the holder cannot be started: .*No such file"):
        Holder().start()
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(PageServerError, match="the holder ended at its start, with status 7"):
        Holder().start()
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    monkeypatch.setattr(_held_linux, "_START", 0.2)
    monkeypatch.setattr(_held_linux, "_END", 0.2)
    with pytest.raises(PageServerError, match=r"the holder did not start within 0\.2 seconds"):
        Holder().start()


def test_a_process_that_has_no_descriptor_left(source: Ends, control: socket.socket) -> None:
    ours, _ = source
    holder = Holder()
    holder.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        holder.give(ours.fileno(), control.fileno(), 32, None)
        with pytest.raises(PageServerError, match=r"the holder cannot be started: .*Too many open files"):
            Holder().start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    holder.done()


def test_it_is_small() -> None:
    holder = Holder()
    holder.start()
    status = Path(f"/proc/{holder.pid}/status").read_text()
    holder.done()
    (resident,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    assert resident < 24 << 10


# ---- the control socket ----------------------------------------------------------------------------


def test_only_who_may_do_as_we_do_can_ask(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 40) / SOCKET_NAME
    path.parent.mkdir()
    with listen(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(PageServerError, match="a relay answers there"):
            listen(path)
        with pytest.raises(PageServerError, match=r"no answer within 0.1 seconds"):
            ask(path, "abort", 0.1)
    with listen(path):  # the one before is gone
        pass
    path.unlink()
    path.touch()
    with pytest.raises(PageServerError, match="it exists and is not a socket"):
        listen(path)
    with pytest.raises(PageServerError, match="no relay is there"):
        ask(tmp_path / "nowhere" / SOCKET_NAME, "abort", 1)
    with pytest.raises(PageServerError, match="--work-dir has to be a directory"):
        listen(tmp_path / "nowhere" / SOCKET_NAME)


def test_a_relay_that_closes_without_an_answer(tmp_path: Path) -> None:
    path = tmp_path / SOCKET_NAME
    with listen(path) as listener:

        def close_one() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=close_one)
        thread.start()
        with pytest.raises(PageServerError, match=r"closed without an answer|no relay is there|Broken pipe"):
            ask(path, "abort", HANG)
        thread.join()


# ---- a real source --------------------------------------------------------------------------------


@pytest.mark.criu
@pytest.mark.usefixtures("workload_program")
@pytest.mark.parametrize("how", ["before-give", "abort", "hold-timeout", "closing", "said-close"])
async def test_a_live_dump(criu: Criu, room: Path, how: str) -> None:
    spec = WorkloadSpec(size=8 << 20)
    async with (
        start_workload(spec, room) as workload,
        lazy_dump(criu, workload.pid, room / "images") as pages,
    ):
        upstream = socket.create_connection((pages.address, pages.port))
        client = Destination(upstream, criu.frame_size)
        start = spec.task_areas()[0].start
        hold_timeout = 1.0 if how == "hold-timeout" else None
        with relay(upstream, room, frame_size=criu.frame_size, hold_timeout=hold_timeout, keep=True) as r:
            upstream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            r.do("start")
            if how != "before-give":
                r.do("give")
            client.get(workload.pid, start, 4)
            # Under way when the relay dies.
            for n in range(8):
                client.send(GET, 64, start + 64 * n * PAGE, workload.pid)
            if how in {"closing", "said-close"}:
                r.do("closing")
            if how == "said-close":
                client.send(CLOSE)
            upstream.close()
            heartbeat = workload.worker().heartbeat
            r.crash()
            if how == "abort":
                await trio.sleep(QUIET)
                assert pages.job.is_running
                assert workload.worker().heartbeat == heartbeat
                assert await trio.to_thread.run_sync(r.abort) == "the source goes on"
            ended = await pages.job.wait()
            if how in {"closing", "said-close"}:
                assert ended.code == 0
                assert (await workload.wait()).signal == 9
            else:
                assert ended.code == 1
                assert (await workload.worker().verify()).is_good
            await trio.to_thread.run_sync(r.holder_ended)
