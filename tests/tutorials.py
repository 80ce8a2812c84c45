"""The shell blocks of a page, and shells that run them as a reader would."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

DOCS = Path(__file__).resolve().parent.parent / "docs"

_BLOCK = re.compile(r"^```\{code-block\} shell\n:caption: ([^\n]+)\n\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DONE = "-- done with this block --"


@dataclass(frozen=True, slots=True)
class Block:
    """A block with a title; ``where`` is what stands before its colon."""

    title: str
    where: str
    code: str


def blocks(page: str) -> list[Block]:
    """List the blocks of a page of the docs that have a title."""
    found = []
    for title, code in _BLOCK.findall((DOCS / page).read_text()):
        where, colon, _ = title.partition(": ")
        found.append(Block(title, where if colon else "", code))
    return found


class Shell:
    """A shell that a reader types blocks into; what it started ends with it.

    ``prefix`` is what starts it in namespaces of its own, say. The first command that fails ends it.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str], prefix: Sequence[str] = ()) -> None:
        self._errors = (directory / "shell.err").open("w+")
        self._process = subprocess.Popen(
            [*prefix, "bash", "-eu", "-o", "pipefail"],
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def run(self, block: Block, timeout: float = 60) -> str:
        """Run a block to its end and return what it printed; fail when a command of it does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{block.code}echo '{_DONE}'\n".encode())
        self._process.stdin.flush()
        told = b""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while _DONE.encode() not in told:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"{block.title}: not done in {timeout} s\n{told!r}\n{self.errors}")
                data = os.read(self._process.stdout.fileno(), 65536)
                if not data:
                    raise AssertionError(f"{block.title}: a command failed\n{told!r}\n{self.errors}")
                told += data
        return told.decode().partition(_DONE)[0]

    @property
    def errors(self) -> str:
        """What was written to standard error so far."""
        self._errors.seek(0)
        return self._errors.read()
