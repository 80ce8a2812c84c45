"""criupy.runc with a program in runC's place: what is done at moments that a real one is rarely caught at."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from criupy._kill_linux import kill_trees
from criupy._proc_linux import tracer_of
from criupy.errors import LazyPagesError, RuncError, RuncTimeout
from criupy.rpc import Features, SourceOutcome
from criupy.rpc._daemon_linux import OUR_DAEMON
from criupy.rpc._report import LogWatch
from criupy.runc import AsyncRunc, Runc
from criupy.runc._criu_linux import was_reached
from criupy.runc._left_linux import _parse
from criupy.runc._plans_linux import CheckpointPlan, RestorePlan
from criupy.testing.wait import until
from rpc_clients import Client
from rpc_victims import children, interrupt_once, until_reaped

pytestmark = pytest.mark.slow

RUNC = """#!/bin/bash
# runc --log FILE --log-format json COMMAND ... CONTAINER
log=$2
shift 4
command=$1
shift
echo "$command $*" >>"$(dirname "$0")/calls"
while [ $# -gt 1 ]; do
    [ "$1" = --status-fd ] && status_fd=$2
    shift
done
. "$(dirname "$0")/$command"
"""


NO_CONTAINER = """echo '{"level":"error","msg":"container does not exist"}' >>"$log"; exit 1\n"""


@pytest.fixture
def process() -> Iterator[int]:
    """What the container's first process is said to be."""
    with subprocess.Popen(["sleep", "1000"]) as sleeping:
        yield sleeping.pid
        sleeping.kill()


@pytest.fixture(params=["blocking", "trio"])
def client(request: pytest.FixtureRequest, tmp_path: Path, process: int) -> Client:
    """A client whose runC does what the files beside it say."""
    program = tmp_path / "runc"
    program.write_text(RUNC)
    program.chmod(0o755)
    kind: Any = AsyncRunc if request.param == "trio" else Runc
    runc = kind(program, grace=0.5)
    runc._features = Features(mem_track=True, lazy_pages=True, pidfd_store=True)
    say(tmp_path, "state", state(process, "running"))
    return Client(runc)


def say(tmp_path: Path, command: str, script: str) -> None:
    (tmp_path / command).write_text(script)


def state(pid: int, status: str) -> str:
    return f"echo '{json.dumps({'id': 'web', 'status': status, 'pid': pid, 'bundle': '/b'})}'\n"


def calls(tmp_path: Path) -> list[str]:
    return [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]


def bundle(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def where(tmp_path: Path) -> dict[str, Any]:
    return {"image_path": tmp_path / "images", "page_server": ("127.0.0.1", 7)}


async def test_a_pre_dump_that_is_given_up_leaves_nothing_frozen(
    client: Client, tmp_path: Path, process: int
) -> None:
    say(tmp_path, "checkpoint", f"cp '{tmp_path}/frozen' '{tmp_path}/state'; exec sleep 1000\n")
    say(tmp_path, "frozen", state(process, "paused"))
    say(tmp_path, "resume", "")
    with pytest.raises(RuncTimeout):
        await client.call("pre_dump", "web", image_path=tmp_path / "images", request_timeout=0.5)
    assert calls(tmp_path) == ["state", "checkpoint", "state", "resume"]


async def test_what_was_paused_before_stays_so(client: Client, tmp_path: Path, process: int) -> None:
    say(tmp_path, "state", state(process, "paused"))
    say(tmp_path, "checkpoint", "exec sleep 1000\n")
    with pytest.raises(RuncTimeout):
        await client.call("pre_dump", "web", image_path=tmp_path / "images", request_timeout=0.3)
    with pytest.raises(RuncTimeout):
        async with client.block("lazy_checkpoint", "web", **where(tmp_path), request_timeout=0.3):
            pass
    assert {"resume", "pause"}.isdisjoint(calls(tmp_path))


ORPHAN = """
setsid bash -c 'echo $$ >"{pid}"; exec sleep 1000' </dev/null >/dev/null 2>&1 &
until [ -s "{pid}" ]; do sleep 0.01; done
{ready}
kill -9 $$
"""


@pytest.mark.parametrize("ready", [True, False])
async def test_a_runc_that_dies_leaves_an_orphan_that_is_ended(
    client: Client, tmp_path: Path, ready: bool
) -> None:
    """It holds the container, and is known by the status descriptor that it has inherited."""
    pidfile = tmp_path / "orphan"
    script = ORPHAN.format(pid=pidfile, ready="printf '\\0' >&$status_fd" if ready else "")
    say(tmp_path, "checkpoint", script)
    if ready:
        async with client.block("lazy_checkpoint", "web", **where(tmp_path)) as checkpoint:
            # Nobody listens, as when a destination was quick: the address is what CRIU was told.
            assert (checkpoint.address, checkpoint.port) == ("127.0.0.1", 7)
            assert is_alive(pidfile)
            assert await client.run(checkpoint.abort) is SourceOutcome.RESUMED
    else:
        with pytest.raises(RuncError, match="was killed by SIGKILL"):
            async with client.block("lazy_checkpoint", "web", **where(tmp_path)):
                pass
    assert not is_alive(pidfile)


def is_alive(pidfile: Path) -> bool:
    try:
        words = Path("/proc", pidfile.read_text().strip(), "stat").read_text().split()
    except FileNotFoundError:
        return False
    return words[2] not in "ZX"


@pytest.mark.parametrize("ended", [None, 0, 1])
@pytest.mark.parametrize("log", [None, b"(00.1) Error", b"(00.2) Restore finished successfully.\n"])
@pytest.mark.parametrize("daemon", ["ours", "ours, with options", "ours, installed", "stock", None])
@pytest.mark.parametrize("is_old", [False, True])
def test_what_may_be_killed_of_a_restore(
    tmp_path: Path, ended: int | None, log: bytes | None, daemon: str | None, *, is_old: bool
) -> None:
    words = {
        "ours": OUR_DAEMON,
        "ours, with options": (*OUR_DAEMON, "--reconnect", "60"),
        "ours, installed": ("/usr/bin/criupy-lazy-pages", "--lanes", "1"),
        "stock": ("criu", "lazy-pages"),
        None: None,
    }[daemon]
    plan = RestorePlan("web", bundle(tmp_path), tmp_path, None, None, words, None, {}, None)
    if is_old and log is not None:
        (tmp_path / "restore.log").write_bytes(log)
    plan._log = LogWatch.of(tmp_path, "restore.log")
    if not is_old and log is not None:
        (tmp_path / "restore.log").write_bytes(log)
    is_finished = log is not None and b"finished" in log and not is_old
    # Our own daemon has vetoed what is not finished, and then ends with 1; others know nothing.
    is_ours = daemon is not None and daemon.startswith("ours")
    expected = ended is None if is_ours and ended != 0 else is_finished
    assert plan.may_run(ended) is expected


#: trio has a handler of its own for Ctrl-C, which knows when it may be raised.
only_blocking = pytest.mark.parametrize("client", ["blocking"], indirect=True)


@only_blocking
def test_an_interrupt_does_not_leave_what_is_killed_half_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    def interrupted(roots: Any) -> None:
        if not interruptions:
            interruptions.append(1)
            signal.raise_signal(signal.SIGINT)
        kill_trees(roots)

    interruptions: list[int] = []
    monkeypatch.setattr("criupy.runc._criu_linux.kill_trees", interrupted)
    say(tmp_path, "checkpoint", f"echo $$ >'{tmp_path}/pid'; exec sleep 1000\n")
    checkpoint = client.client.lazy_checkpoint("web", **where(tmp_path), request_timeout=0.3)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.__enter__()
    deadline = time.monotonic() + 5
    while is_alive(tmp_path / "pid"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@only_blocking
@pytest.mark.parametrize("method", ["lazy_checkpoint", "pre_dump"])
def test_an_interrupt_at_the_start_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Client, method: str
) -> None:
    real = type(client.client._program).start

    def interrupted(program: Any, name: str, *arguments: Any, **options: Any) -> Any:
        command = real(program, name, *arguments, **options)
        if name == "checkpoint":
            signal.raise_signal(signal.SIGINT)
        return command

    monkeypatch.setattr(type(client.client._program), "start", interrupted)
    say(tmp_path, "checkpoint", "exec sleep 1000\n")
    before = children()
    with pytest.raises(KeyboardInterrupt):
        if method == "pre_dump":
            client.client.pre_dump("web", image_path=tmp_path / "images")
        else:
            client.client.lazy_checkpoint("web", **where(tmp_path)).__enter__()
    assert children() == before


@pytest.mark.parametrize("when", ["at the start", "in the block", "by an error", "in a pre-dump"])
async def test_an_interrupted_abort_is_done_again(
    client: Client, tmp_path: Path, process: int, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    before = children()
    script = f"cp '{tmp_path}/frozen' '{tmp_path}/state'; "
    script += "printf '\\0' >&$status_fd; " if when in {"in the block", "by an error"} else ""
    say(tmp_path, "checkpoint", f"{script}exec sleep 1000\n")
    say(tmp_path, "frozen", state(process, "paused"))
    say(tmp_path, "resume", "")
    interrupt_once(monkeypatch, type(client.client), "_run")
    found: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        if when == "in a pre-dump":
            await client.call("pre_dump", "web", image_path=tmp_path / "images", request_timeout=1)
        else:
            async with client.block(
                "lazy_checkpoint", "web", **where(tmp_path), request_timeout=1
            ) as checkpoint:
                found.append(checkpoint)
                # Nobody listens here, as after a destination has come.
                monkeypatch.setattr(CheckpointPlan, "is_unreached", lambda _: when == "by an error")
                if when == "by an error":
                    raise ZeroDivisionError
                await client.run(checkpoint.abort)
    assert calls(tmp_path)[-1] == "resume"
    assert children() == before
    assert [each.outcome for each in found] == [SourceOutcome.RESUMED] * len(found)


CRIU = f"""#!{sys.executable} -S
import ctypes, os, pathlib, sys, time
pid, ready = int(sys.argv[1]), pathlib.Path(sys.argv[2])
if ctypes.CDLL(None).ptrace(0x4206, pid, 0, 0):  # PTRACE_SEIZE
    sys.exit("it cannot be traced")
ready.touch()
time.sleep(2 if sys.argv[3] == "serves" else 60)
pathlib.Path("dump.log").write_text("(00.1) Starting lazy pages server\\n" if sys.argv[3] == "serves" else "")
pathlib.Path("later").touch()
time.sleep(1000)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="to trace any process takes root")
@pytest.mark.parametrize("then", ["serves", "hangs"])
@pytest.mark.parametrize("method", ["lazy_checkpoint", "pre_dump", "abort_checkpoint"])
async def test_no_criu_is_killed_in_the_midst(
    client: Client, tmp_path: Path, process: int, method: str, then: str
) -> None:
    """The container has code of CRIU's in it then. One that does not come further is killed all the same."""
    criu, seized = tmp_path / "criu", tmp_path / "seized"
    criu.write_text(CRIU)
    criu.chmod(0o755)
    start = f"cd '{tmp_path}'; ./criu {process} '{seized}' {then} & wait"
    client.client._program = dataclasses.replace(
        client.client._program, grace=30 if then == "serves" else 0.2
    )
    if method == "abort_checkpoint":
        async with trio.open_nursery() as nursery:
            command = partial(trio.run_process, ["bash", "-c", start], check=False, start_new_session=True)
            nursery.start_soon(command)
            await until(seized.exists)
            assert await client.call("abort_checkpoint", "web", force=True) is SourceOutcome.RESUMED
    else:
        say(tmp_path, "checkpoint", start + "\n")
        with pytest.raises(RuncTimeout):
            if method == "pre_dump":
                await client.call("pre_dump", "web", image_path=tmp_path / "images", request_timeout=1)
            else:
                async with client.block("lazy_checkpoint", "web", **where(tmp_path), request_timeout=1):
                    pass
    assert seized.exists()
    assert (tmp_path / "later").exists() is (then == "serves")
    assert tracer_of(process) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="to trace any process takes root")
async def test_a_pre_dump_that_fails_touches_no_others_criu(
    client: Client, tmp_path: Path, process: int
) -> None:
    """It fails because of that, which serves, and whose destination may run the container."""
    criu, seized = tmp_path / "criu", tmp_path / "seized"
    criu.write_text(CRIU.replace("time.sleep(2 ", "time.sleep(0 "))
    criu.chmod(0o755)
    say(tmp_path, "checkpoint", "exit 1\n")
    async with trio.open_nursery() as nursery:
        words = [str(criu), str(process), str(seized), "serves"]
        command = partial(trio.run_process, words, check=False, cwd=tmp_path)
        other = await nursery.start(command)
        await until((tmp_path / "later").exists)
        with pytest.raises(RuncError):
            await client.call("pre_dump", "web", image_path=tmp_path / "images")
        assert tracer_of(process) == other.pid
        assert other.poll() is None
        other.kill()


async def test_an_interrupted_abort_of_what_is_left_is_done_again(
    client: Client, tmp_path: Path, process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(tmp_path, "state", state(process, "paused"))
    say(tmp_path, "resume", "")
    interrupt_once(monkeypatch, type(client.client), "_run")
    with pytest.raises(KeyboardInterrupt):
        await client.call("abort_checkpoint", "web", force=True)
    assert calls(tmp_path) == ["state", "state", "state", "resume"]


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What a restore is given that expects a daemon of somebody else's, which listens already."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "lazy-pages.socket"))
        yield {"bundle": bundle(tmp_path), "image_path": tmp_path, "daemon": None}


async def test_an_interrupted_restore_is_ended_all_the_same(
    client: Client, tmp_path: Path, listening: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    say(tmp_path, "restore", f"sleep 1000 || {{ touch '{tmp_path}/undone'; exit 1; }}\n")
    say(tmp_path, "state", NO_CONTAINER)
    interrupt_once(monkeypatch, RestorePlan, "kill_criu")
    client.client._program = dataclasses.replace(client.client._program, grace=5.0)
    with pytest.raises(KeyboardInterrupt):
        async with client.block("lazy_restore", "web", **listening, request_timeout=0.3):
            pass
    assert (tmp_path / "undone").exists()
    assert children() == before


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
async def test_what_may_run_is_not_killed_for_want_of_time(
    client: Client, tmp_path: Path, listening: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything done to what CRIU needs still."""
    say(
        tmp_path,
        "restore",
        f"echo 'Restore finished successfully' >'{tmp_path}/restore.log'; exec sleep 1000\n",
    )
    say(tmp_path, "state", NO_CONTAINER)
    monkeypatch.setattr(RestorePlan, "tidy", lambda *_: pytest.fail("it is not for a container that runs"))
    client.client._program = dataclasses.replace(client.client._program, grace=0.0)
    before = children()
    with pytest.raises(RuncTimeout) as caught:
        async with client.block("lazy_restore", "web", **listening, request_timeout=1):
            pass
    assert caught.value.__notes__ == ["container web was restored nevertheless, and runs"]
    (runs,) = set(children()) - set(before)
    os.kill(runs, signal.SIGKILL)
    until_reaped(runs)
    del caught
    gc.collect()  # the warning is of this test


async def test_a_daemon_that_is_not_ready_in_time(client: Client, tmp_path: Path) -> None:
    say(tmp_path, "state", NO_CONTAINER)
    daemon = tmp_path / "daemon"
    daemon.write_text("#!/bin/sh\nexec sleep 1000\n")
    daemon.chmod(0o755)
    how = {"bundle": bundle(tmp_path), "image_path": tmp_path, "request_timeout": 0.3}
    with pytest.raises(RuncTimeout, match="restore web: the lazy-pages daemon did not become ready in time"):
        async with client.block("lazy_restore", "web", **how, daemon=[str(daemon)]):
            pass
    with pytest.raises(LazyPagesError, match=r"no lazy-pages daemon listens in .*: start it first"):
        async with client.block("lazy_restore", "web", **how, daemon=None):
            pass


async def test_a_pre_dump_has_one_deadline(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes before it takes of its time."""
    given: list[float] = []
    real = type(client.client)._end

    def end(runc: Any, command: Any, request_timeout: float | None = None) -> Any:
        given.append(request_timeout or 0.0)
        return real(runc, command, request_timeout)

    monkeypatch.setattr(type(client.client), "_end", end)
    say(tmp_path, "checkpoint", "")
    await client.call("pre_dump", "web", image_path=tmp_path / "images", request_timeout=100)
    asked, dumped = given
    assert 100 > asked > dumped


async def test_a_restore_that_succeeded_is_never_undone(client: Client, tmp_path: Path) -> None:
    """Whatever is asked of runC afterwards: its daemon goes on."""
    done = tmp_path / "done"
    daemon = tmp_path / "daemon"
    daemon.write_text(
        f"#!{sys.executable}\nimport os, pathlib, sys, time\n"
        "os.write(int(sys.argv[sys.argv.index('--status-fd') + 1]), bytes(1))\n"
        f"time.sleep(1)\npathlib.Path({str(done)!r}).touch()\n"
    )
    daemon.chmod(0o755)
    say(tmp_path, "restore", f"echo 'exit 3' >'{tmp_path}/state'\n")
    say(tmp_path, "state", NO_CONTAINER)
    how = {"bundle": bundle(tmp_path), "image_path": tmp_path, "daemon": [str(daemon)]}
    with pytest.raises(RuncError, match="runc state web: ended with status 3") as caught:
        async with client.block("lazy_restore", "web", **how):
            pass
    assert done.exists()
    assert caught.value.__notes__ == ["container web was restored nevertheless, and runs"]


async def test_a_restore_that_has_not_started_criu_yet(client: Client, tmp_path: Path) -> None:
    """There is nothing to kill at first, and then there is; what runC starts later is not let go on."""
    before = children()
    wait = "SECONDS=0; while [ $SECONDS -lt 1 ]; do :; done"
    say(tmp_path, "restore", f"{wait}\nsleep 1000 || {{ touch '{tmp_path}/undone'; exit 1; }}\n")
    say(tmp_path, "state", NO_CONTAINER)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "lazy-pages.socket"))
        how = {"bundle": bundle(tmp_path), "image_path": tmp_path, "daemon": None, "request_timeout": 0.3}
        runc = client.client
        runc._program = dataclasses.replace(runc._program, grace=5.0)
        with pytest.raises(RuncTimeout):
            async with client.block("lazy_restore", "web", **how):
                pass
    assert (tmp_path / "undone").exists()  # when its child was killed, it could do what runC does then
    assert children() == before


async def test_a_criu_that_has_lost_its_daemon(client: Client, tmp_path: Path) -> None:
    """It may hang, and runC with it."""
    daemon = tmp_path / "daemon"
    daemon.write_text(
        f"#!{sys.executable}\nimport os, sys, time\n"
        "os.write(int(sys.argv[sys.argv.index('--status-fd') + 1]), bytes(1))\n"
        "time.sleep(0.5)\nsys.exit(7)\n"
    )
    daemon.chmod(0o755)
    say(tmp_path, "restore", "exec sleep 1000\n")
    say(tmp_path, "state", NO_CONTAINER)
    how = {"bundle": bundle(tmp_path), "image_path": tmp_path, "daemon": [str(daemon)]}
    with pytest.raises(RuncError, match="the lazy-pages daemon has ended, and CRIU did not") as caught:
        async with client.block("lazy_restore", "web", **how):
            pass
    assert caught.value.hint == "the lazy-pages daemon ended with status 7: it said nothing"


def test_what_we_have_forked_is_no_criu(tmp_path: Path) -> None:
    """It inherits the status descriptor as CRIU does."""
    (tmp_path / "images").mkdir()
    plan = CheckpointPlan("web", tmp_path / "images", ("127.0.0.1", 7), None, None, {})
    reading, writing = os.pipe()
    plan._status_pipe = str(Path(f"/proc/self/fd/{writing}").readlink())
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        assert list(plan._other_holders(0)) == []
        with subprocess.Popen(["sleep", "1000"], pass_fds=[writing]) as other:
            try:
                assert list(plan._other_holders(0)) == [other.pid]
                assert list(plan._other_holders(other.pid)) == []
            finally:
                other.kill()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


async def test_a_frozen_cgroup_that_a_checkpoint_has_left(
    client: Client, tmp_path: Path, process: int
) -> None:
    """Without a CRIU, and without a lock: so it may be paused because somebody wants it."""
    say(tmp_path, "state", state(process, "paused"))
    say(tmp_path, "resume", "")
    with pytest.raises(RuncError, match="it is paused, and nothing tells of a checkpoint - if"):
        await client.call("abort_checkpoint", "web")
    assert await client.call("abort_checkpoint", "web", force=True) is SourceOutcome.RESUMED
    assert calls(tmp_path) == ["state", "state", "state", "resume"]


async def test_an_abort_that_did_not_do_all_is_repeated(client: Client, tmp_path: Path, process: int) -> None:
    say(tmp_path, "checkpoint", "printf '\\0' >&$status_fd; exec sleep 1000\n")
    async with client.block("lazy_checkpoint", "web", **where(tmp_path)) as checkpoint:
        say(tmp_path, "state", state(process, "paused"))
        say(tmp_path, "resume", "exit 1")
        with pytest.raises(RuncError, match="runc resume web: ended with status 1"):
            await client.run(checkpoint.abort)
        say(tmp_path, "resume", "")
        assert await client.run(checkpoint.abort) is SourceOutcome.RESUMED
    assert calls(tmp_path).count("resume") == 2


@pytest.mark.parametrize(
    ("words", "others", "root"),
    [
        ("runc checkpoint web", ["checkpoint", "web"], "/run/runc"),
        ("runc checkpoint web --lazy-pages --status-fd 3", ["checkpoint", "web"], "/run/runc"),
        ("runc --root /r/ -log x checkpoint --image-path db web", ["checkpoint", "web"], "/r"),
        ("runc --debug --root=/r/../s checkpoint --page-server=h:1 web", ["checkpoint", "web"], "/s"),
        ("runc -root", [], "."),
    ],
)
def test_what_runc_was_told(words: str, others: list[str], root: str) -> None:
    assert _parse(words.split()) == (others, root)


@pytest.mark.parametrize(
    ("log", "reached"),
    [
        (None, True),
        ("Error", False),
        ("(00.1) Starting lazy pages server\n", False),  # it is about to listen
        ("(00.1) Starting lazy pages server\n(00.2) Accepted connection from 10.0.0.1:40000\n", True),
    ],
)
def test_whether_a_destination_has_come(tmp_path: Path, log: str | None, *, reached: bool) -> None:
    """It goes on for a while after it has closed, and does not listen any more."""
    if log is not None:
        (tmp_path / "dump.log").write_text(log)
    with subprocess.Popen(["sleep", "1000"], cwd=tmp_path) as criu:
        try:
            assert was_reached(criu.pid) is reached
        finally:
            criu.kill()
    program = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE) as criu:
        try:
            assert criu.stdout is not None
            assert criu.stdout.read(1)
            assert not was_reached(criu.pid)
        finally:
            criu.kill()


@pytest.mark.parametrize("status", ["kill -9 $$", "exit 3"])
async def test_a_daemon_that_is_killed_leaves_zeros(client: Client, tmp_path: Path, status: str) -> None:
    daemon = tmp_path / "daemon"
    daemon.write_text(
        "#!/bin/bash\nwhile [ $# -gt 1 ]; do [ $1 = --status-fd ] && fd=$2; shift; done\n"
        f"printf '\\0' >&$fd\nsleep 0.7\n{status}\n"
    )
    daemon.chmod(0o755)
    say(tmp_path, "restore", f"cp '{tmp_path}/running' '{tmp_path}/state'\n")
    say(tmp_path, "running", state(1, "running"))
    say(tmp_path, "state", NO_CONTAINER)
    how = {"bundle": bundle(tmp_path), "image_path": tmp_path, "daemon": [str(daemon)]}
    with pytest.raises(LazyPagesError, match="may read zeros where its memory had not come: kill it"):
        async with client.block("lazy_restore", "web", **how):
            pass
    with pytest.raises(ZeroDivisionError) as caught:
        say(tmp_path, "state", """echo '{"level":"error","msg":"does not exist"}' >>"$log"; exit 1\n""")
        async with client.block("lazy_restore", "web", **how):
            _ = 1 / 0
    assert "may read zeros" in caught.value.__notes__[0]


async def test_a_container_that_another_checkpoint_holds(
    client: Client, tmp_path: Path, process: int
) -> None:
    """Nothing of the other's is undone: not its lock, not its hold."""
    program = (
        "import ctypes, sys, time; libc = ctypes.CDLL(None, use_errno=True); "
        "libc.ptrace(0x4206, int(sys.argv[1]), 0, 0); print(flush=True); time.sleep(1000)"  # PTRACE_SEIZE
    )
    with subprocess.Popen([sys.executable, "-c", program, str(process)], stdout=subprocess.PIPE) as tracer:  # noqa: ASYNC220
        try:
            assert tracer.stdout is not None
            assert tracer.stdout.read(1)
            with pytest.raises(
                RuncError, match=f"process {tracer.pid} traces it: another checkpoint is under way"
            ):
                async with client.block("lazy_checkpoint", "web", **where(tmp_path)):
                    pass
            with pytest.raises(RuncError, match=f"process {tracer.pid} traces it, and is no CRIU"):
                await client.call("abort_checkpoint", "web")
            assert tracer.poll() is None
        finally:
            tracer.kill()
    assert calls(tmp_path) == ["state", "state"]
