"""Another system than this one, as far as a Python program can see.

A program is told that it runs on FreeBSD or macOS, and what Python lacks there is removed from its
standard modules. What that is, typeshed knows, which mypy brings along. ``write`` puts what is to be
pretended into a file, ``environment`` makes every Python pretend from its first moment on, and
``pytest -p elsewhere --elsewhere FILE`` runs tests there.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import pytest

SYSTEMS: Final = {"freebsd14": "FreeBSD", "darwin": "Darwin"}

# The modules that differ, those that they are made of before them.
_MODULES: Final = (
    *("posix", "os", "_socket", "socket", "select", "signal", "fcntl", "resource", "termios"),
    *("errno", "mmap", "time"),
)
# Modules that have the names of another.
_SAME: Final = {"posix": "os", "trio.socket": "socket"}
# Of which typeshed tells BSDs from Linux in little: there, what macOS lacks is missing as well.
_LITTLE_KNOWN: Final = frozenset({"_socket", "socket", "signal", "errno"})
VARIABLE: Final = "CRIUPY_TESTS_ELSEWHERE"


# ---- what is missing there -----------------------------------------------------------------------


def _names(body: list[ast.stmt], system: object) -> Iterator[str]:
    for node in body:
        match node:
            case ast.If():
                holds = eval(ast.unparse(node.test), {"sys": system})
                yield from _names(node.body if holds else node.orelse, system)
            case ast.FunctionDef() | ast.ClassDef():
                yield node.name
            case ast.ImportFrom():
                yield from (alias.asname or alias.name for alias in node.names)
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                yield name


def lacking(platform: str) -> dict[str, list[str]]:
    """Return what the standard modules have on Linux only, by module."""
    import mypy

    def names(module: str, platform: str) -> set[str]:
        stub = stubs / f"{_SAME.get(module, module)}.pyi"
        tree = ast.parse((stub if stub.exists() else stub.with_suffix("") / "__init__.pyi").read_text())
        return set(_names(tree.body, SimpleNamespace(platform=platform, version_info=sys.version_info)))

    found = {}
    stubs = Path(mypy.__file__).parent / "typeshed" / "stdlib"
    for module in _MODULES:
        lacks = names(module, "linux") - names(module, platform)
        if module in _LITTLE_KNOWN:
            lacks |= names(module, "linux") - names(module, "darwin")
        found[module] = sorted(lacks)
    return found


# ---- pretending ----------------------------------------------------------------------------------


def write(platform: str, directory: Path) -> Path:
    """Write down what is to be pretended, and what Python reads when it starts."""
    (directory / "sitecustomize.py").write_text(
        f"import os, sys\nif {VARIABLE!r} in os.environ:\n"
        f"    sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "    import elsewhere\n    del sys.path[0]\n    elsewhere.pretend()\n"
    )
    told = directory / "elsewhere.json"
    told.write_text(json.dumps({"platform": platform, "lacking": lacking(platform)}))
    return told


def environment(told: Path, *path: Path) -> dict[str, str]:
    """Return an environment in which every Python pretends; it finds packages in these directories first."""
    folders = os.pathsep.join(map(str, (told.parent, *path)))
    return os.environ | {"PYTHONPATH": folders, VARIABLE: str(told)}


def pretend() -> None:
    """Pretend from now on."""
    told = json.loads(Path(os.environ[VARIABLE]).read_text())
    platform, lacking = told["platform"], told["lacking"]
    for name in (*_MODULES, *_SAME.keys() & sys.modules.keys()):
        module = importlib.import_module(name)
        for missing in lacking[name if name in lacking else _SAME[name]]:
            vars(module).pop(missing, None)
    uname = os.uname()
    there = os.uname_result((SYSTEMS[platform], *uname[1:]))
    os.uname = lambda: there  # what platform.system() asks, once
    if "platform" in sys.modules:
        vars(sys.modules["platform"])["system"] = lambda: there.sysname
    sys.platform = platform


def pretend_with_trio(told: Path) -> None:
    """Pretend from now on, here and in the processes that this one starts, where trio has to work."""
    # On those systems it waits with kqueue, which cannot be had here: it keeps its epoll.
    loop = importlib.import_module("trio._core._io_epoll")
    vars(loop)["select"] = SimpleNamespace(**vars(importlib.import_module("select")))
    os.environ[VARIABLE] = str(told)
    pretend()


# ---- as a plugin of pytest -----------------------------------------------------------------------


@dataclass
class Results:
    """What a session came to.

    ``outcomes`` are by test file: how many passed, failed and were skipped. ``modules`` are
    those of criupy that were loaded, ``package`` is where from.
    """

    package: str
    outcomes: dict[str, dict[str, int]]
    skipped_for: list[str]
    modules: list[str]

    @staticmethod
    def path(told: Path) -> Path:
        return told.with_name("results.json")

    @classmethod
    def read(cls, told: Path) -> Results:
        return cls(**json.loads(cls.path(told).read_text()))


class _Recorder:
    def __init__(self, told: Path) -> None:
        self.told = told
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.skipped_for: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self._count(report.nodeid.partition("::")[0], report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._count(report.nodeid, report)

    def _count(self, path: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.outcomes[Path(path).name][report.outcome] += 1
        if report.skipped:
            assert isinstance(report.longrepr, tuple)
            self.skipped_for.add(report.longrepr[2].removeprefix("Skipped: "))

    def pytest_sessionfinish(self) -> None:
        import criupy

        results = Results(
            package=str(criupy.__file__),
            outcomes={name: dict(counts) for name, counts in self.outcomes.items()},
            skipped_for=sorted(self.skipped_for),
            modules=sorted(name for name in sys.modules if name.partition(".")[0] == "criupy"),
        )
        Results.path(self.told).write_text(json.dumps(asdict(results)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--elsewhere", metavar="FILE", type=Path, help="pretend what the file says")


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Pretend before anything of criupy is there; what tests themselves stand on knows nothing of it."""
    import hypothesis

    # How many examples it takes to find a mistake is the business of the same tests, here.
    hypothesis.settings.register_profile("elsewhere", deadline=None, max_examples=5, database=None)
    told = early_config.known_args_namespace.elsewhere
    early_config.pluginmanager.register(_Recorder(told))
    pretend_with_trio(told)
