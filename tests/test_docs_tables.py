"""The tables of the protocols page are those of the code, and cannot differ from it."""

from __future__ import annotations

import enum
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MACHINES = (
    "criupy.wire.restore_socket",
    "criupy.wire.page_client",
    "criupy.wire.page_service",
    "criupy.rpc._session",
)

CONF = f"""
import sys
sys.path[:0] = [{str(ROOT / "docs" / "_ext")!r}, {str(ROOT / "tests")!r}]
extensions = ["state_tables"]
"""


def build(folder: Path, content: str) -> tuple[str, str]:
    """Return a page as text, and what Sphinx complained about."""
    (folder / "conf.py").write_text(CONF)
    (folder / "index.rst").write_text(f"page\n====\n\n{content}")
    words: list[str | Path] = ["-q", "-b", "text", folder, folder / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, check=False
    )
    return (folder / "out" / "index.txt").read_text(), done.stderr


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_has_every_state_and_every_step(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.TRANSITIONS) == set(module.State)
    assert {step for steps in module.TRANSITIONS.values() for step in steps} == set(module.Step)
    reached = {after for steps in module.TRANSITIONS.values() for after in steps.values()}
    first = next(iter(module.State))
    assert set(module.State) - reached <= {first, module.State.FAILED}


def test_every_machine_is_on_the_page() -> None:
    page = (ROOT / "docs" / "protocols.md").read_text()
    assert [name for name in MACHINES if f".. state-table:: {name}\n" not in page] == []


@pytest.mark.slow
def test_a_table_of_states(tmp_path: Path) -> None:
    text, complaints = build(tmp_path, ".. state-table:: criupy.wire.restore_socket\n")
    assert complaints == ""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert ['"UFFD"', "a byte with the userfaultfd", '"PID"'] in rows
    assert ['"CLOSED"', "nothing more", ""] in rows
    assert not any('"FAILED"' in row for row in rows)


class Number(enum.IntEnum):
    ONE = 1
    LARGE = 0x1023


@pytest.mark.slow
def test_a_table_of_numbers(tmp_path: Path) -> None:
    table = ".. number-table:: test_docs_tables.Number\n   :columns: says | to\n\n   ONE: a | b\n"
    text, complaints = build(tmp_path, table)
    assert "Number and this table differ in LARGE" in complaints
    text, complaints = build(tmp_path, table + "   LARGE: c | d\n")
    assert complaints == ""
    cells = [cell.strip() for cell in text.replace("\n", "|").split("|")]
    assert cells[cells.index('"0x1023"') :][:4] == ['"0x1023"', '"LARGE"', "c", "d"]
