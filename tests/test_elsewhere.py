"""Elsewhere than on Linux: the pure wheel is built, what is portable works, the rest says what it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import elsewhere
from criu_judge import needs_criu
from criupy.testing.images import write_images
from criupy.testing.spec import WorkloadSpec

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="it pretends to be elsewhere, which takes Linux"),
    pytest.mark.slow,
]

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "criupy"

#: The tests of what is portable; each of their files runs elsewhere, but for what says that it needs Linux.
PORTABLE = (
    *("test_cli_log", "test_cli_options", "test_cli_progress", "test_cli_statistics"),
    *("test_command", "test_command_images", "test_command_lazy_parents"),
    *("test_images_framing", "test_images_lazy", "test_images_marker", "test_images_memory"),
    *("test_images_names", "test_images_pagemap", "test_images_schema", "test_images_stats"),
    *("test_images_parents", "test_images_tasks"),
    *("test_page_server_options", "test_page_server_session", "test_page_server_writer"),
    *("test_rpc_external", "test_rpc_options", "test_rpc_portable", "test_rpc_report", "test_rpc_results"),
    *("test_rpc_schema", "test_rpc_session", "test_runc_words", "test_pre_copy"),
    "test_testing_page_server",
    *("test_wire_extension", "test_wire_page_client", "test_wire_page_server", "test_wire_page_service"),
    "test_wire_restore_socket",
)

#: Modules that these tests need not load, because ...
NOT_LOADED = {
    # ... they are how commands are started, which is tried below
    *("criupy.__main__", "criupy.lazy_pages.__main__", "criupy.page_server.__main__"),
    *("criupy.lazy_pages._cli", "criupy.page_server._cli"),
    # ... only what needs Linux uses them
    *("criupy._uffd", "criupy.page_server._images", "criupy.page_server._spool"),
    *("criupy.page_server._copying", "criupy.lazy_pages._config", "criupy.lazy_pages._extension"),
    "criupy.rpc._transport",
    *("criupy.testing.demo", "criupy.testing._demo_report", "criupy.testing.wait"),
    "criupy.testing.web_client",
}


def modules() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("criupy", *path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="module")
def folder(pure_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pure wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    install = "pip install -q --no-deps --no-index --disable-pip-version-check --target"
    words: list[str | Path] = [sys.executable, "-m", *install.split(), folder, pure_wheel]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module", params=elsewhere.SYSTEMS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which other system this is."""
    return elsewhere.write(request.param, tmp_path_factory.mktemp(request.param))


def python(told: Path, folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=elsewhere.environment(told, folder),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=folder,
    )


def platform(told: Path) -> str:
    return str(json.loads(told.read_text())["platform"])


# ---- the wheel -----------------------------------------------------------------------------------


def test_the_wheel_is_pure_and_needed_no_compiler(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure_wheel) as archive:
        names = archive.namelist()
        (wheel,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: true" in wheel.splitlines()
    assert {Path(name).suffix for name in names if ".dist-info/" not in name} <= {
        ".py",
        ".pyi",
        ".typed",
        ".proto",
    }
    packed = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in names}
    assert set(modules()) <= packed


def test_there_it_is_pure_without_being_asked(told: Path, tmp_path: Path) -> None:
    program = (
        "import os, platform, sysconfig\n"
        "platform.mac_ver = lambda: ('14.0', ('', '', ''), 'arm64')\n"
        "sysconfig.get_config_vars()  # in a file that is called after the system\n"
        "import scikit_build_core.build as backend\n"
        "import elsewhere\n"
        f"os.environ[{elsewhere.VARIABLE!r}] = {str(told)!r}\n"
        "elsewhere.pretend()\n"
        f"print(backend.build_wheel({str(tmp_path)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


# ---- what is pretended ---------------------------------------------------------------------------


def test_it_is_another_system(told: Path, folder: Path) -> None:
    """This test has a meaning only if the others are really elsewhere."""
    program = (
        "import os, platform, select, signal, socket, sys\n"
        "gone = {select: 'epoll', signal: 'pidfd_send_signal',\n"
        "  os: 'memfd_create pidfd_open eventfd splice copy_file_range setns unshare P_PIDFD O_PATH',\n"
        "  socket: 'SO_PEERCRED SCM_CREDENTIALS MSG_CMSG_CLOEXEC'}\n"
        "if sys.platform == 'darwin': gone[os] += ' sched_getaffinity posix_fallocate pipe2'\n"
        "left = [name for module, names in gone.items() for name in names.split() if hasattr(module, name)]\n"
        "print(sys.platform, platform.system(), left)\n"
        "import criupy; print(criupy.__file__)"
    )
    done = python(told, folder, "-c", program)
    name = platform(told)
    assert done.stdout.splitlines() == [
        f"{name} {elsewhere.SYSTEMS[name]} []",
        str(folder / "criupy" / "__init__.py"),
    ]


# ---- modules -------------------------------------------------------------------------------------

_IMPORT_ALL = """
import importlib, json, sys
from pathlib import Path
import elsewhere
elsewhere.pretend_with_trio(Path(sys.argv[1]))
portable, linux = json.load(sys.stdin)
import criupy
wrong = []
for name in portable:
    try:
        importlib.import_module(name)
    except BaseException as error:
        wrong.append(f"{name}: {error!r}")
for name in linux:
    try:
        importlib.import_module(name)
    except criupy.NeedsLinux as error:
        if (str(error), error.what) != (f"{name} needs Linux, and this is {sys.platform}", name):
            wrong.append(f"{name}: {error}")
    except BaseException as error:
        wrong.append(f"{name}: {error!r}")
    else:
        wrong.append(f"{name}: it can be imported")
loaded = [name for name in sys.modules if name.startswith("criupy.")]
wrong += [name for name in loaded if name.endswith("_linux")]
print(*wrong, sep="\\n")
"""

_TOUCH_ALL = """
import importlib, sys
import criupy
for package in sys.argv[1:]:
    module = importlib.import_module(package)
    for name in module.__all__:
        try:
            getattr(module, name)
        except ImportError as error:
            assert type(error) is criupy.NeedsLinux, repr(error)
            print(f"{package}.{name}", error.what, error, sep=": ")
try:
    from criupy.rpc import external
    external.key_of(0)
except criupy.NeedsLinux as error:
    print("key_of", error.what, error, sep=": ")
"""


def test_what_is_portable_imports_and_the_rest_says_why_not(told: Path, folder: Path) -> None:
    portable = [name for name in modules() if not name.endswith(("_linux", ".__main__"))]
    linux = [name for name in modules() if name.endswith("_linux")]
    native = ["criupy._uffd._native", "criupy._tls._native"]
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, told],
        env=os.environ | {"PYTHONPATH": f"{folder}:{Path(__file__).parent}"},
        input=json.dumps([portable, linux + native]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_names_that_need_linux_say_so(told: Path, folder: Path) -> None:
    packages = ("criupy", "criupy.rpc", "criupy.runc", "criupy.lazy_pages", "criupy.page_server")
    done = python(told, folder, "-c", _TOUCH_ALL, *packages)
    assert done.stderr == ""
    expected = set()
    for package in packages:
        source = (ROOT / "src" / package.replace(".", "/") / "__init__.py").read_text()
        table = re.search(r"^_OF_LINUX = {(.*?)^}", source, re.DOTALL | re.MULTILINE)
        expected |= (
            {f"{package}.{name}" for name in re.findall(r'^    "(\w+)":', table[1], re.MULTILINE)}
            if table
            else set()
        )
    expected |= {"criupy.Criu", "criupy.AsyncCriu"}
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said.pop("key_of").startswith("criupy.rpc.external.key_of: criupy.rpc.external.key_of needs Linux")
    assert said.keys() == expected
    for name, words in said.items():
        what = name.replace("criupy.", "criupy.rpc.") if name.count(".") == 1 else name
        assert words == f"{what}: {what} needs Linux, and this is {platform(told)}"


def test_types_know_of_nothing_there_that_is_missing(told: Path, mypy_cache: Path) -> None:
    """No function of a portable module uses what its system lacks, as far as typeshed and trio tell."""
    words: list[str | Path] = ["--platform", platform(told), "--cache-dir", mypy_cache / "elsewhere", PACKAGE]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    complaints = re.findall(r"^\S+\.pyi?:.*", done.stdout, re.MULTILINE)
    assert done.returncode <= 1, done.stderr
    assert [line for line in complaints if not re.match(r"\S+_linux\.py:", line)] == []
    assert len(complaints) > 10, "it does not look at this system"


# ---- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["criupy", "criupy-lazy-pages", "criupy-page-server"])
def test_commands_tell_what_they_are(told: Path, folder: Path, command: str) -> None:
    shown = python(told, folder, folder / "bin" / command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert command in shown.stdout
    shown = python(told, folder, folder / "bin" / command, "--version")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.search(r"\d\.\d", shown.stdout)


@pytest.mark.parametrize(
    "line",
    [
        "criupy check",
        "criupy-lazy-pages -D .",
        "criupy-lazy-pages -D . --page-server --address 127.0.0.1 --port 27",
        "criupy-lazy-pages -D nothing/such -o log -d",
        "criupy-page-server -D . --lazy-pages",
        "criupy-page-server -D . --daemon",
        "criupy-page-server -D . --upstream 127.0.0.1:27",
        "criupy-page-server --abort",
    ],
)
def test_commands_that_need_linux_say_so(told: Path, folder: Path, line: str) -> None:
    command, *words = line.split()
    before = sorted(folder.iterdir())
    ended = python(told, folder, folder / "bin" / command, *words)
    said = f"{'criupy check' if command == 'criupy' else command}: this command needs Linux"
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"{said}, and this is {platform(told)}\n"
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("words", [[], ["--json"]], ids=str)
def test_images_are_shown_as_here(told: Path, folder: Path, tmp_path: Path, words: list[str]) -> None:
    written = write_images(tmp_path / "images", WorkloadSpec(size=1 << 20, areas=4, tree=2, zombie=True))
    line: list[str | Path] = ["-m", "criupy", "images", *words, written.directory]
    here = subprocess.run([sys.executable, *line], check=True, capture_output=True, text=True)
    there = python(told, folder, *line)
    assert (there.returncode, there.stderr, there.stdout) == (0, "", here.stdout)
    assert len(here.stdout) > 200


def test_the_demo_says_so(told: Path, folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import elsewhere\n"
        "elsewhere.pretend_with_trio(Path(sys.argv[1]))\n"
        "from criupy.testing.demo import main; sys.exit(main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, told],
        env=os.environ | {"PYTHONPATH": f"{folder}:{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"demo: the demo needs Linux, and this is {platform(told)}\n"


# ---- tests ---------------------------------------------------------------------------------------


def test_what_is_portable_passes_its_tests(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    told = [elsewhere.write(system, tmp_path_factory.mktemp(system)) for system in elsewhere.SYSTEMS]
    # All of them at once: each needs one core, for half a minute.
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(check_tests, told, [folder] * len(told)):
            pass


def check_tests(told: Path, folder: Path) -> None:
    env = elsewhere.environment(told, folder, Path(__file__).parent)
    del env[elsewhere.VARIABLE]  # pytest itself is here
    options = ["-q", "-p", "elsewhere", f"--elsewhere={told}", "--hypothesis-profile=elsewhere"]
    # How much memory something takes is no question of the system.
    options += ["-p", "no:cacheprovider", "-m", "not criu", "-k", "not little_memory", "--color=no"]
    files = [f"tests/{name}.py" for name in PORTABLE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    results = elsewhere.Results.read(told)
    assert results.package == str(folder / "criupy" / "__init__.py")
    assert results.outcomes.keys() == {f"{name}.py" for name in PORTABLE}
    for name, counts in results.outcomes.items():
        assert counts.get("passed", 0) > counts.get("skipped", 0), name
    lacking = needs_criu.kwargs["reason"] if needs_criu.args[0] else "Linux"
    assert [reason for reason in results.skipped_for if "Linux" not in reason and lacking not in reason] == []
    portable = {name for name in modules() if not name.endswith("_linux")}
    assert portable - set(results.modules) == NOT_LOADED
