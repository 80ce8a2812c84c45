"""Pre-copy: how many pre-dumps to make before the dump, and where each one goes.

A pre-dump writes the memory that changed since the one before, while the tasks
run; what the dump at the end has left to do shrinks with each, until the tasks
change memory as fast as it is written. ``PreCopy`` is an iterator of rounds that
stops there. It does no work itself: whoever iterates makes each pre-dump, with
any of criupy's clients, and CRIU's statistics of it decide whether there is
another::

    rounds = PreCopy("ckpt")
    for this in rounds:
        criu.pre_dump(pid, images_dir=this.images_dir, **this.options)
    with criu.lazy_dump(pid, images_dir=rounds.last.images_dir, **rounds.last.options):
        ...

With a lazy dump at the end this is a hybrid migration: what did not change since
the last pre-dump is restored from its images, and only the rest is lazy. Needs
dirty tracking (``feature_check("mem_track")``).
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from criupy.errors import LocalProtocolError, OptionError
from criupy.images import DumpStats, read_dump_stats

__all__ = ["PreCopy", "Round", "RoundOptions", "Stopped"]

StrPath = str | os.PathLike[str]


class RoundOptions(TypedDict, total=False):
    """What ``criupy.rpc``'s clients have to be told of a round besides its directory."""

    parent_img: str
    track_mem: bool


class Stopped(enum.Enum):
    """Why there is no further round."""

    CLEAN = "nothing changes any more"
    CONVERGED = "what changes does not get less"
    LIMIT = "as many rounds as were wanted"


@dataclass(frozen=True, slots=True)
class Round:
    """One pre-dump, or the dump at the end: ``images_dir`` is where it goes, made already.

    ``parent`` is the directory of the one before, relative to ``images_dir``, as
    CRIU and runC want it; None for the first.
    """

    number: int
    images_dir: Path
    parent: str | None

    @property
    def options(self) -> RoundOptions:
        """The options that the clients of ``criupy.rpc`` take for it; runC takes ``parent_path=parent``."""
        if self.parent is None:
            return {"track_mem": True}
        return {"track_mem": True, "parent_img": self.parent}


class PreCopy:
    """The rounds of pre-copy, in directories 1, 2, ... of ``directory``.

    There are at most ``max_rounds``. They stop when one has written nothing, or
    at least ``1 - min_shrink`` times what the one before has written. A directory
    that has something in it already is an error: images of an older round would be mixed in.
    CRIU writes its statistics into the work directory, so that has to be the images' own: give
    the pre-dumps no ``work_dir`` (runC: ``work_path``) of another place.
    ``stats`` has what CRIU said of each round, ``stopped`` why they stopped.
    """

    def __init__(self, directory: StrPath, *, max_rounds: int = 8, min_shrink: float = 0.1) -> None:
        given: object = max_rounds
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise OptionError("max_rounds", f"expected a number from 1 on, got {max_rounds!r}")
        shrink: object = min_shrink
        if isinstance(shrink, bool) or not isinstance(shrink, (int, float)) or not 0 <= shrink < 1:
            raise OptionError("min_shrink", f"expected a part from 0 to below 1, got {min_shrink!r}")
        if not os.fspath(directory):
            raise OptionError("directory", f"expected a path, got {directory!r}")
        self._directory = Path(directory)
        self._max_rounds = max_rounds
        self._min_shrink = min_shrink
        self._current: Round | None = None
        self._last: Round | None = None
        self.stats: list[DumpStats] = []
        self.stopped: Stopped | None = None

    def __iter__(self) -> Iterator[Round]:
        return self

    def __next__(self) -> Round:
        if self._current is not None:
            self.stats.append(read_dump_stats(self._current.images_dir))
            self.stopped = self._verdict()
            if self.stopped is not None:
                self._last = self._make(self._current.number + 1)
                self._current = None
        if self.stopped is not None:
            raise StopIteration
        self._current = self._make(len(self.stats) + 1)
        return self._current

    @property
    def last(self) -> Round:
        """Where the dump goes, once the rounds have stopped."""
        if self._last is None:
            raise LocalProtocolError("pre-copy: iterate over the rounds first")
        return self._last

    def _make(self, number: int) -> Round:
        images_dir = self._directory / str(number)
        try:
            images_dir.mkdir(parents=True, exist_ok=True)
            left = next(images_dir.iterdir(), None)
        except OSError as error:
            raise OptionError("directory", f"cannot make {images_dir}: {error.strerror}") from error
        if left is not None:
            raise OptionError(
                "directory",
                f"expected none of {images_dir}, it has {left.name} already: remove it, or take another one",
            )
        return Round(number, images_dir, None if number == 1 else f"../{number - 1}")

    def _verdict(self) -> Stopped | None:
        written = [stats.pages_written for stats in self.stats]
        if written[-1] == 0:
            return Stopped.CLEAN
        if len(written) > 1 and written[-1] >= written[-2] * (1 - self._min_shrink):
            return Stopped.CONVERGED
        return Stopped.LIMIT if len(written) == self._max_rounds else None
