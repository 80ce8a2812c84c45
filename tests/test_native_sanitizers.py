"""The native core under AddressSanitizer, UndefinedBehaviourSanitizer and ThreadSanitizer.

The C drivers in tests/native are compiled with the sources they test, by gcc.
The stress target is not sanitized: a shadow memory is no part of what migrates.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from test_native_uffd import needs_poison, usable

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src/criupy/_uffd"
DRIVERS = ROOT / "tests/native"
FLAGS = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-D_GNU_SOURCE", "-pthread"]
RUNTIMES = {"address,undefined": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
PURE = ["codec", "histogram", "image", "notices", "space", "translate"]
CORE = [
    *PURE,
    "link",
    "pager",
    "pager_api",
    "pager_end",
    "pager_fetch",
    "pager_install",
    "pager_link",
    "pager_task",
    "uffd",
]

SERVER = [
    "codec",
    "image",
    "server",
    "server_answer",
    "server_connection",
    "server_receive",
    "server_stream",
]

Build = Callable[[str, list[str], str], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile a driver with some of the core, once for each sanitizer."""
    directory = tmp_path_factory.mktemp("native")
    gcc = shutil.which("gcc")

    def compile_driver(driver: str, parts: list[str], sanitizer: str) -> Path:
        if gcc is None:
            pytest.skip("gcc is not installed")
        for runtime in RUNTIMES.get(sanitizer, ()):
            # gcc answers with the bare name for what it does not have.
            found = subprocess.check_output([gcc, f"-print-file-name={runtime}"], text=True).strip()
            if not Path(found).is_absolute():
                pytest.skip(f"gcc has no {runtime}")
        program = directory / f"{driver}-{sanitizer}"
        if not program.exists():
            sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []
            files = [DRIVERS / f"{driver}.c", *(SOURCES / f"{part}.c" for part in parts)]
            subprocess.run([gcc, *FLAGS, *sanitize, f"-I{SOURCES}", *files, "-o", program], check=True)
        return program

    return compile_driver


def run(*command: str | Path) -> None:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-8000:]


@pytest.mark.parametrize("sanitizer", RUNTIMES)
def test_pure_parts(build: Build, sanitizer: str) -> None:
    program = build("space_fuzz", PURE, sanitizer)
    # Under ThreadSanitizer only the ring of notices is of interest, and all is slow.
    for seed in range(1, 2 if sanitizer == "thread" else 4):
        run(program, str(seed), "5" if sanitizer == "thread" else "120")


@pytest.mark.skipif(bool(usable()), reason=usable())
@pytest.mark.parametrize(
    "how",
    [
        "finish",
        "early",
        pytest.param("poison", marks=needs_poison),
        pytest.param("destroy", marks=needs_poison),
    ],
)
@pytest.mark.parametrize("sanitizer", ["", *RUNTIMES])
def test_pager_under_load(build: Build, sanitizer: str, how: str) -> None:
    target = build("stress_target", ["uffd"], "")
    program = build("pager_stress", CORE, sanitizer)
    for seed in range(1, 4):
        run(program, target, str(seed), "1000", how)


@pytest.mark.parametrize("sanitizer", ["", *RUNTIMES])
def test_page_server_under_load(build: Build, sanitizer: str) -> None:
    program = build("server_stress", SERVER, sanitizer)
    for seed in range(1, 4):
        run(program, str(seed), "60")
