"""The C of benchmarks/limits.py: compiled with the core's sources as the package is, and what it prints."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORE = HERE.parent / "src/criupy/_uffd"
PARTS = ("codec", "image", "space", "translate", "uffd")
#: Those of CMakeLists.txt.
FLAGS = ("-std=c11", "-O2", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-pthread")

Lines = dict[str, tuple[str, float]]
"""By its key, the unit and the value of each line that was printed."""


def compiler() -> str | None:
    """Return the system's compiler, or None."""
    return shutil.which(os.environ.get("CC", "cc"))


def build(target: Path) -> Path:
    """Compile the program."""
    cc = compiler()
    if cc is None:
        raise SystemExit("there is no C compiler: install cc, or let CC name one")
    sources = [*sorted(HERE.glob("limits*.c")), *(CORE / f"{part}.c" for part in PARTS)]
    subprocess.run([cc, *FLAGS, f"-I{CORE}", *sources, "-o", target], check=True)
    return target


def run(program: Path, *words: str | int) -> Lines:
    """Run it and return what it printed."""
    printed = subprocess.run(
        [program, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    found = (line.split("\t") for line in printed.splitlines())
    return {key: (unit, float(value)) for key, unit, value in found}


@contextlib.contextmanager
def serving(program: Path) -> Iterator[int]:
    """Run the far end of a link; yield its port."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as said, subprocess.Popen([program, "serve"], stdout=writing) as process:
        os.close(writing)
        try:
            yield int(said.readline())
        finally:
            process.kill()
