"""Lazy migrations driven by the RPC clients, with real CRIUs at both ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import criupy
from criupy import SourceOutcome
from criupy._network_linux import is_network_locked
from criupy.rpc import unlock_network
from criupy.rpc._async_lazy_client_linux import AsyncLazyDump
from criupy.rpc._lazy_linux import LazyDumpPlan, listeners
from criupy.testing._keeper_linux import Kept, keep
from criupy.testing.certificates import Certificates
from criupy.testing.control_linux import Control
from criupy.testing.criu_linux import Criu, free_port, lazy_pages_daemon, our_command
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.testing.workload_linux import Workload, find_workload, start_workload
from rpc_clients import Recorder, open_client
from rpc_victims import counter, interrupt_once, state_of, subreaper, until_reaped
from test_rpc_criu import service

pytestmark = [
    pytest.mark.criu,
    pytest.mark.spread,
    pytest.mark.usefixtures("workload_program", "nothing_is_left"),
]

MIB = 1 << 20
PROGRAM = Path(__file__).with_name("rpc_destination.py")


@pytest.fixture(params=["blocking", "trio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def images(room: Path) -> Path:
    (room / "images").mkdir()
    return room / "images"


class Destination:
    """The destination program in a pid namespace, where the pids of the source are free."""

    def __init__(self, kept: Kept, control: Control) -> None:
        self.kept = kept
        self.control = control

    @property
    def said(self) -> list[str]:
        return self.kept.output.read_text().splitlines()

    async def ends_well(self, pid: int) -> None:
        ended = await self.kept.wait()
        assert (ended.code, self.said) == (0, [str(pid), "complete"])

    async def is_good(self) -> bool:
        return (await self.control.worker().verify()).is_good


@contextlib.asynccontextmanager
async def destination(
    kind: str, criu: Criu, room: Path, workload: Workload, where: tuple[str, int] | None, **options: Any
) -> AsyncIterator[Destination]:
    control = workload.control.copy(room / "restored.control")
    host, port = where or ("", 0)
    words: list[str | Path] = [sys.executable, PROGRAM, kind, criu.path, room / "images", room / "work"]
    with contextlib.closing(control):
        async with keep(
            [*words, host, str(port), json.dumps(options)],
            keeper=find_workload(),
            output=room / "destination.out",
            namespace=True,
            binds={workload.control.path: control.path},
            cwd=room / "work",
        ) as kept:

            def gone(pid: int) -> str | None:
                if kept.ended.get(kept.pid) is None or kept.is_alive(pid):
                    return None
                return f"process {pid} ended: {kept.output.read_text()}"

            control.gone = gone
            yield Destination(kept, control)


@pytest.mark.parametrize("way", ["swrk", "service"])
async def test_migration(criu: Criu, kind: str, way: str, room: Path, images: Path) -> None:
    """A lazy dump and a lazy restore in programs of their own, our daemon between; every byte checked."""
    recorder = Recorder()
    async with contextlib.AsyncExitStack() as stack:
        workload = await stack.enter_async_context(start_workload(WorkloadSpec(size=64 * MIB), room))
        if way == "service":
            path = stack.enter_context(service(criu, room))
            how: dict[str, Any] = {"socket": path}
            port = free_port()
        else:
            how, port = {"binary": criu.path}, 0
        client = await stack.enter_async_context(open_client(kind, **how))
        async with client.block(
            "lazy_dump", workload.pid, images_dir=images, port=port, hooks=recorder, network_lock="skip"
        ) as source:
            assert recorder.scripts == ["pre-dump", "query-ext-files", "post-dump", "status-ready"]
            assert (images / "inventory.img").exists()
            assert source.address == "127.0.0.1"
            assert port in {source.port, 0}
            assert source.frame_size == criu.frame_size
            assert source.images_dir == images
            async with destination(kind, criu, room, workload, (source.address, source.port)) as there:
                await there.ends_well(workload.pid)
                assert await there.is_good()
                assert await client.run(source.wait) is SourceOutcome.KILLED
        assert source.outcome is SourceOutcome.KILLED
        assert (await workload.wait()).signal == signal.SIGKILL


async def test_a_daemon_that_listens_already(criu: Criu, kind: str, room: Path, images: Path) -> None:
    async with (
        start_workload(WorkloadSpec(size=16 * MIB), room) as workload,
        open_client(kind, binary=criu.path) as client,
    ):
        async with (
            client.block("lazy_dump", workload.pid, images_dir=images) as source,
            lazy_pages_daemon(
                our_command(), images, room / "work", source=(source.address, source.port)
            ) as daemon,
            destination(kind, criu, room, workload, None, daemon=None) as there,
        ):
            await there.ends_well(workload.pid)
            await daemon.succeed()
            assert await there.is_good()
        assert source.outcome is SourceOutcome.KILLED


def tls(certificates: Certificates, name: str) -> dict[str, Any]:
    """Options of a client that shows this certificate."""
    return {
        "tls": True,
        "tls_cacert": str(certificates.cacert),
        "tls_cacrl": str(certificates.cacrl),
        "tls_cert": str(certificates.cert(name)),
        "tls_key": str(certificates.key(name)),
    }


@pytest.mark.parametrize("daemon", ["ours", "stock"])
async def test_migration_by_tls(
    criu: Criu, kind: str, daemon: str, room: Path, images: Path, certificates: Certificates
) -> None:
    """That the source insists on TLS, the test after this one shows."""
    command = {} if daemon == "ours" else {"daemon": [str(criu.path), "lazy-pages"]}
    async with (
        start_workload(WorkloadSpec(size=16 * MIB), room) as workload,
        open_client(kind, binary=criu.path) as client,
    ):
        async with (
            client.block(
                "lazy_dump", workload.pid, images_dir=images, **tls(certificates, "server")
            ) as source,
            destination(
                kind,
                criu,
                room,
                workload,
                (source.address, source.port),
                **tls(certificates, "client"),
                **command,
            ) as there,
        ):
            await there.ends_well(workload.pid)
            assert await there.is_good()
        assert source.outcome is SourceOutcome.KILLED


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tls": False}, "the page server wants TLS: see --tls"),
        ({"name": "stranger"}, "as CRIU does with a certificate that it does not accept"),
        ({"name": "elsewhere"}, "as CRIU does with a certificate that it does not accept"),
    ],
    ids=["no TLS", "stranger", "elsewhere"],
)
async def test_a_destination_that_the_source_refuses(
    criu: Criu,
    kind: str,
    room: Path,
    images: Path,
    certificates: Certificates,
    options: dict[str, Any],
    said: str,
) -> None:
    ours = tls(certificates, options["name"]) if "name" in options else options
    async with (
        start_workload(WorkloadSpec(size=4 * MIB), room) as workload,
        open_client(kind, binary=criu.path) as client,
    ):
        with pytest.raises(criupy.CriuError):
            async with (
                client.block(
                    "lazy_dump",
                    workload.pid,
                    images_dir=images,
                    network_lock="skip",
                    **tls(certificates, "server"),
                ) as source,
                destination(kind, criu, room, workload, (source.address, source.port), **ours) as there,
            ):
                assert (await there.kept.wait()).code == 1
                assert said in there.kept.output.read_text()
                await client.run(source.wait)
        assert source.outcome is SourceOutcome.RESUMED
        assert (await workload.worker().verify()).is_good


async def test_a_certificate_that_has_expired(
    criu: Criu, kind: str, images: Path, certificates: Certificates
) -> None:
    async with open_client(kind, binary=criu.path) as client:
        with pytest.raises(
            criupy.LazyPagesError, match=r"did not become ready: .*expired\.pem: has expired on"
        ):
            async with client.block(
                "lazy_restore",
                images_dir=images,
                page_server=("127.0.0.1", free_port()),
                **tls(certificates, "expired"),
            ):
                pass


@pytest.mark.parametrize("way", ["swrk", "fd"])
async def test_abort_of_a_source_with_tls(
    criu: Criu, kind: str, way: str, room: Path, images: Path, certificates: Certificates
) -> None:
    with contextlib.ExitStack() as stack:
        victim = stack.enter_context(counter(room))
        how: dict[str, Any] = (
            {"binary": criu.path} if way == "swrk" else {"fd": stack.enter_context(given(criu))}
        )
        async with (
            open_client(kind, **how) as client,
            client.block(
                "lazy_dump", victim.pid, images_dir=images, port=free_port(), **tls(certificates, "server")
            ) as source,
        ):
            assert await client.run(source.abort) is SourceOutcome.RESUMED
            victim.assert_running()


async def test_a_stranger_that_knocks_at_a_source_with_tls(
    criu: Criu, kind: str, room: Path, images: Path, certificates: Certificates
) -> None:
    """Without TLS the mere end of its connection would be a success, and the process killed."""
    with counter(room) as victim:
        async with open_client(kind, binary=criu.path) as client:
            with pytest.raises(criupy.CriuError):
                async with client.block(
                    "lazy_dump", victim.pid, images_dir=images, **tls(certificates, "server")
                ) as source:
                    socket.create_connection((source.address, source.port)).close()
            assert source.outcome is SourceOutcome.RESUMED
        victim.assert_running()


#: Starts a program whose pipes may not grow beyond a limit: fs.pipe-max-size is the whole machine's.
LIMITED = """
import ctypes, os, struct, sys

F_SETPIPE_SZ, EPERM = 1031, 1
number = {"x86_64": 72, "aarch64": 25}[os.uname().machine]  # fcntl
program = b"".join(struct.pack("=HBBI", *step) for step in [
    (0x20, 0, 0, 0),  # BPF_LD of the system call's number
    (0x15, 0, 5, number),  # BPF_JEQ, else allow
    (0x20, 0, 0, 24),  # of args[1]
    (0x15, 0, 3, F_SETPIPE_SZ),
    (0x20, 0, 0, 32),  # of args[2]
    (0x25, 0, 1, int(sys.argv[1])),  # BPF_JGT
    (0x06, 0, 0, 0x00050000 | EPERM),  # SECCOMP_RET_ERRNO
    (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
])
memory = ctypes.create_string_buffer(program)
filter = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(memory)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(22, 2, filter) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
os.execv(sys.argv[2], sys.argv[2:])
"""


async def test_pipes_that_stay_small(criu: Criu, kind: str, room: Path, images: Path) -> None:
    """With the kernel's default limit: the task goes on here, and the error says what is to be done."""
    starter = room / "criu"
    (room / "limited.py").write_text(LIMITED)
    starter.write_text(f'#!/bin/sh\nexec {sys.executable} -I {room}/limited.py {MIB} {criu.path} "$@"\n')
    starter.chmod(0o700)
    async with (
        start_workload(WorkloadSpec(size=16 * MIB), room) as workload,
        open_client(kind, binary=starter) as client,
    ):
        with pytest.raises(criupy.CriuError) as caught:
            async with (
                client.block("lazy_dump", workload.pid, images_dir=images, network_lock="skip") as source,
                destination(kind, criu, room, workload, (source.address, source.port)) as there,
            ):
                assert (await there.kept.wait()).code == 1
                await client.run(source.wait)
        assert "sysctl -w fs.pipe-max-size=8388608" in (caught.value.hint or ""), caught.value
        assert source.outcome is SourceOutcome.RESUMED
        assert (await workload.worker().verify()).is_good


async def test_no_daemon_listens(criu: Criu, kind: str, images: Path) -> None:
    async with open_client(kind, binary=criu.path) as client:
        with pytest.raises(criupy.LazyPagesError, match=r"no lazy-pages daemon listens .* start it first"):
            async with client.block("lazy_restore", images_dir=images, daemon=None):
                pass


async def test_from_images_of_a_full_dump(criu: Criu, kind: str, room: Path, images: Path) -> None:
    """On one host: the dump has ended, so the pid is free."""
    async with (
        start_workload(WorkloadSpec(size=32 * MIB), room) as workload,
        open_client(kind, binary=criu.path) as client,
    ):
        await client.call("dump", workload.pid, images_dir=images)
        await workload.wait()
        try:
            daemon = (*our_command(), "--stats-file", "stats.json")
            async with client.block(
                "lazy_restore", images_dir=images, daemon=daemon, rst_sibling=True
            ) as restored:
                assert restored.pid == workload.pid
                workload.control.gone = lambda _: None
                assert restored.daemon.poll() in {None, 0}
                assert await client.run(restored.daemon.wait) == 0
            assert (await workload.worker().verify()).is_good
            assert json.loads((images / "stats.json").read_text())["state"] == "complete"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(workload.pid, signal.SIGKILL)
            until_reaped(workload.pid)


async def test_source_that_nobody_reaches(criu: Criu, kind: str, room: Path, images: Path) -> None:
    with counter(room) as victim:
        await_free = free_port()
        async with open_client(kind, binary=criu.path) as client:
            await client.call("dump", victim.pid, images_dir=images)
            victim.assert_killed()
            with subreaper():
                with pytest.raises(criupy.CriupyError) as caught:
                    async with client.block(
                        "lazy_restore", images_dir=images, page_server=("127.0.0.1", await_free)
                    ):
                        pass
                assert f"127.0.0.1:{await_free}" in str(caught.value) or "refused" in str(caught.value)
                until_reaped(victim.pid)


async def test_images_that_are_none(criu: Criu, kind: str, images: Path) -> None:
    async with open_client(kind, binary=criu.path) as client:
        with pytest.raises(criupy.LazyPagesError, match=r"did not become ready: .*inventory"):
            async with client.block("lazy_restore", images_dir=images):
                pass


async def test_a_daemon_that_fails_at_once(criu: Criu, kind: str, images: Path) -> None:
    async with open_client(kind, binary=criu.path) as client:
        with pytest.raises(
            criupy.LazyPagesError, match=r"did not become ready: it ended with status 3: no such luck"
        ):
            async with client.block(
                "lazy_restore", images_dir=images, daemon=["/bin/sh", "-c", "echo no such luck >&2; exit 3"]
            ):
                pass


# ---- the source alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["swrk", "service"])
async def test_abort_lets_the_process_go_on(
    criu: Criu, kind: str, way: str, room: Path, images: Path
) -> None:
    with contextlib.ExitStack() as stack:
        how: dict[str, Any] = {"binary": criu.path}
        if way == "service":
            how = {"socket": stack.enter_context(service(criu, room))}
        victim = stack.enter_context(counter(room))
        port = 0 if way == "swrk" else free_port()
        async with open_client(kind, **how) as client:
            async with client.block("lazy_dump", victim.pid, images_dir=images, port=port) as source:
                frozen = victim.count()
                await trio.sleep(0.05)
                assert victim.count() == frozen
                assert await client.run(source.abort) is SourceOutcome.RESUMED
                victim.assert_running()
            assert source.outcome is SourceOutcome.RESUMED

            with pytest.raises(ZeroDivisionError):
                async with client.block("lazy_dump", victim.pid, images_dir=images, port=port) as source:
                    raise ZeroDivisionError
            assert source.outcome is SourceOutcome.RESUMED
            victim.assert_running()


async def test_lazy_images_are_not_restored_by_accident(
    criu: Criu, kind: str, room: Path, images: Path
) -> None:
    """CRIU would try to read their memory for ever."""
    with counter(room) as victim:
        async with open_client(kind, binary=criu.path) as client:
            async with client.block("lazy_dump", victim.pid, images_dir=images) as source:
                await client.run(source.abort)
            with pytest.raises(criupy.OptionError, match=r"images_dir: .* use lazy_restore\("):
                await client.call("restore", images_dir=images)
        victim.assert_running()


async def test_a_lazy_block_is_entered_once(criu: Criu, kind: str, room: Path, images: Path) -> None:
    with counter(room) as victim:
        async with (
            open_client(kind, binary=criu.path) as client,
            client.block("lazy_dump", victim.pid, images_dir=images) as source,
        ):
            with pytest.raises(criupy.LocalProtocolError, match="the block can be entered once"):
                await client.run(source.__aenter__ if client.is_async else source.__enter__)
            assert await client.run(source.abort) is SourceOutcome.RESUMED
        victim.assert_running()


@contextlib.contextmanager
def given(criu: Criu) -> Iterator[int]:
    """Our end of a pair of sockets, with a CRIU that somebody started on the other."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            worker = subprocess.Popen(
                [criu.path, "swrk", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        with worker:
            try:
                yield ours.fileno()
            finally:
                worker.kill()


async def test_abort_over_a_given_descriptor(criu: Criu, kind: str, room: Path, images: Path) -> None:
    with counter(room) as victim, given(criu) as fd:
        async with open_client(kind, fd=fd) as client:
            async with client.block("lazy_dump", victim.pid, images_dir=images, port=free_port()) as source:
                assert await client.run(source.abort) is SourceOutcome.RESUMED
                victim.assert_running()
            assert source.outcome is SourceOutcome.RESUMED


LONELY = ["unshare", "--net"]


async def test_abort_unlocks_the_network(criu: Criu, kind: str, room: Path, images: Path) -> None:
    with counter(room, wrap=LONELY) as victim:
        netns = Path(f"/proc/{victim.pid}/ns/net")
        await until(lambda: victim.count() > 0)
        async with (
            open_client(kind, binary=criu.path) as client,
            client.block("lazy_dump", victim.pid, images_dir=images) as source,
        ):
            assert await trio.to_thread.run_sync(is_network_locked, netns)
            assert await client.run(source.abort) is SourceOutcome.RESUMED
        victim.assert_running()
        assert not is_network_locked(netns)


@pytest.mark.parametrize("step", ["aborted", "unlock_network"])
async def test_an_interrupted_abort_is_done_again(
    criu: Criu, kind: str, room: Path, images: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """As by a second Ctrl-C: what it has begun is done when the block has ended."""
    interrupt_once(monkeypatch, LazyDumpPlan, step)
    with counter(room, wrap=LONELY) as victim:
        netns = Path(f"/proc/{victim.pid}/ns/net")
        await until(lambda: victim.count() > 0)
        async with open_client(kind, binary=criu.path) as client:
            with pytest.raises(KeyboardInterrupt):
                async with client.block("lazy_dump", victim.pid, images_dir=images) as source:
                    await client.run(source.abort)
            assert source.outcome is SourceOutcome.RESUMED
        victim.assert_running()
        assert not is_network_locked(netns)


async def test_a_failure_tells_of_the_locked_network(criu: Criu, kind: str, room: Path, images: Path) -> None:
    """Nobody here can know that no destination runs the process."""
    with counter(room, wrap=LONELY) as victim:
        netns = f"/proc/{victim.pid}/ns/net"
        await until(lambda: victim.count() > 0)
        async with open_client(kind, binary=criu.path) as client:
            with pytest.raises(criupy.CriuError, match="lazy_dump: ") as caught:
                async with client.block("lazy_dump", victim.pid, images_dir=images) as source:
                    reset(source.address, source.port)
            assert source.outcome is SourceOutcome.RESUMED
            assert caught.value.__notes__ == [
                "the dumped process: resumed",
                (
                    f"its network is still locked: criupy.rpc.unlock_network('{netns}') undoes that, "
                    "once no destination runs it"
                ),
            ]
            unlock_network(netns)
            assert not is_network_locked(netns)
            victim.assert_running()


async def test_an_error_in_the_block_stays_the_one_that_is_raised(
    criu: Criu, kind: str, room: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the network cannot be unlocked after it."""
    with counter(room, wrap=LONELY) as victim:
        netns = Path(f"/proc/{victim.pid}/ns/net")
        await until(lambda: victim.count() > 0)
        async with open_client(kind, binary=criu.path) as client:
            with pytest.raises(ZeroDivisionError) as caught:
                async with client.block("lazy_dump", victim.pid, images_dir=images) as source:
                    nsenter = room / "nsenter"
                    nsenter.write_text("#!/bin/sh\necho nsenter: out of order >&2\nexit 1\n")
                    nsenter.chmod(0o755)
                    monkeypatch.setenv("PATH", f"{room}:{os.environ['PATH']}")
                    _ = 1 / 0
            monkeypatch.undo()
            assert source.outcome is SourceOutcome.RESUMED
            assert caught.value.__notes__ == [
                f"unlock_network: expected a network namespace, {netns}: nsenter: out of order"
            ]
            unlock_network(netns)
            victim.assert_running()


@pytest.mark.parametrize("wrap", [[], LONELY])
async def test_abort_while_another_task_waits(criu: Criu, room: Path, images: Path, wrap: list[str]) -> None:
    outcomes: list[SourceOutcome] = []

    async def abort(source: AsyncLazyDump) -> None:
        await trio.testing.wait_all_tasks_blocked(0.1)
        with pytest.raises(criupy.LocalProtocolError, match=r"another task waits already; only abort\(\)"):
            await source.wait()
        outcomes.append(await source.abort())

    with counter(room, wrap=wrap) as victim:
        await until(lambda: victim.count() > 0)
        async with criupy.AsyncCriu(criu.path) as client:
            async with (
                client.lazy_dump(victim.pid, images_dir=images) as source,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(abort, source)
                with pytest.raises(criupy.CriuDied, match="lazy_dump: ") as caught:
                    await source.wait()
                assert caught.value.__notes__ == ["the dumped process: resumed"]
            assert outcomes == [source.outcome] == [SourceOutcome.RESUMED]
            victim.assert_running()
            assert not is_network_locked(f"/proc/{victim.pid}/ns/net")


async def test_abort_from_outside_of_the_block(criu: Criu, room: Path, images: Path) -> None:
    """The block ends as soon as CRIU has, and the network is still to be unlocked."""
    outcomes: list[SourceOutcome] = []

    async def abort(source: AsyncLazyDump) -> None:
        outcomes.append(await source.abort())

    with counter(room, wrap=LONELY) as victim:
        await until(lambda: victim.count() > 0)
        async with criupy.AsyncCriu(criu.path) as client, trio.open_nursery() as nursery:
            with pytest.raises(criupy.CriuDied):
                async with client.lazy_dump(victim.pid, images_dir=images) as source:
                    nursery.start_soon(abort, source)
        assert outcomes == [source.outcome] == [SourceOutcome.RESUMED]
        victim.assert_running()
        assert not is_network_locked(f"/proc/{victim.pid}/ns/net")


async def test_abort_after_it_has_failed(criu: Criu, kind: str, room: Path, images: Path) -> None:
    with counter(room, wrap=LONELY) as victim:
        netns = f"/proc/{victim.pid}/ns/net"
        await until(lambda: victim.count() > 0)
        async with (
            open_client(kind, binary=criu.path) as client,
            client.block("lazy_dump", victim.pid, images_dir=images) as source,
        ):
            reset(source.address, source.port)
            with pytest.raises(criupy.CriuError, match="lazy_dump: "):
                await client.run(source.wait)
            assert is_network_locked(netns)
            assert await client.run(source.abort) is SourceOutcome.RESUMED
            assert not is_network_locked(netns)


async def test_destination_that_resets(criu: Criu, kind: str, room: Path, images: Path) -> None:
    """The migration fails before its time: an error, and the process goes on here."""
    with counter(room) as victim:
        async with open_client(kind, binary=criu.path) as client:
            with pytest.raises(criupy.CriuError, match="lazy_dump: ") as caught:
                async with client.block("lazy_dump", victim.pid, images_dir=images) as source:
                    reset(source.address, source.port)
            assert source.outcome is SourceOutcome.RESUMED
            assert caught.value.__notes__ == ["the dumped process: resumed"]
            victim.assert_running()


async def test_cancelled_with_a_destination_connected(criu: Criu, room: Path, images: Path) -> None:
    """Somebody may run the process already, so only the connection's end decides."""
    with counter(room) as victim:
        async with criupy.AsyncCriu(criu.path) as client:
            with trio.CancelScope() as scope:
                async with client.lazy_dump(victim.pid, images_dir=images) as source:
                    with socket.create_connection((source.address, source.port)) as sock:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        worker = source._running._peer_pid
                        assert worker is not None
                        await until(lambda: not listeners(worker))
                        scope.cancel()
                        frozen = victim.count()
                        with trio.CancelScope(shield=True):
                            await trio.sleep(0.2)
                        assert victim.count() == frozen
                        assert source.outcome is None
                    await trio.lowlevel.checkpoint()
            assert scope.cancelled_caught
            assert source.outcome is SourceOutcome.RESUMED
            victim.assert_running()


async def test_process_that_dies_while_it_is_served(criu: Criu, kind: str, room: Path, images: Path) -> None:
    with counter(room) as victim:
        async with open_client(kind, binary=criu.path) as client:
            with pytest.raises(criupy.CriuError):
                async with client.block("lazy_dump", victim.pid, images_dir=images) as source:
                    victim.process.kill()
                    await until(lambda: state_of(victim.pid) in {None, "Z"})
                    reset(source.address, source.port)
            assert source.outcome is SourceOutcome.LOST


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", None])
async def test_where_it_listens(criu: Criu, room: Path, images: Path, address: str | None) -> None:
    """Up to 4.2 CRIU listens on all interfaces, whatever the request says; a configuration file counts."""
    with counter(room) as victim:
        async with (
            criupy.AsyncCriu(criu.path) as client,
            client.lazy_dump(victim.pid, images_dir=images, address=address) as source,
        ):
            worker = source._running._peer_pid
            assert worker is not None
            assert listeners(worker) == [(source.address, source.port)]
            assert source.address == (address or "0.0.0.0")
            await source.abort()


async def test_the_callers_configuration_file_counts(criu: Criu, room: Path, images: Path) -> None:
    config = room / "criu.conf"
    config.write_text("log-file from-config.log")
    with counter(room) as victim:
        async with (
            criupy.AsyncCriu(criu.path) as client,
            client.lazy_dump(victim.pid, images_dir=images, config_file=config) as source,
        ):
            assert source.address == "127.0.0.1"
            await source.abort()
    assert (images / "from-config.log").exists()


async def test_port_in_use(criu: Criu, kind: str, room: Path, images: Path) -> None:
    with counter(room) as victim, socket.create_server(("127.0.0.1", 0)) as taken:
        async with open_client(kind, binary=criu.path) as client:
            with pytest.raises(criupy.CriuError, match="Address already in use"):
                async with client.block(
                    "lazy_dump", victim.pid, images_dir=images, port=taken.getsockname()[1]
                ):
                    pass
        victim.assert_running()


async def test_what_a_lazy_dump_is_not(criu: Criu, kind: str, room: Path, images: Path) -> None:
    async with open_client(kind, binary=criu.path) as client:
        for wrong in ({"leave_running": True}, {"address": "localhost"}, {"port": -1}, {"lazy_pages": True}):
            with pytest.raises(criupy.OptionError, match=next(iter(wrong))):
                async with client.block("lazy_dump", 1, images_dir=images, **wrong):
                    pass
        with pytest.raises(criupy.OptionError, match=r"lazy_dump\(\) or lazy_restore\(\)"):
            await client.call("dump", 1, images_dir=images, lazy_pages=True)
    with service(criu, room) as path:
        async with open_client(kind, socket=path) as client:
            with pytest.raises(criupy.OptionError, match="port"):
                async with client.block("lazy_dump", 1, images_dir=images):
                    pass


def reset(address: str, port: int) -> None:
    with socket.create_connection((address, port)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
