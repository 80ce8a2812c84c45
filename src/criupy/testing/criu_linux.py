"""Real CRIU, for tests: find it, dump with it, restore with it, clean up after it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from criupy.errors import CriupyError
from criupy.testing._keeper_linux import Ended, Kept, keep
from criupy.testing.workload_linux import find_workload

__all__ = [
    "Criu",
    "CriuJob",
    "CriuJobError",
    "Restored",
    "caches",
    "dump",
    "find_criu",
    "free_port",
    "lazy_dump",
    "lazy_pages_daemon",
    "our_command",
    "page_server",
    "parent_options",
    "pre_dump",
    "relay",
    "restore",
    "stock_command",
]

ADDRESS = "127.0.0.1"
_ERROR_LINE = re.compile(r"Error \(")
# logged by every run without CAP_SYS_RESOURCE, and harmless
_HARMLESS = "RLIMIT_NOFILE"


class CriuJobError(CriupyError):
    """A process of a migration ended otherwise than it should; its log's errors are in the message."""


@dataclass(frozen=True, slots=True)
class Criu:
    """A CRIU program that starts on this machine."""

    path: Path
    version: tuple[int, ...]

    @property
    def frame_size(self) -> Literal[24, 32]:
        """Bytes of a page-server frame; it grew in 4.2 (criu/page-xfer.c)."""
        return 32 if self.version >= (4, 2) else 24

    @property
    def unlocked(self) -> tuple[str, ...]:
        """Options of a dump that leaves the network as it is, for sources that go on; 3.19 can do that."""
        return ("--network-lock", "skip") if self.version >= (3, 19) else ()

    def __str__(self) -> str:
        return f"criu-{'.'.join(map(str, self.version))}"


def caches() -> tuple[Path, Path]:
    """Return where the set-up puts what it fetches: the system's cache, or the user's own."""
    own = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path("/var/cache/criupy"), Path(own, "criupy")


def _candidates() -> Iterator[Path]:
    yield from (Path(name) for name in os.environ.get("CRIUPY_CRIU", "").split(":") if name)
    for cache in caches():
        yield from sorted(cache.glob("criu-*/bin/criu"))
    system = shutil.which("criu")
    if system:
        yield Path(system)


def find_criu() -> tuple[tuple[Criu, ...], tuple[str, ...]]:
    """Return the usable CRIUs, newest first and one per version, and why others are not.

    Looked for: the path list in CRIUPY_CRIU, the private ones in criupy's cache, then PATH.
    """
    found: dict[tuple[int, ...], Criu] = {}
    reasons = []
    if not sys.platform.startswith("linux"):
        return (), ("CRIU runs on Linux only",)
    if os.geteuid() != 0:
        return (), ("dumping and restoring needs root",)
    for path in _candidates():
        try:
            shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
            continue
        match = re.search(r"^Version: (\d+(?:\.\d+)*)", shown.stdout, re.MULTILINE)
        if match is None:
            reasons.append(f"{path}: does not start on this kernel ({shown.stderr.strip() or 'no version'})")
            continue
        version = tuple(map(int, match[1].split(".")))
        found.setdefault(version, Criu(path, version))
    if not found and not reasons:
        reasons.append("no criu in CRIUPY_CRIU, in criupy's cache (`make test` fetches one) or on PATH")
    return tuple(found[version] for version in sorted(found, reverse=True)), tuple(reasons)


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True, eq=False)
class CriuJob:
    """A process with a log: criu in one of its roles, or another lazy-pages daemon."""

    name: str
    kept: Kept
    log: Path

    async def wait(self) -> Ended:
        """Wait until it has ended."""
        return await self.kept.wait()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.kept.is_alive(self.kept.pid)

    def errors(self) -> tuple[str, ...]:
        """Return the error lines of its log, or else the last lines of its output."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        found = [line for line in lines if _ERROR_LINE.search(line) and _HARMLESS not in line]
        return tuple(found or self.kept.output.read_text(errors="replace").splitlines()[-3:])

    def failure(self, ended: Ended, expected: str) -> CriuJobError:
        """Make the error that says how it ended and what its log says."""
        said = "; ".join(self.errors()[-4:]) or "it said nothing"
        return CriuJobError(f"{self.name} ended with {ended}, not {expected}: {said} ({self.log})")

    async def succeed(self) -> Ended:
        """Wait for the end; raise CriuJobError unless it is exit status 0."""
        ended = await self.wait()
        if ended.code != 0:
            raise self.failure(ended, "0")
        return ended


@contextlib.asynccontextmanager
async def _start(
    name: str,
    command: Sequence[str | os.PathLike[str]],
    work_dir: Path,
    *,
    log: Path,
    ready: bool,
    namespace: bool = False,
    binds: Mapping[Path, Path] | None = None,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[CriuJob]:
    """Run a command that logs to `log`; when `ready`, wait for the zero byte on its --status-fd."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    words = [*command, "--status-fd", str(writing)] if ready else [*command]
    async with contextlib.AsyncExitStack() as stack:
        status = await stack.enter_async_context(trio.lowlevel.FdStream(reading))
        try:
            kept = await stack.enter_async_context(
                keep(
                    words,
                    keeper=find_workload(),
                    output=work_dir / f"{name}.out",
                    namespace=namespace,
                    binds=binds,
                    pass_fds=(writing,) if ready else (),
                    cwd=work_dir,
                    env=env,
                )
            )
        finally:
            os.close(writing)
        job = CriuJob(name, kept, log)
        if ready:
            word = await status.receive_some()
            if word != b"\0":
                raise job.failure(await job.wait(), "a zero byte on its status descriptor")
        yield job


def _common(images_dir: Path, work_dir: Path, log: str) -> list[str | os.PathLike[str]]:
    return ["--no-default-config", "-D", images_dir, "-W", work_dir, "-o", log, "-v4"]


async def dump(
    criu: Criu, pid: int, images_dir: Path, *, leave_running: bool = False, extra: Iterable[str] = ()
) -> None:
    """Dump a tree fully; it is gone afterwards unless `leave_running`."""
    await trio.Path(images_dir).mkdir(parents=True, exist_ok=True)
    words = [criu.path, "dump", "-t", str(pid), *_common(images_dir, images_dir, "dump.log")]
    words += [*criu.unlocked, *(["--leave-running"] if leave_running else []), *extra]
    async with _start("dump", words, images_dir, log=images_dir / "dump.log", ready=False) as job:
        await job.succeed()


def parent_options(images_dir: Path, parent: Path | None) -> list[str]:
    """Return the options of a dump that leaves to `parent` what did not change since, or of the first one."""
    if parent is None:
        return ["--track-mem"]
    return ["--track-mem", "--prev-images-dir", os.path.relpath(parent, images_dir)]


async def pre_dump(
    criu: Criu, pid: int, images_dir: Path, *, parent: Path | None = None, extra: Iterable[str] = ()
) -> None:
    """Copy the memory of a tree that goes on, without what `parent`, an earlier pre-dump, has of it."""
    await trio.Path(images_dir).mkdir(parents=True, exist_ok=True)
    words = [criu.path, "pre-dump", "-t", str(pid), *_common(images_dir, images_dir, "pre-dump.log")]
    words += [*parent_options(images_dir, parent), *extra]
    async with _start("pre-dump", words, images_dir, log=images_dir / "pre-dump.log", ready=False) as job:
        await job.succeed()


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Something that serves pages at an address: a live lazy dump or a page server."""

    job: CriuJob
    address: str
    port: int
    frame_size: Literal[24, 32]


@contextlib.asynccontextmanager
async def lazy_dump(
    criu: Criu, pid: int, images_dir: Path, *, extra: Iterable[str] = ()
) -> AsyncIterator[Source]:
    """Dump a tree lazily: the body runs while criu serves the frozen tree's pages.

    When criu still runs on leaving it is killed, and the tree resumes.
    """
    await trio.Path(images_dir).mkdir(parents=True, exist_ok=True)
    port = free_port()
    words = [criu.path, "dump", "-t", str(pid), *_common(images_dir, images_dir, "dump.log")]
    words += ["--lazy-pages", "--address", ADDRESS, "--port", str(port), *criu.unlocked, *extra]
    async with _start("dump", words, images_dir, log=images_dir / "dump.log", ready=True) as job:
        yield Source(job, ADDRESS, port, criu.frame_size)


@contextlib.asynccontextmanager
async def page_server(
    criu: Criu, images_dir: Path, work_dir: Path, *, extra: Iterable[str] = ()
) -> AsyncIterator[Source]:
    """Serve the pages of full images with criu's own page server."""
    port = free_port()
    words = [criu.path, "page-server", "--lazy-pages", *_common(images_dir, work_dir, "page-server.log")]
    words += ["--address", ADDRESS, "--port", str(port), *extra]
    async with _start("page-server", words, work_dir, log=work_dir / "page-server.log", ready=True) as job:
        yield Source(job, ADDRESS, port, criu.frame_size)


@contextlib.asynccontextmanager
async def relay(
    source: Source,
    images_dir: Path,
    work_dir: Path,
    *,
    address: str = ADDRESS,
    port: int | None = None,
    extra: Iterable[str] = (),
) -> AsyncIterator[Source]:
    """Stand between a live lazy dump and its destination with criupy's relay."""
    port = free_port() if port is None else port
    words: list[str | os.PathLike[str]] = [sys.executable, "-m", "criupy.page_server"]
    words += ["-D", images_dir, "-W", work_dir, "-o", "relay.log", "-v4"]
    words += [
        "--upstream",
        f"{source.address}:{source.port}",
        "--address",
        address,
        "--port",
        str(port),
        *extra,
    ]
    async with _start("relay", words, work_dir, log=work_dir / "relay.log", ready=True) as job:
        yield Source(job, address, port, source.frame_size)


def stock_command(criu: Criu) -> tuple[str, ...]:
    """Return the command line that starts criu's own lazy-pages daemon."""
    return (str(criu.path), "lazy-pages")


def our_command() -> tuple[str, ...]:
    """Return the command line that starts criupy's daemon with this interpreter."""
    return (sys.executable, "-m", "criupy.lazy_pages")


@contextlib.asynccontextmanager
async def lazy_pages_daemon(
    command: Sequence[str],
    images_dir: Path,
    work_dir: Path,
    *,
    source: tuple[str, int] | None = None,
    extra: Iterable[str] = (),
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[CriuJob]:
    """Run a lazy-pages daemon and wait until its socket listens in `work_dir`.

    Pages come from `source`, an address and a port, or else from the local images.
    """
    words = [*command, *_common(images_dir, work_dir, "lazy-pages.log")]
    if source is not None:
        words += ["--page-server", "--address", source[0], "--port", str(source[1])]
    log = work_dir / "lazy-pages.log"
    async with _start("lazy-pages", [*words, *extra], work_dir, log=log, ready=True, env=env) as job:
        yield job


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """A restore in a pid namespace of its own; everything in it is killed on leaving."""

    job: CriuJob
    root: int

    async def finished(self) -> Ended:
        """Wait for criu restore, which detaches; raise CriuJobError unless it succeeded."""
        return await self.job.succeed()

    async def task_ended(self, pid: int | None = None) -> Ended:
        """Wait until a restored task that lost its parent, the first one unless named, has ended."""
        return await self.job.kept.wait(self.root if pid is None else pid)

    def kill(self, pid: int | None = None) -> None:
        """Kill a restored task, the first one unless named."""
        self.job.kept.kill(self.root if pid is None else pid)

    def gone(self, pid: int) -> str | None:
        """Say why a restored task cannot answer, None while it can (for Control.gone)."""
        kept = self.job.kept
        if kept.ended.get(kept.pid) is None and not kept.is_alive(self.root):
            return None  # criu may still be at it
        if kept.is_alive(pid):
            return None
        ended = kept.ended.get(pid)
        return f"restored process {pid} ended" + (f" with {ended}" if ended else "")


@contextlib.asynccontextmanager
async def restore(
    criu: Criu,
    images_dir: Path,
    work_dir: Path,
    root: int,
    *,
    lazy: bool = True,
    binds: Mapping[Path, Path] | None = None,
    extra: Iterable[str] = (),
) -> AsyncIterator[Restored]:
    """Restore a tree whose first process is `root` into a new pid namespace.

    `binds` (target to source) puts files over others there: a copy of the control file, say. With `lazy`
    the daemon's socket must be in `work_dir`. The body starts while criu may still be restoring.
    """
    words = [criu.path, "restore", "-d", *_common(images_dir, work_dir, "restore.log")]
    words += [*(["--lazy-pages"] if lazy else []), *extra]
    async with _start(
        "restore", words, work_dir, log=work_dir / "restore.log", ready=False, namespace=True, binds=binds
    ) as job:
        yield Restored(job, root)
