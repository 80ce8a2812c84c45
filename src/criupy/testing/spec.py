"""What a workload's memory looks like: its areas, and every byte in them.

The same functions are in `workload_memory.c`; a test compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Area", "Run", "WorkloadSpec", "page_bytes"]

PAGE = 4096
AREA_BASE = 0x10_0000_0000
AREA_GAP = 0x10_0000
RESERVE_BASE = 0x30_0000_0000
RESERVE_PAGES = 16
ZOMBIE_STATUS = 42

_MASK = (1 << 64) - 1
_WORDS = PAGE // 8
_RAMP_STEP = 0x9E37_79B9_7F4A_7C15
# One big integer per page: a key repeated in every word, XORed with a ramp.
_ONES = sum(1 << (64 * j) for j in range(_WORDS))
_RAMP = sum(((j + 1) * _RAMP_STEP & _MASK) << (64 * j) for j in range(_WORDS))


def _mix(x: int) -> int:
    x = ((x ^ x >> 30) * 0xBF58_476D_1CE4_E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D0_49BB_1331_11EB) & _MASK
    return x ^ x >> 31


@functools.lru_cache(maxsize=64)
def _task_key(seed: int, task: int, generation: int) -> int:
    return _mix((_mix(seed) + (task << 32 | generation)) & _MASK)


def page_bytes(seed: int, task: int, page: int, generation: int = 0) -> bytes:
    """Return the 4096 bytes of a populated page."""
    key = _mix((_task_key(seed, task, generation) + page) & _MASK)
    return (key * _ONES ^ _RAMP).to_bytes(PAGE, "little")


@dataclass(frozen=True, slots=True)
class Area:
    """One mapping of every task: `nr_pages` pages from `start`, the first one with index `first`."""

    start: int
    first: int
    nr_pages: int
    stride: int
    dont_dump: bool
    """Mapped with MADV_DONTDUMP, so that adjacent areas stay apart."""

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.nr_pages * PAGE


@dataclass(frozen=True, slots=True)
class Run:
    """Populated pages without a gap: `nr_pages` from address `start`, the first one with index `first`."""

    start: int
    first: int
    nr_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """Describe a workload: its memory and its processes.

    `size` bytes in `areas` mappings per task, every page of them filled, or every second one when
    `fragmented`; `adjacent` leaves no gap between areas. `reserve` bytes are mapped besides with only a few
    pages filled. `tree` tasks with `threads` threads each; `children` is how many
    forked children can be talked to; `samples` how many touch latencies a worker keeps.
    """

    size: int = 1 << 20
    seed: int = 1
    areas: int = 1
    adjacent: bool = False
    fragmented: bool = False
    reserve: int = 0
    tree: int = 1
    threads: int = 1
    children: int = 0
    samples: int = 0
    zombie: bool = False

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % (self.areas * PAGE):
            raise ValueError(f"size {self.size}: each of the {self.areas} areas needs whole 4096-byte pages")
        if self.reserve % (RESERVE_PAGES * PAGE):
            raise ValueError(f"reserve {self.reserve}: not a multiple of {RESERVE_PAGES * PAGE}")
        if self.areas >= 512 or min(self.areas, self.tree, self.threads) < 1:
            raise ValueError("1 to 511 areas, and at least one task and one thread")

    def arguments(self) -> list[str]:
        """Return the options of criupy-workload for this."""
        words = [
            f"--size={self.size}",
            f"--seed={self.seed}",
            f"--areas={self.areas}",
            f"--reserve={self.reserve}",
            f"--tree={self.tree}",
            f"--threads={self.threads}",
            f"--children={self.children}",
            f"--samples={self.samples}",
        ]
        flags = {"adjacent": self.adjacent, "fragmented": self.fragmented, "zombie": self.zombie}
        return words + [f"--{name}" for name, wanted in flags.items() if wanted]

    @property
    def main_pages(self) -> int:
        """Count the pages of all areas but the reserve; the reserve's indices come after them."""
        return self.size // PAGE

    @property
    def reserve_pages(self) -> int:
        """Count the pages of the reserve."""
        return self.reserve // PAGE

    def task_areas(self) -> tuple[Area, ...]:
        """Return the areas in address order; they are the same in every task."""
        nr = self.main_pages // self.areas
        distance = nr * PAGE + (0 if self.adjacent else AREA_GAP)
        stride = 2 if self.fragmented else 1
        areas = [
            Area(AREA_BASE + i * distance, i * nr, nr, stride, dont_dump=bool(i % 2))
            for i in range(self.areas)
        ]
        if self.reserve:
            nr = self.reserve_pages
            odd = bool(self.areas % 2)
            areas.append(Area(RESERVE_BASE, self.main_pages, nr, nr // RESERVE_PAGES, dont_dump=odd))
        return tuple(areas)

    def runs(self) -> Iterator[Run]:
        """Yield the populated runs of a task in address order, within one area each."""
        for area in self.task_areas():
            if area.stride == 1:
                yield Run(area.start, area.first, area.nr_pages)
                continue
            # the main areas count from index 0, the reserve from its own first page
            offset = -area.first % area.stride if area.first < self.main_pages else 0
            for n in range(offset, area.nr_pages, area.stride):
                yield Run(area.start + n * PAGE, area.first + n, 1)

    @property
    def populated_pages(self) -> int:
        """Count the populated pages of one task."""
        return sum(run.nr_pages for run in self.runs())

    def page(self, task: int, index: int) -> bytes:
        """Return the first content of a populated page."""
        return page_bytes(self.seed, task, index)
