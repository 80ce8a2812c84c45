"""Type checkers see complete types from outside, and what is wrong is wrong to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import criupy

pytestmark = pytest.mark.slow

USE = Path(__file__).with_name("typed_use.py")
#: Somewhere with neither our sources nor our settings.
ENVIRONMENT = {
    **os.environ,
    "VIRTUAL_ENV": sys.prefix,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def check(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    shutil.copy(USE, tmp_path / "use.py")
    assert Path(criupy.__file__).with_name("py.typed").exists()
    return tmp_path


def test_mypy(elsewhere: Path, mypy_cache: Path) -> None:
    done = check("mypy", "--strict", "--cache-dir", mypy_cache, "use.py", cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright(elsewhere: Path) -> None:
    (elsewhere / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    done = check("pyright", "use.py", cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_knows_every_type(elsewhere: Path) -> None:
    done = check("pyright", "--verifytypes", "criupy", "--ignoreexternal", "--outputjson", cwd=elsewhere)
    report = json.loads(done.stdout)["typeCompleteness"]
    unknown = [
        (symbol["name"], [each["message"] for each in symbol["diagnostics"]])
        for symbol in report["symbols"]
        if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]
    ]
    assert unknown == []
    assert report["completenessScore"] == 1
    assert report["exportedSymbolCounts"]["withKnownType"] > 500
