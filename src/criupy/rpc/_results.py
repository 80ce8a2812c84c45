"""What CRIU answers, as values."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

from criupy.rpc import _schema_pb2 as schema

__all__ = ["FeatureName", "Features", "PageServer", "Restored", "SourceOutcome", "Version"]

P = TypeVar("P")

FeatureName: TypeAlias = Literal["mem_track", "lazy_pages", "pidfd_store"]


@functools.total_ordering
@dataclass(frozen=True, slots=True, eq=False)
class Version:  # noqa: PLW1641 - see its docstring
    """The version of a CRIU.

    Compares with other versions and with tuples of up to three numbers:
    ``version >= (4, 0)``; being equal to tuples of several lengths, it has no
    hash. ``gitid`` is set when it was built from git (to the tag, at a release),
    and ``extra`` and ``name`` where a release has them.
    """

    major: int
    minor: int
    sublevel: int = 0
    gitid: str | None = None
    extra: int | None = None
    name: str | None = None

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Major, minor, sublevel."""
        return self.major, self.minor, self.sublevel

    def at_least(self, major: int, minor: int = 0, sublevel: int = 0) -> bool:
        """Tell whether it has what this release brought.

        A build from git between two releases counts as the next minor one, as
        it does for libcriu and runC: what is merged is in it.
        """
        own = (self.major, self.minor + 1, 0) if self._is_between else self.numbers
        return own >= (major, minor, sublevel)

    @property
    def _is_between(self) -> bool:
        # Built from git at a release, it has the name of the tag.
        tags = {f"v{self.major}.{self.minor}", f"v{self.major}.{self.minor}.{self.sublevel}"}
        return self.gitid is not None and self.gitid not in tags

    def __str__(self) -> str:
        shown = f"{self.major}.{self.minor}" + (f".{self.sublevel}" if self.sublevel else "")
        return f"{shown} ({self.gitid})" if self.gitid else shown

    def __eq__(self, other: object) -> bool:
        numbers = _numbers(other)
        return NotImplemented if numbers is None else self.numbers == numbers

    def __lt__(self, other: Version | tuple[int, ...]) -> bool:
        numbers = _numbers(other)
        return NotImplemented if numbers is None else self.numbers < numbers

    @classmethod
    def from_response(cls, response: schema.Response) -> Version:
        """Take it from the answer to a VERSION request."""
        answer = response.version
        return cls(
            answer.major_number,
            answer.minor_number,
            answer.sublevel,
            answer.gitid or None,
            answer.extra if answer.HasField("extra") else None,
            answer.name or None,
        )


def _numbers(value: object) -> tuple[int, ...] | None:
    if isinstance(value, Version):
        return value.numbers
    if isinstance(value, tuple) and len(value) <= 3 and all(isinstance(number, int) for number in value):
        return (*value, 0, 0, 0)[:3]
    return None


@dataclass(frozen=True, slots=True)
class Features:
    """What CRIU on this kernel can do; None is what was not asked, or what this CRIU does not know of.

    ``mem_track``: dirty tracking, which pre-dumps need. ``lazy_pages``:
    userfaultfd, for lazy restores. ``pidfd_store``: pidfds kept between
    pre-dumps, so that a reused pid is noticed (CRIU 3.16).
    """

    mem_track: bool | None = None
    lazy_pages: bool | None = None
    pidfd_store: bool | None = None


@dataclass(frozen=True, slots=True)
class PageServer:
    """A page server that CRIU runs in the background, listening on ``port``; CRIU does not tell its pid."""

    port: int


@dataclass(frozen=True, slots=True)
class Restored(Generic[P]):
    """A restored tree: ``pid`` is its first process as the host sees it.

    ``command`` is the process that CRIU became with ``exec_cmd``, else None; it
    is the parent of the first process, and a child of this one.
    """

    pid: int
    command: P | None


class SourceOutcome(enum.Enum):
    """What became of the process that was dumped lazily."""

    KILLED = "killed"
    """The destination has let go of it in good order, so it was killed here."""
    RESUMED = "resumed"
    """The migration failed or was aborted, and it goes on here."""
    LOST = "lost"
    """The migration failed, and it is gone here, too."""
