"""criupy.runc: what it refuses, what it raises, and that a container survives whatever goes wrong."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from container_hosts import NAME, kill, open_hosts, processes, runc_on, wait_until
from criupy._network_linux import is_network_locked
from criupy._proc_linux import tracer_of
from criupy.errors import CriuUnavailable, LazyPagesError, OptionError, RuncError, RuncTimeout
from criupy.rpc import SourceOutcome, unlock_network
from criupy.runc import AsyncRunc, Runc
from criupy.runc._mounts_linux import mounts_below
from criupy.testing.containers_linux import Lab
from criupy.testing.criu_linux import Criu, free_port
from rpc_clients import Client

pytestmark = [pytest.mark.criu, pytest.mark.slow]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Criu]]:
    """Two hosts, and a web server on the first that every test leaves as it was."""
    with open_hosts(tmp_path_factory.mktemp("hosts") / "lab") as (lab, criu):
        lab.start_server(lab.a, NAME)
        yield lab, criu


@pytest.fixture(params=["blocking", "trio"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def lab(hosts: tuple[Lab, Criu]) -> Iterator[Lab]:
    lab, _ = hosts
    yield lab
    assert lab.a.status(NAME) == "running"
    assert lab.b.status(NAME) is None
    wait_until(10, "the server answers", lab.answers)
    assert processes(lab.a, "criu") == []
    assert processes(lab.b, "criu") == []


@pytest.fixture
def source(hosts: tuple[Lab, Criu], kind: str) -> Client:
    return runc_on(hosts[0].a, hosts[1], kind)


@pytest.fixture
def destination(hosts: tuple[Lab, Criu], kind: str) -> Client:
    return runc_on(hosts[0].b, hosts[1], kind, grace=2)


def where(lab: Lab, tmp_path: Path) -> dict[str, Any]:
    return {
        "image_path": tmp_path / "images",
        "page_server": (lab.a.address, free_port()),
        "tcp_established": True,
    }


def daemon_on(lab: Lab) -> list[str]:
    return lab.b.words(sys.executable, "-m", "criupy.lazy_pages")


@contextlib.asynccontextmanager
async def frozen(lab: Lab, source: Client, tmp_path: Path) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    """A checkpoint that serves, and what its destination is told."""
    how = where(lab, tmp_path)
    async with source.block("lazy_checkpoint", NAME, **how) as checkpoint:
        assert lab.a.status(NAME) == "running"  # as runC sees it: its processes are stopped by CRIU
        assert not lab.answers()
        yield checkpoint, {**how, "bundle": lab.b.bundle, "daemon": daemon_on(lab)}


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - it happens in other processes
        await trio.sleep(0.001)


@contextlib.contextmanager
def runc_checkpoint(
    lab: Lab, tmp_path: Path, *, is_ready: bool = True, name_last: bool = True
) -> Iterator[subprocess.Popen[bytes]]:
    """A checkpoint that nobody controls."""
    host, port = where(lab, tmp_path)["page_server"]
    words = ["--lazy-pages", "--page-server", f"{host}:{port}", "--tcp-established"]
    reading, writing = os.pipe()
    with open(reading, "rb") as status:  # noqa: PTH123 - a descriptor
        options = [*words, "--image-path", str(tmp_path), "--status-fd", str(writing)]
        options = [*options, NAME] if name_last else [NAME, *options]
        with subprocess.Popen(
            lab.a.runc("checkpoint", *options), pass_fds=[writing], env={**os.environ, "PATH": lab.path}
        ) as command:
            os.close(writing)
            try:
                assert not is_ready or status.read(1) == b"\0"
                yield command
            finally:
                command.kill()


def still_locked(pid: int) -> str:
    return (
        f"its network is still locked: criupy.rpc.unlock_network('/proc/{pid}/ns/net') undoes that, "
        "once no destination runs it"
    )


# ---- the source ----------------------------------------------------------------------------------


async def test_abort(lab: Lab, source: Client, tmp_path: Path) -> None:
    async with frozen(lab, source, tmp_path) as (checkpoint, how):
        assert (checkpoint.address, checkpoint.port) == how["page_server"]
        assert (checkpoint.image_path / "inventory.img").exists()
        assert await source.run(checkpoint.abort) is SourceOutcome.RESUMED
        assert lab.answers()  # its network was locked with it
        assert await source.run(checkpoint.wait) is SourceOutcome.RESUMED
    assert checkpoint.outcome is SourceOutcome.RESUMED


@pytest.mark.parametrize("name_last", [True, False])
async def test_abort_from_elsewhere(lab: Lab, source: Client, tmp_path: Path, *, name_last: bool) -> None:
    """The controller may be gone, and what it started goes on."""
    with pytest.raises(RuncError, match="no checkpoint of it is under way, and none has left anything"):
        await source.call("abort_checkpoint", NAME)
    with pytest.raises(RuncError, match="no such container"):
        await source.call("abort_checkpoint", "nobody")
    with runc_checkpoint(lab, tmp_path, name_last=name_last) as command:
        with pytest.raises(RuncError, match=r"process \d+ traces it.*abort_checkpoint\(\) ends one"):
            async with source.block("lazy_checkpoint", NAME, **where(lab, tmp_path / "second")):
                pass
        assert not lab.answers()
        with pytest.raises(
            RuncError, match=r"CRIU \(process \d+\) holds it still - abort_checkpoint\(\) ends"
        ):
            await source.call("unlock_network", NAME)
        assert not lab.answers()
        assert await source.call("abort_checkpoint", NAME) is SourceOutcome.RESUMED
        assert lab.answers()
        assert command.wait() == -signal.SIGKILL


async def test_abort_of_what_has_just_begun(lab: Lab, source: Client, tmp_path: Path) -> None:
    """runC may not even have started CRIU."""
    for number in range(8):
        with runc_checkpoint(lab, tmp_path / str(number), is_ready=False) as command:
            await until(lambda: processes(lab.a, "runc") != [])  # before, it is not runC
            await trio.sleep(number * 0.02)
            assert await source.call("abort_checkpoint", NAME) is SourceOutcome.RESUMED
            assert command.wait() == -signal.SIGKILL
        assert processes(lab.a, "criu") == []
        assert lab.answers()


KNOCK = """
import socket, sys
knocking = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print(flush=True)
input()
"""


async def test_abort_after_a_destination_has_connected(lab: Lab, source: Client, tmp_path: Path) -> None:
    with pytest.raises(RuncError) as caught:
        async with frozen(lab, source, tmp_path) as (checkpoint, _):
            words = lab.b.words(sys.executable, "-c", KNOCK, checkpoint.address, str(checkpoint.port))
            with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as destination:  # noqa: ASYNC220
                assert destination.stdout is not None
                assert destination.stdout.read(1)
                with pytest.raises(RuncError, match=r"a destination has connected.* abort with force=True"):
                    await source.call("abort_checkpoint", NAME)
                assert not lab.answers()
                assert await source.call("abort_checkpoint", NAME, force=True) is SourceOutcome.RESUMED
                destination.communicate()
    assert caught.value.status == -signal.SIGKILL
    assert checkpoint.outcome is SourceOutcome.RESUMED


async def test_several_abort_at_once(lab: Lab, source: Client, tmp_path: Path) -> None:
    async with frozen(lab, source, tmp_path) as (checkpoint, _), trio.open_nursery() as nursery:
        for _ in range(3 if source.is_async else 1):
            nursery.start_soon(source.run, checkpoint.abort)
    with runc_checkpoint(lab, tmp_path / "another"):
        ends: list[object] = []

        async def abort() -> None:
            try:
                ends.append(await source.call("abort_checkpoint", NAME))
            except RuncError as error:  # another one has undone all
                ends.append(error.message)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(abort)
    nothing = "no checkpoint of it is under way, and none has left anything"
    assert SourceOutcome.RESUMED in ends
    assert set(ends) <= {SourceOutcome.RESUMED, nothing}
    assert lab.answers()


async def test_abort_after_it_has_failed(lab: Lab, source: Client, tmp_path: Path) -> None:
    async with frozen(lab, source, tmp_path) as (checkpoint, _):
        for pid in processes(lab.a, "criu"):
            kill(pid)
        with pytest.raises(RuncError):
            await source.run(checkpoint.wait)
        assert not lab.answers()
        assert await source.run(checkpoint.abort) is SourceOutcome.RESUMED
        assert lab.answers()


@pytest.mark.parametrize("kind", ["trio"], indirect=True)
async def test_abort_from_outside_of_the_block(lab: Lab, source: Client, tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(RuncError):
            async with frozen(lab, source, tmp_path) as (checkpoint, _):
                nursery.start_soon(checkpoint.abort)
    assert checkpoint.outcome is SourceOutcome.RESUMED
    assert lab.answers()


async def test_two_checkpoints_at_once(lab: Lab, source: Client, tmp_path: Path) -> None:
    """One is told, and leaves the other's lock and hold alone."""
    held, told = trio.Event(), trio.Event()
    errors: list[BaseException] = []

    async def freeze(number: int) -> None:
        how = where(lab, tmp_path / str(number))
        try:
            async with source.block("lazy_checkpoint", NAME, **how) as checkpoint:
                held.set()
                await told.wait()
                assert not lab.answers()
                assert await source.run(checkpoint.abort) is SourceOutcome.RESUMED
        except RuncError as error:
            errors.append(error)
            told.set()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(freeze, number)
    assert held.is_set()
    assert len(errors) == 1
    # The one that was quicker to be refused says it in the error itself.
    told_of = [*getattr(errors[0], "__notes__", ()), str(errors[0])]
    assert any("another checkpoint" in each for each in told_of), told_of
    assert lab.answers()


async def test_a_container_that_is_killed_while_it_is_held(lab: Lab, source: Client, tmp_path: Path) -> None:
    """Its network namespace has a name, and may get another container."""
    try:
        async with frozen(lab, source, tmp_path) as (checkpoint, _):
            subprocess.run(lab.a.runc("kill", NAME, "KILL"), check=True)  # noqa: ASYNC221
            outcome = await source.run(checkpoint.abort)
        assert outcome is SourceOutcome.LOST
        assert not is_network_locked(f"/run/netns/{lab.a.container_network}")
    finally:
        subprocess.run(lab.a.runc("delete", "--force", NAME), check=True)  # noqa: ASYNC221
        lab.start_server(lab.a, NAME)


@pytest.mark.parametrize("when", ["frozen", "serving"])
async def test_abort_from_elsewhere_without_runc(lab: Lab, source: Client, tmp_path: Path, when: str) -> None:
    with runc_checkpoint(lab, tmp_path, is_ready=when == "serving") as command:
        if when == "frozen":
            pid = (await source.call("state", NAME)).pid
            await until(lambda: tracer_of(pid) != 0)
        command.kill()
        command.wait()
        assert await source.call("abort_checkpoint", NAME) is SourceOutcome.RESUMED
    assert lab.a.status(NAME) == "running"
    assert lab.answers()


async def test_an_error_in_the_block_aborts(lab: Lab, source: Client, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with frozen(lab, source, tmp_path) as (checkpoint, _):
            _ = 1 / 0
    assert checkpoint.outcome is SourceOutcome.RESUMED


async def test_not_ready_in_time(lab: Lab, source: Client, tmp_path: Path) -> None:
    """However far the checkpoint has come, the container goes on; a cgroup that was frozen is thawed."""
    await source.call("features")
    rng = random.Random(7)
    given_up = 0
    for number in range(12):
        how = {**where(lab, tmp_path / str(number)), "request_timeout": rng.uniform(0.05, 0.3)}
        try:
            async with source.block("lazy_checkpoint", NAME, **how) as checkpoint:
                await source.run(checkpoint.abort)
        except RuncTimeout as error:
            assert re.fullmatch(rf"runc (state|checkpoint) {NAME}: not done after 0\.\d\d s", str(error))
            if error.command == "checkpoint":
                assert error.__notes__ == ["the container: resumed"]
            given_up += 1
        assert lab.answers()
    assert given_up


async def test_a_container_that_is_paused_stays_so(lab: Lab, source: Client, tmp_path: Path) -> None:
    subprocess.run(lab.a.runc("pause", NAME), check=True)  # noqa: ASYNC221
    try:
        async with source.block("lazy_checkpoint", NAME, **where(lab, tmp_path)) as checkpoint:
            assert await source.run(checkpoint.abort) is SourceOutcome.RESUMED
        assert lab.a.status(NAME) == "paused"
    finally:
        subprocess.run(lab.a.runc("resume", NAME), check=True)  # noqa: ASYNC221


async def test_cancelled_while_getting_ready(lab: Lab, hosts: tuple[Lab, Criu], tmp_path: Path) -> None:
    source = runc_on(lab.a, hosts[1], "trio")
    await source.call("features")
    with trio.move_on_after(0.15) as scope:
        async with source.block("lazy_checkpoint", NAME, **where(lab, tmp_path)):
            await trio.sleep(math.inf)
    assert scope.cancelled_caught
    assert lab.answers()


async def test_runc_is_killed_when_it_serves(lab: Lab, source: Client, tmp_path: Path) -> None:
    first = (await source.call("state", NAME)).pid
    with pytest.raises(RuncError, match=f"checkpoint {NAME}: was killed by SIGKILL") as caught:
        async with frozen(lab, source, tmp_path) as (checkpoint, _):
            for pid in processes(lab.a, "runc"):
                kill(pid)
            # CRIU still serves, so nothing is decided yet.
            with trio.move_on_after(0.3) as scope:
                await source.run(checkpoint.wait) if source.is_async else await trio.sleep(0.3)
            assert scope.cancelled_caught or not source.is_async
            for pid in processes(lab.a, "criu"):
                kill(pid)
    assert caught.value.__notes__ == [
        "the container: resumed",
        still_locked(first),
    ]
    await source.call("unlock_network", NAME)


async def test_runc_is_killed_before(lab: Lab, source: Client, tmp_path: Path) -> None:
    """CRIU is then nobody's child, and holds the container if it was not ended."""
    rng = random.Random(3)
    nr_killed = 0
    for number in range(8):
        nr_killed += await kill_before(lab, source, tmp_path / str(number), rng)
        assert lab.answers()
    assert nr_killed > 0


async def kill_before(lab: Lab, source: Client, tmp_path: Path, rng: random.Random) -> bool:
    """Kill runC before it is ready; tell whether that came in time."""
    is_ready = False
    async with trio.open_nursery() as nursery:

        async def kill_it() -> None:
            await until(lambda: bool(processes(lab.a, "criu")))
            await trio.sleep(rng.uniform(0.0, 0.2))
            if not is_ready:
                for pid in processes(lab.a, "runc"):
                    kill(pid)

        nursery.start_soon(kill_it)
        try:
            async with source.block("lazy_checkpoint", NAME, **where(lab, tmp_path)) as checkpoint:
                is_ready = True
                assert await source.run(checkpoint.abort) is SourceOutcome.RESUMED
        except RuncError as error:
            assert "was killed by SIGKILL" in error.message
            return True
    return False


async def test_a_checkpoint_that_is_given_up_at_any_time(lab: Lab, source: Client, tmp_path: Path) -> None:
    """While CRIU has code of its own in the tasks it is not killed: they would run into that."""
    rng = random.Random(3)
    nr_given_up = 0
    await source.call("features")
    for number in range(8):
        how = {**where(lab, tmp_path / str(number)), "request_timeout": rng.uniform(0.1, 0.35)}
        try:
            async with source.block("lazy_checkpoint", NAME, **how) as checkpoint:
                assert await source.run(checkpoint.abort) is SourceOutcome.RESUMED
        except RuncTimeout as error:
            assert error.__notes__ == ["the container: resumed"]
            nr_given_up += 1
        assert lab.answers()
    assert nr_given_up > 0


async def test_the_dump_fails(lab: Lab, source: Client, tmp_path: Path) -> None:
    """CRIU refuses a client's connection where nobody said that it may have one."""
    how = where(lab, tmp_path)
    del how["tcp_established"]
    with lab.client() as client, pytest.raises(RuncError, match="Connected TCP socket") as caught:
        wait_until(5, "the client is connected", lambda: "ESTAB" in sockets_of(lab))
        async with source.block("lazy_checkpoint", NAME, **how):
            pass
    client.kill()
    error = caught.value
    assert (error.command, error.container, error.status) == ("checkpoint", NAME, 1)
    assert error.hint is not None
    assert "tcp_established=True" in error.hint
    assert error.log_file == str(tmp_path / "images" / "dump.log")
    assert any("Connected TCP socket" in line for line in error.log_errors)
    assert any("criu failed" in line for line in error.log_lines)
    assert error.__notes__ == ["the container: resumed"]


def sockets_of(lab: Lab) -> str:
    words = ["nsenter", f"--net=/run/netns/{lab.a.container_network}", "ss", "-tn"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


async def test_an_address_that_criu_does_not_heed(lab: Lab, source: Client, tmp_path: Path) -> None:
    """Its configuration here has the host's own address."""
    how = {**where(lab, tmp_path), "page_server": ("127.0.0.1", free_port())}
    with pytest.raises(RuncError, match=f"CRIU listens on {lab.a.address}, not on 127.0.0.1") as caught:
        async with source.block("lazy_checkpoint", NAME, **how):
            pass
    assert caught.value.hint is not None
    assert "`address 127.0.0.1`" in caught.value.hint
    assert caught.value.__notes__ == ["the container: resumed"]


LISTEN = """
import socket, sys
listening = socket.create_server((sys.argv[1], int(sys.argv[2])))
print(flush=True)
sys.stdin.read()
"""


async def test_a_port_that_is_taken(lab: Lab, source: Client, tmp_path: Path) -> None:
    how = where(lab, tmp_path)
    address, port = how["page_server"]
    words = lab.a.words(sys.executable, "-c", LISTEN, address, str(port))
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as taken:  # noqa: ASYNC220
        assert taken.stdout is not None
        assert taken.stdout.read(1)
        with pytest.raises(RuncError, match=r"Address already in use.* take another port"):
            async with source.block("lazy_checkpoint", NAME, **how):
                pass
        taken.communicate()


# ---- the destination -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def refused_by(lab: Lab, source: Client, tmp_path: Path) -> AsyncIterator[dict[str, Any]]:
    """A checkpoint whose destination comes to nothing, which its controller then says."""
    async with frozen(lab, source, tmp_path) as (checkpoint, how):
        yield how
        # The daemon had reset the source by then, or had not connected.
        assert await source.run(checkpoint.abort) is SourceOutcome.RESUMED


async def test_a_restore_that_fails(lab: Lab, source: Client, destination: Client, tmp_path: Path) -> None:
    config = lab.b.bundle / "config.json"
    text = config.read_text()
    async with refused_by(lab, source, tmp_path) as how:
        config.write_text(text.replace(str(lab.b.bundle.parent / "site"), "/nowhere/at/all"))
        try:
            with pytest.raises(RuncError, match=f"runc restore {NAME}: ") as caught:
                async with destination.block("lazy_restore", NAME, **how):
                    pass
        finally:
            config.write_text(text)
    assert caught.value.status == 1
    assert "/nowhere/at/all" in str(caught.value)


@pytest.mark.parametrize("program", ["runc", "criu"])
async def test_a_restore_that_is_killed(
    lab: Lab, source: Client, destination: Client, tmp_path: Path, program: str
) -> None:
    """Without CRIU runC waits for ever, since what CRIU has forked keeps the socket to it open."""
    limit = {"request_timeout": 3.0} if program == "criu" else {}

    async def kill_it() -> None:
        await until((tmp_path / "images" / "restore.log").exists)
        for pid in processes(lab.b, program):
            kill(pid)

    async with refused_by(lab, source, tmp_path) as how, trio.open_nursery() as nursery:
        nursery.start_soon(kill_it)
        with pytest.raises(RuncError, match=f"runc restore {NAME}: ") as caught:
            async with destination.block("lazy_restore", NAME, **how, **limit):
                pass
    # runC had mounted the root in its state, which it removes with all that is in it, and CRIU the cgroups.
    assert mounts_below(lab.b.root) == []
    assert mounts_below(tmp_path) == []
    assert (lab.root / "usr" / "sbin" / "nginx").exists()
    if program == "runc":
        assert caught.value.status == -9
        assert "half made: runc delete --force removes that" in caught.value.__notes__[0]
        subprocess.run(lab.b.runc("delete", "--force", NAME), check=True)  # noqa: ASYNC221


async def test_a_restore_not_done_in_time(
    lab: Lab, source: Client, destination: Client, tmp_path: Path
) -> None:
    config = lab.b.bundle / "criu.conf"
    text = config.read_text()
    await destination.call("features")
    async with refused_by(lab, source, tmp_path) as how:
        slow = tmp_path / "slow"
        slow.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != setup-namespaces ] || sleep 3\n')
        slow.chmod(0o755)
        config.write_text(f"{text}action-script {slow}\n")
        try:
            with pytest.raises(RuncTimeout):
                async with destination.block("lazy_restore", NAME, **how, request_timeout=1.5):
                    pass
        finally:
            config.write_text(text)


async def test_a_veto_of_the_daemon_leaves_the_network_locked(
    lab: Lab, source: Client, destination: Client, tmp_path: Path
) -> None:
    """Nobody at the source can know that no destination runs the container."""
    first = (await source.call("state", NAME)).pid
    with pytest.raises(RuncError) as caught:
        async with frozen(lab, source, tmp_path) as (checkpoint, how):

            async def kill_daemon() -> None:
                await until(lambda: not checkpoint._plan.is_unreached())
                for pid in processes(lab.b, Path(sys.executable).name):
                    kill(pid)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill_daemon)
                with pytest.raises(RuncError) as vetoed:
                    async with destination.block("lazy_restore", NAME, **how):
                        pass
            # Here, too: CRIU had locked it already.
            netns = f"/run/netns/{lab.b.container_network}"
            # CRIU ends by itself, or hangs.
            assert "the lazy-pages daemon was killed by SIGKILL" in str(vetoed.value)
            assert (
                f"its network is still locked: criupy.rpc.unlock_network('{netns}') undoes that, "
                "before it is tried again"
            ) in vetoed.value.__notes__
            await trio.to_thread.run_sync(unlock_network, netns)
            assert not is_network_locked(netns)
            await source.run(checkpoint.wait)
    assert caught.value.__notes__ == [
        "the container: resumed",
        still_locked(first),
    ]
    assert not lab.answers()
    await source.call("unlock_network", NAME)


async def test_a_name_that_is_taken(lab: Lab, source: Client, tmp_path: Path) -> None:
    with pytest.raises(RuncError, match="there is a container of that name already, and it is running"):
        async with source.block(
            "lazy_restore", NAME, bundle=lab.a.bundle, image_path=tmp_path, page_server=("127.0.0.1", 1)
        ):
            pass


async def test_images_that_are_none(lab: Lab, destination: Client, tmp_path: Path) -> None:
    with pytest.raises(LazyPagesError, match=r"did not become ready.*inventory\.img"):
        async with destination.block(
            "lazy_restore", NAME, bundle=lab.b.bundle, image_path=tmp_path, page_server=("127.0.0.1", 1)
        ):
            pass


# ---- there and back ------------------------------------------------------------------------------


async def test_there_and_back(lab: Lab, source: Client, destination: Client, tmp_path: Path) -> None:
    """And back into a network that was locked when the container left it."""
    before = await source.call("state", NAME)
    assert (before.status, before.bundle) == ("running", lab.a.bundle)
    async with frozen(lab, source, tmp_path / "there") as (checkpoint, how):
        async with destination.block("lazy_restore", NAME, **how) as restored:
            lab.switch_to(lab.b)
            assert lab.answers()
            assert restored.daemon is not None
        assert await source.run(checkpoint.wait) is SourceOutcome.KILLED
    after = await destination.call("state", NAME)
    assert (after.status, after.pid) == ("running", restored.pid)
    assert await source.call("state", NAME) is None
    back = {
        "image_path": tmp_path / "back",
        "page_server": (lab.b.address, free_port()),
        "tcp_established": True,
    }
    async with destination.block("lazy_checkpoint", NAME, **back) as checkpoint:
        daemon = lab.a.words(sys.executable, "-m", "criupy.lazy_pages")
        async with source.block("lazy_restore", NAME, **back, bundle=lab.a.bundle, daemon=daemon):
            lab.switch_to(lab.a)
            wait_until(5, "the server answers", lab.answers)
    assert checkpoint.outcome is SourceOutcome.KILLED


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "how", "option"),
    [
        ("lazy_checkpoint", {"page_server": ("host.example", 7)}, "page_server"),
        ("lazy_checkpoint", {"page_server": ("127.0.0.1", 0)}, "page_server"),
        ("lazy_checkpoint", {"page_server": "127.0.0.1:7"}, "page_server"),
        ("lazy_checkpoint", {"page_server": ("127.0.0.1", 7), "tcp_close": True}, "tcp_close"),
        ("lazy_checkpoint", {"page_server": ("127.0.0.1", 7), "tcp_established": 1}, "tcp_established"),
        ("lazy_checkpoint", {"page_server": ("127.0.0.1", 7), "parent_path": "/pre"}, "parent_path"),
        ("lazy_checkpoint", {"page_server": ("127.0.0.1", 7), "parent_path": "../no"}, "parent_path"),
        ("lazy_checkpoint", {"page_server": ("127.0.0.1", 7), "image_path": ""}, "image_path"),
        ("lazy_restore", {"page_server": ("h", 7), "daemon": None}, "page_server"),
        ("lazy_restore", {"page_server": ("h", 70000)}, "page_server"),
        ("lazy_restore", {"daemon": "criu"}, "daemon"),
        ("lazy_restore", {"bundle": 3}, "bundle"),
        ("lazy_restore", {"bundle": "/nowhere"}, "bundle"),
        ("lazy_restore", {"stdio": (0, 1, -1)}, "stdio"),
        ("lazy_restore", {"stdio": (0,)}, "stdio"),
    ],
)
def test_options_are_refused(
    tmp_path: Path, kind: str, method: str, how: dict[str, Any], option: str
) -> None:

    client: Any = AsyncRunc() if kind == "trio" else Runc()
    (tmp_path / "config.json").write_text("{}")
    given = {"bundle": tmp_path} if method == "lazy_restore" else {}
    with pytest.raises(OptionError) as caught:
        getattr(client, method)("web", **{"image_path": tmp_path, **given, **how})
    assert caught.value.option == option


@pytest.mark.parametrize(
    ("how", "option"),
    [
        ({"criu": "/opt/criu-4.2"}, "criu"),
        ({"binary": ""}, "binary"),
        ({"grace": None}, "grace"),
        ({"request_timeout": -1}, "request_timeout"),
    ],
)
def test_clients_are_refused(how: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        Runc(**how)
    assert caught.value.option == option


@pytest.mark.parametrize("name", ["", "-f"])
def test_names_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="container"):
        Runc().state(name)


async def test_no_such_container(lab: Lab, source: Client, tmp_path: Path) -> None:
    assert await source.call("state", "nobody") is None
    with pytest.raises(RuncError, match="runc checkpoint nobody: there is no such container"):
        async with source.block("lazy_checkpoint", "nobody", **where(lab, tmp_path)):
            pass
    with pytest.raises(RuncError, match="there is no such container"):
        await source.call("unlock_network", "nobody")


@pytest.mark.parametrize("path", ["criu", "/nowhere/criu"])
def test_no_criu(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CriuUnavailable, match=r"there is no (such )?program.*name .* with criu=$"):
        Runc(criu=path).features()


def test_no_runc() -> None:
    with pytest.raises(RuncError, match="there is no program runc-of-tomorrow on PATH - install runC"):
        Runc("runc-of-tomorrow").state("web")


async def test_no_dirty_tracking(lab: Lab, source: Client, tmp_path: Path) -> None:
    if (await source.call("features")).mem_track:
        await source.call("pre_dump", NAME, image_path=tmp_path)
        assert (tmp_path / "stats-dump").exists()
        return
    with pytest.raises(RuncError, match="CRIU lacks mem_track on this kernel - criupy check"):
        await source.call("pre_dump", NAME, image_path=tmp_path)
