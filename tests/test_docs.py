"""The documentation builds without a warning, has every public name and option, and its code type-checks."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import pytest

from criupy import lazy_pages, page_server
from criupy.rpc import _options

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "criupy"
WIRE, TESTING = PACKAGE / "wire", PACKAGE / "testing"
#: A program, and what only its users' modules are for.
PRIVATE = {"demo"}
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

#: What the pages' shorter pieces of code take as given.
GIVEN = """
import os
import subprocess
from typing import Any
import trio
import criupy
pid: int
process: Any
def enough_space() -> bool:
    return True
"""


@pytest.fixture(scope="module")
def doctrees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as they were read, by the first builder for all."""
    return tmp_path_factory.mktemp("doctrees")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, doctrees: Path) -> Path:
    """The documentation as text, which is what can be searched."""
    folder = tmp_path_factory.mktemp("docs")
    make(folder, "text", doctrees)
    return folder


def make(folder: Path, builder: str, doctrees: Path) -> None:
    words: list[str | Path] = ["-q", "-W", "--keep-going", "-n", "-b", builder, "-d", doctrees, DOCS, folder]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_html_builds(tmp_path: Path, doctrees: Path) -> None:
    make(tmp_path, "html", doctrees)
    assert 'id="criupy.rpc.Criu.dump"' in (tmp_path / "reference.html").read_text()


#: Of each page of the reference, the rooms that it has.
REFERENCE = {
    "reference": ["criupy.rpc", "criupy.rpc.external", "criupy.errors"],
    "reference-daemons": ["criupy.lazy_pages", "criupy.page_server"],
    "reference-runc": ["criupy.runc"],
    "reference-pre-copy": ["criupy.pre_copy"],
    "reference-images": ["criupy.images"],
    "reference-wire": [f"criupy.wire.{path.stem}" for path in WIRE.glob("[a-z]*.py")],
    "reference-testing": [
        "criupy.testing",
        *(f"criupy.testing.{path.stem}" for path in TESTING.glob("[a-z]*.py") if path.stem not in PRIVATE),
    ],
}


def public_names(module: ModuleType) -> set[str]:
    """Return what a module says is public, or else what is defined there."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and not isinstance(value, TypeVar)
    }


#: Names that are public twice, and documented where the first is.
BESIDES = {"external", "Script", "RuncError", "RuncTimeout"}


@pytest.mark.slow
@pytest.mark.parametrize("page", REFERENCE)
def test_every_public_name_is_in_the_reference(page: str, built: Path) -> None:
    text = (built / f"{page}.txt").read_text()
    described = set(re.findall(r"^(?:class |exception |async )?(\w+)(?:\(|:? |$)", text, re.MULTILINE))
    missing = {
        f"{room}.{name}"
        for room in REFERENCE[page]
        for name in public_names(importlib.import_module(room)) - described - BESIDES
    }
    assert missing == set()


def test_no_room_is_left_out_of_the_reference() -> None:
    rooms = {room for page in REFERENCE.values() for room in page}
    packages = {f"criupy.{path.parent.name}" for path in PACKAGE.glob("[a-z]*/__init__.py")}
    assert packages - rooms == {"criupy.commands", "criupy.wire"}  # a command; modules of its own


@pytest.mark.slow
def test_every_option_is_described_once(built: Path) -> None:
    text = (built / "reference.txt").read_text()
    text = text[text.index("\nBy request\n---") : text.index("\nTypes\n---")]
    for name in {name for group in _options.__all__ for name in getattr(_options, group).__annotations__}:
        found = re.findall(rf"^   {name}: .+\n\n      \S", text, re.MULTILINE)
        assert len(found) == 1, (name, found)


def pieces(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def as_module(code: str) -> str:
    """Make a module of a piece: a program as it is, anything shorter in a function that has a client."""
    if re.search(r"^import criupy|^from criupy", code, re.MULTILINE):
        return code
    is_async = re.search(r"\bawait\b|\basync (?:with|for)\b", code)
    head = "async def piece(criu: criupy.AsyncCriu)" if is_async else "def piece(criu: criupy.Criu)"
    return f"{GIVEN}\n{head} -> None:\n{textwrap.indent(code, '    ')}"


@pytest.mark.slow
def test_code_type_checks(tmp_path: Path, mypy_cache: Path) -> None:
    for page in PAGES:
        for number, code in enumerate(pieces(page)):
            name = re.sub(r"\W", "_", str(page.relative_to(ROOT).with_suffix(""))).lower()
            (tmp_path / f"{name}_{number}.py").write_text(as_module(code))
    modules = sorted(tmp_path.glob("*.py"))
    assert len(modules) > 10
    words: list[str | Path] = ["--strict", "--config-file", os.devnull, "--cache-dir", mypy_cache]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words, *modules],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_design_names_every_room() -> None:
    page = (DOCS / "design.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "src" / "criupy").glob("*/__init__.py")} | {"errors"}
    assert [room for room in sorted(rooms) if f"| `{room}` |" not in page] == []


@pytest.mark.parametrize("statistics", [lazy_pages.Statistics(), page_server.Statistics()])
def test_every_figure_is_explained(statistics: lazy_pages.Statistics | page_server.Statistics) -> None:
    page = (DOCS / "how-to" / "statistics.md").read_text()
    assert [key for key in statistics.to_json() if f"`{key}`" not in page] == []
