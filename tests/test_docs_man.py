"""The man pages have every option of the commands, and read well with man."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMANDS = ("criupy", "criupy-lazy-pages", "criupy-page-server")
SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "FILES", "EXAMPLES", "SEE ALSO"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the man pages."""
    folder = tmp_path_factory.mktemp("man")
    words: list[str | Path] = ["-q", "-W", "--keep-going", "-n", "-b", "man", DOCS, folder]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    """What makes the pages, from outside Sphinx."""
    spec = importlib.util.spec_from_file_location("command_options", DOCS / "_ext" / "command_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_text(roff: str) -> str:
    return re.sub(r"\\f[BIRP]", "", roff).replace(r"\-", "-").replace(r"\(aq", "'")


def names_of(parser: argparse.ArgumentParser) -> set[str]:
    return {
        name
        for action in parser._actions
        if action.help is not argparse.SUPPRESS
        for name in action.option_strings
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_its_entry(command: str, pages: Path, extension: ModuleType) -> None:
    text = as_text((pages / f"{command}.1").read_text())
    described = re.findall(r"^\.TP\n\.B (.+)$", text, re.MULTILINE)
    found = {re.split(r"[ =[]", name)[0] for entry in described for name in entry.split(", ")}
    parser = extension.find_parser(command)
    wanted = names_of(parser)
    for name, sub in extension.subparsers(parser).items():
        assert re.search(rf"^\.SH {name.upper()}$", text, re.MULTILINE), name
        wanted |= names_of(sub)
    assert len(wanted) >= 5
    assert wanted - found == set()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_it_has_the_sections_of_a_man_page(command: str, pages: Path) -> None:
    sections = re.findall(r"^\.SH (.+)$", (pages / f"{command}.1").read_text(), re.MULTILINE)
    assert [section for section in sections if section in SECTIONS] == SECTIONS


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_man_shows_it_without_a_warning(command: str, pages: Path) -> None:
    if shutil.which("man") is None or shutil.which("groff") is None:
        pytest.skip("man and groff are not installed")
    done = subprocess.run(
        ["man", "--warnings", "-l", f"{command}.1"],
        cwd=pages,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{command.upper()}(1)")
    assert "argparse" not in done.stdout


def test_all_commands_have_a_page(extension: ModuleType) -> None:
    assert sorted(extension.PARSERS) == sorted(COMMANDS)


@pytest.mark.parametrize(
    ("text", "rst"),
    [
        ("fetch at --address and -D", "fetch at ``--address``\\  and ``-D``\\ "),
        ("CRTOOLS_SCRIPT_ACTION=a or \\0", "CRTOOLS\\_SCRIPT\\_ACTION=a or \\\\0"),
        ("the `criu service` here", "the ``criu service``\\  here"),
        ("a lazy-pages daemon", "a lazy-pages daemon"),
    ],
)
def test_helps_become_rst(text: str, rst: str, extension: ModuleType) -> None:
    assert extension.as_rst(text) == rst
