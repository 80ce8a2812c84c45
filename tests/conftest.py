"""What all tests share: async tests on trio, real CRIUs, the workload program."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import trio

import criupy.testing
from criupy.testing.certificates import Certificates, make_certificates

if TYPE_CHECKING:
    from criupy.testing.criu_linux import Criu
    from native_target import Target

# A time limit on examples would measure what else the machine does.
hypothesis.settings.register_profile("criupy", deadline=None)
hypothesis.settings.load_profile("criupy")

HANG = 120
"""Seconds after which a test with real processes counts as hung; a guard, not a limit on speed."""

PIPE_SIZE = 8 << 20


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "criu: needs root and a CRIU that starts on this kernel")
    config.addinivalue_line("markers", "slow: takes many seconds")
    config.addinivalue_line("markers", "vm: runs in virtual machines")
    config.addinivalue_line("markers", "spread: each combination of the other parameters with one CRIU")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell that ran us in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests with trio."""
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return None
    names = inspect.signature(function).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}

    async def main() -> None:
        with trio.fail_after(HANG * (3 if pyfuncitem.get_closest_marker("vm") else 1)):
            await function(**arguments)

    trio.run(main)
    return True


@functools.cache
def usable_criu() -> tuple[list[Criu], str]:
    if not sys.platform.startswith("linux"):
        return [], "CRIU runs on Linux only"
    from criupy.testing.criu_linux import find_criu

    found, reasons = find_criu()
    if found and int(Path("/proc/sys/fs/pipe-max-size").read_text()) < PIPE_SIZE:
        return [], f"lazy dumps need `sysctl -w fs.pipe-max-size={PIPE_SIZE}`"
    return list(found), "; ".join(reasons)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `criu` once with each version that works here."""
    if "criu" not in metafunc.fixturenames:
        return
    found, reason = usable_criu()
    params = [pytest.param(criu, id=str(criu), marks=pytest.mark.criu) for criu in found]
    if not params:
        params = [pytest.param(None, id="no-criu", marks=[pytest.mark.criu, pytest.mark.skip(reason=reason)])]
    metafunc.parametrize("criu", params)


@pytest.fixture
def two_criu() -> tuple[Criu, Criu]:
    """An older CRIU and a newer one, whose frames differ in size."""
    found, reason = usable_criu()
    newer, older = (found[0], found[-1]) if found else (None, None)
    if newer is None or older is None or newer.frame_size == older.frame_size:
        why = reason or "`make test` fetches them"
        pytest.skip(f"needs two CRIUs, of 4.1 or before and of 4.2 or later: {why}")
    return older, newer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is marked `spread`, keep each combination of the other parameters with one CRIU.

    CRIUs take turns so that any two values of different parameters meet, but not any three.
    """
    seen: dict[tuple[str, tuple[str, ...]], list[list[object]]] = {}

    def number(item: pytest.Function, names: tuple[str, ...]) -> int:
        values = seen.setdefault((item.nodeid.partition("[")[0], names), [])
        value = [item.callspec.params[name] for name in names]
        if value not in values:
            values.append(value)
        return values.index(value)

    def is_kept(item: pytest.Item) -> bool:
        if item.get_closest_marker("spread") is None or not isinstance(item, pytest.Function):
            return True
        if "criu" not in item.fixturenames:
            return True
        groups = [mark.args[0] for mark in item.iter_markers("parametrize")]
        together = {name: tuple(names) for names in groups if not isinstance(names, str) for name in names}
        others = {together.get(name, (name,)) for name in item.callspec.params} - {("criu",)}
        turn = sum(number(item, names) for names in others)
        return not others or turn % max(1, len(usable_criu()[0])) == number(item, ("criu",))

    items[:] = filter(is_kept, items)


@pytest.fixture(scope="session")
def workload_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The criupy-workload program: the installed one, or one compiled for this session."""
    if not sys.platform.startswith("linux"):
        pytest.skip("criupy-workload runs on Linux only")
    from criupy.testing.workload_linux import find_workload

    folder = Path(criupy.testing.__file__).parent
    if "CRIUPY_WORKLOAD" in os.environ or (folder / "criupy-workload").exists():
        yield find_workload()
        return
    program = tmp_path_factory.mktemp("program") / "criupy-workload"
    sources = sorted(folder.glob("workload*.c"))
    if not sources:
        pytest.skip(f"{folder}: neither the criupy-workload program nor its source is there")
    compiler = os.environ.get("CC", "cc")
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-pthread", "-static"]
    subprocess.run([compiler, *flags, "-o", program, *sources], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRIUPY_WORKLOAD", str(program))
        yield program


@pytest.fixture(scope="session")
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What mypy has found out about installed modules, for the next that runs it."""
    return tmp_path_factory.mktemp("mypy")


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel for any other system, built where no compiler is found."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [*build, "--disable-pip-version-check", "-w", folder, Path(__file__).parent.parent],
        env=os.environ | {"CRIUPY_PURE": "1", "PATH": str(tmp_path_factory.mktemp("empty"))},
        check=True,
        stdin=subprocess.DEVNULL,
    )
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A directory for one migration, with `work` in it."""
    (tmp_path / "work").mkdir()
    return tmp_path


@pytest.fixture(params=["blocking", "trio"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the RPC clients a test is about: it runs for each."""
    return str(request.param)


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """No descriptor, thread of the native part or child process outlives the test."""

    def kept() -> tuple[list[str], int]:
        files = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the directory's own
                files.append(f"{link.name} {link.readlink()}")
        names = []
        for path in Path("/proc/self/task").glob("*/comm"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends just now
                names.append(path.read_text().strip())
        ours = {"criupy-pager", "criupy-copier", "criupy-server", "criupy-upstream"}
        return sorted(files), sum(name in ours for name in names)

    before = kept()
    yield
    # A thread that was joined is in /proc for a moment longer: its end is told before it is taken from there.
    deadline = time.monotonic() + 2
    while kept() != before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert kept() == before


def running(room: Path) -> list[int]:
    """List the processes that were started with this directory for temporary files."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if os.fsencode(f"TMPDIR={room}") in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@pytest.fixture
def nothing_runs_on(tmp_path: Path) -> Iterator[None]:
    """No process that was started with the test's own directory for temporary files outlives it."""
    yield
    deadline = time.monotonic() + 5  # what was killed needs a moment
    while (left := running(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A certificate authority and what it signed."""
    if not sys.platform.startswith("linux"):
        pytest.skip("TLS is part of what runs on Linux only")
    from criupy._tls.tls_linux import is_available

    if not is_available():
        pytest.skip("criupy was built without TLS: OpenSSL 3 was not found (Debian: libssl-dev)")
    if shutil.which("openssl") is None:
        pytest.skip("openssl(1) is not installed")
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def no_descriptor_is_left() -> Iterator[None]:
    """Nothing is open afterwards that was not open before."""
    from native_peer import open_files

    before = open_files()
    yield
    assert open_files() == before


@pytest.fixture
def target(no_descriptor_is_left: None) -> Iterator[Target]:
    """A process with memory that a test pages in."""
    from native_target import Target

    with Target.spawn() as target:
        yield target
