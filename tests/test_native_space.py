"""The lazy space against a dictionary, under random events."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from criupy._uffd._native import ffi, lib

PAGE = 4096
GIB = 1 << 30
#: Places 4 GiB apart (and one far off), so that ranges that span two of them
#: have lengths that do not fit 32 bits.
ZONES = (0x10000, 4 * GIB + 0x10000, 8 * GIB + 0x10000, 1 << 46)
ZONE_PAGES = 24
NOT_INHERITED = 1
IMAGES: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class State(enum.IntEnum):
    MISSING = lib.CRIUPY_PAGE_MISSING
    PRESENT = lib.CRIUPY_PAGE_PRESENT
    REMOVED = lib.CRIUPY_PAGE_REMOVED
    POISONED = lib.CRIUPY_PAGE_POISONED
    IN_FLIGHT = lib.CRIUPY_PAGE_IN_FLIGHT
    NONE = lib.CRIUPY_PAGE_NONE


def make_image(extents: Sequence[tuple[int, int, int]], id: int = 1) -> Any:
    """An image of (start, nr_pages, flags) extents, freed with its last reference."""
    out = ffi.new("struct criupy_image **")
    result = lib.criupy_image_create(
        out,
        id,
        [start for start, _, _ in extents],
        [nr for _, nr, _ in extents],
        ffi.NULL,
        [flags for _, _, flags in extents],
        len(extents),
    )
    assert result == 0
    return ffi.gc(out[0], lib.criupy_image_destroy)


def make_space(image: Any) -> Any:
    out = ffi.new("struct criupy_space **")
    assert lib.criupy_space_create(out, image) == 0
    space = ffi.gc(out[0], lib.criupy_space_destroy)
    IMAGES[space] = image  # must outlive it
    return space


def lookup(space: Any, addr: int) -> tuple[State, int | None]:
    page = ffi.new("uint64_t *", (1 << 64) - 1)
    state = State(lib.criupy_space_lookup(space, addr, page))
    return state, None if state is State.NONE else page[0]


def locate(space: Any, page: int, most: int) -> tuple[int, int] | None:
    addr, nr = ffi.new("uint64_t *"), ffi.new("uint64_t *", most)
    result = lib.criupy_space_locate(space, page, addr, nr)
    assert result in {0, -2}
    return None if result else (addr[0], nr[0])


def next_missing(space: Any, page: int, most: int, any: int) -> tuple[int, int]:
    at = ffi.new("uint64_t *", page)
    nr = lib.criupy_space_next_missing(space, at, most, any)
    return (at[0], nr) if nr else (0, 0)


@dataclass
class Model:
    """One address space, naively: where each lazy page is, and what became of it."""

    where: dict[int, int]  # run-time address -> page
    state: dict[int, State]  # page -> state

    def at(self, start: int, length: int) -> list[int]:
        return [addr for addr in self.where if start <= addr < start + length]

    def remove(self, start: int, length: int) -> int:
        before = self.nr_missing
        for addr in self.at(start, length):
            self.state[self.where[addr]] = State.REMOVED
        return before - self.nr_missing

    def remap(self, start: int, to: int, length: int) -> None:
        moving = {addr - start + to: self.where.pop(addr) for addr in self.at(start, length)}
        for addr in self.at(to, length):
            self.state[self.where.pop(addr)] = State.REMOVED
        self.where.update(moving)

    @property
    def nr_missing(self) -> int:
        return sum(state is State.MISSING for state in self.state.values())

    def copy(self) -> Model:
        return Model(dict(self.where), dict(self.state))


zones = st.sampled_from(ZONES)
offsets = st.integers(0, ZONE_PAGES - 1)
addresses = st.builds(lambda zone, offset: zone + offset * PAGE, zones, offsets)
#: Mostly a few pages, sometimes from one zone into another.
lengths = st.one_of(
    st.integers(1, ZONE_PAGES).map(lambda nr: nr * PAGE),
    st.builds(
        lambda nr, big: nr * PAGE + big, st.integers(0, 8), st.sampled_from((2 * GIB, 4 * GIB, 8 * GIB))
    ),
)
zone_extents = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 6), st.sampled_from((0, 0, 0, 1))), max_size=4
)


class LazySpaces(RuleBasedStateMachine):
    """A restored task and its forked children, all of one image."""

    @initialize(per_zone=st.lists(zone_extents, min_size=1, max_size=3), id=st.integers(1, 1 << 31))
    def create(self, per_zone: list[list[tuple[int, int, int]]], id: int) -> None:
        self.extents: list[tuple[int, int, int]] = []
        for zone, parts in zip(ZONES, per_zone, strict=False):
            start = zone
            for gap, nr, flags in parts:
                start += gap * PAGE
                self.extents.append((start, nr, flags))
                start += nr * PAGE
        self.image = make_image(self.extents, id)
        self.requested: set[int] = set()
        self.extent_of: list[int] = []
        self.dump_address: list[int] = []
        for i, (start, nr, _) in enumerate(self.extents):
            self.extent_of += [i] * nr
            self.dump_address += [start + k * PAGE for k in range(nr)]
        self.nr_pages = len(self.extent_of)
        assert lib.criupy_image_nr_pages(self.image) == self.nr_pages
        model = Model(
            {addr: page for page, addr in enumerate(self.dump_address)},
            dict.fromkeys(range(self.nr_pages), State.MISSING),
        )
        self.spaces: list[tuple[Any, Model]] = [(make_space(self.image), model)]

    def pick(self, index: int) -> tuple[Any, Model]:
        return self.spaces[index % len(self.spaces)]

    @rule(which=st.integers(0, 7), start=addresses, length=lengths)
    def remove(self, which: int, start: int, length: int) -> None:
        space, model = self.pick(which)
        assert lib.criupy_space_remove(space, start, length) == model.remove(start, length)

    @rule(which=st.integers(0, 7), start=addresses, to=addresses, length=lengths)
    def remap(self, which: int, start: int, to: int, length: int) -> None:
        space, model = self.pick(which)
        assert lib.criupy_space_remap(space, start, to, length) == 0
        if start != to:
            model.remap(start, to, length)

    @rule(
        which=st.integers(0, 7), start=addresses, to=addresses, back=addresses, nr=st.integers(1, ZONE_PAGES)
    )
    def remap_chain_home(self, which: int, start: int, to: int, back: int, nr: int) -> None:
        for a, b in ((start, to), (to, back), (back, start)):
            self.remap(which, a, b, nr * PAGE)

    @precondition(lambda self: self.nr_pages)
    @rule(
        which=st.integers(0, 7),
        page=st.integers(0, 1 << 16),
        nr=st.integers(1, 10),
        state=st.sampled_from((State.PRESENT, State.PRESENT, State.POISONED, State.REMOVED, State.MISSING)),
    )
    def install(self, which: int, page: int, nr: int, state: State) -> None:
        space, model = self.pick(which)
        page %= self.nr_pages
        nr = min(nr, self.nr_pages - page)
        if state is State.MISSING and not set(range(page, page + nr)) <= set(model.where.values()):
            return  # what is mapped nowhere is never wanted again
        lib.criupy_space_set(space, page, nr, state)
        model.state.update(dict.fromkeys(range(page, page + nr), state))

    @precondition(lambda self: self.nr_pages)
    @rule(page=st.integers(0, 1 << 16), nr=st.integers(1, 10), asked=st.booleans())
    def request(self, page: int, nr: int, asked: bool) -> None:
        page %= self.nr_pages
        nr = min(nr, self.nr_pages - page)
        lib.criupy_image_set_requested(self.image, page, nr, asked)
        pages = range(page, page + nr)
        self.requested = self.requested | set(pages) if asked else self.requested - set(pages)

    @precondition(lambda self: len(self.spaces) < 5)
    @rule(which=st.integers(0, 7))
    def fork(self, which: int) -> None:
        space, model = self.pick(which)
        out = ffi.new("struct criupy_space **")
        assert lib.criupy_space_fork(space, out) == 0
        child = model.copy()
        for page, extent in enumerate(self.extent_of):
            if self.extents[extent][2] & NOT_INHERITED:
                child.state[page] = State.REMOVED
        self.spaces.append((ffi.gc(out[0], lib.criupy_space_destroy), child))

    @precondition(lambda self: len(self.spaces) > 1)
    @rule(which=st.integers(0, 7))
    def exit(self, which: int) -> None:
        del self.spaces[which % len(self.spaces)]

    @rule(which=st.integers(0, 7), page=st.integers(0, 200), most=st.integers(1, 12), any=st.integers(0, 1))
    def scan(self, which: int, page: int, most: int, any: int) -> None:
        space, model = self.pick(which)

        def wanted(p: int) -> bool:
            return (
                p < self.nr_pages
                and model.state[p] is State.MISSING
                and (any == 1 or p not in self.requested)
            )

        first = next((p for p in range(page, self.nr_pages) if wanted(p)), None)
        if first is None:
            assert next_missing(space, page, most, any) == (0, 0)
            return
        nr = 1
        while nr < most and wanted(first + nr) and self.extent_of[first + nr] == self.extent_of[first]:
            nr += 1
        assert next_missing(space, page, most, any) == (first, nr)

    @invariant()
    def every_address_is_judged_right(self) -> None:
        for space, model in self.spaces:
            seen = set(model.where) | {zone + nr * PAGE for zone in ZONES for nr in (0, 3, 8, 30)}
            for addr in seen:
                page = model.where.get(addr)
                state = State.NONE if page is None else model.state[page]
                if state is State.MISSING and page in self.requested:
                    state = State.IN_FLIGHT
                assert lookup(space, addr) == (state, page)
                assert lookup(space, addr + PAGE - 1) == (state, page)

    @invariant()
    def translation_is_one_to_one(self) -> None:
        for space, model in self.spaces:
            places = {page: addr for addr, page in model.where.items()}
            assert len(places) == len(model.where)
            for page in range(self.nr_pages):
                found = locate(space, page, 9)
                if page not in places:
                    assert found is None
                    assert model.state[page] is not State.MISSING
                    continue
                assert found is not None
                addr, nr = found
                assert addr == places[page]
                assert 1 <= nr <= 9
                for k in range(nr):
                    assert places[page + k] == addr + k * PAGE
                    assert self.extent_of[page + k] == self.extent_of[page]
            assert locate(space, self.nr_pages, 1) is None

    @invariant()
    def missing_are_counted(self) -> None:
        for space, model in self.spaces:
            assert lib.criupy_space_nr_missing(space) == model.nr_missing


TestLazySpaces = LazySpaces.TestCase
TestLazySpaces.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_locate_is_as_long_as_the_extent_until_something_moves() -> None:
    image = make_image([(0x10000, 16, 0), (0x20000, 4, 0)])
    space = make_space(image)
    assert locate(space, 0, 100) == (0x10000, 16)
    assert locate(space, 3, 5) == (0x13000, 5)
    assert locate(space, 16, 100) == (0x20000, 4)
    assert lib.criupy_space_remap(space, 0x14000, 0x900000, 2 * PAGE) == 0
    assert locate(space, 0, 100) == (0x10000, 4)
    assert locate(space, 4, 100) == (0x900000, 2)
    assert locate(space, 6, 100) == (0x16000, 10)


def test_the_old_place_of_a_moved_range_reads_zeros() -> None:
    """MREMAP_DONTUNMAP leaves a mapping behind, which has nothing of the image any more."""
    space = make_space(make_image([(0x10000, 4, 0)]))
    assert lib.criupy_space_remap(space, 0x10000, 0x50000, 4 * PAGE) == 0
    assert lookup(space, 0x10000) == (State.NONE, None)
    assert lookup(space, 0x51000) == (State.MISSING, 1)
    assert lib.criupy_space_remove(space, 0x10000, 4 * PAGE) == 0
    assert lib.criupy_space_nr_missing(space) == 4


def test_removing_4_gib_in_one_call() -> None:
    nr = (4 * GIB) // PAGE
    space = make_space(make_image([(1 << 32, nr, 0), ((1 << 32) + 4 * GIB, 3, 0)]))
    assert lib.criupy_space_remove(space, 1 << 32, 4 * GIB) == nr
    assert lib.criupy_space_nr_missing(space) == 3
    assert lib.criupy_space_remove(space, 1 << 32, 4 * GIB) == 0


@pytest.mark.parametrize(
    ("start", "length"), [((1 << 64) - PAGE, 2 * PAGE), (PAGE, (1 << 64) - PAGE), ((1 << 63), 1 << 63)]
)
def test_ranges_beyond_the_address_space_are_refused(start: int, length: int) -> None:
    space = make_space(make_image([(0x10000, 4, 0)]))
    assert lib.criupy_space_remove(space, start, length) == -22
    assert lib.criupy_space_remap(space, start, 0x10000, length) == -22
    assert lib.criupy_space_remap(space, 0x10000, start, length) == -22
    assert lib.criupy_space_nr_missing(space) == 4


@pytest.mark.parametrize(
    ("starts", "nr_pages"),
    [
        ([0x1000, 0x1000], [1, 1]),
        ([0x3000, 0x1000], [1, 1]),
        ([0x1000, 0x2000], [2, 1]),
        ([0x1000], [0]),
        ([0x1001], [1]),
        ([0x1000], [1 << 52]),
        ([(1 << 64) - 0x1000], [1]),
        ([0], [1 << 41]),
    ],
    ids=["same", "unsorted", "overlap", "empty", "unaligned", "overflow", "the last page", "too many"],
)
def test_impossible_extents_are_refused(starts: list[int], nr_pages: list[int]) -> None:
    out = ffi.new("struct criupy_image **")
    assert lib.criupy_image_create(out, 1, starts, nr_pages, ffi.NULL, ffi.NULL, len(starts)) == -22
    assert out[0] == ffi.NULL


def test_an_image_without_lazy_pages_is_fine() -> None:
    image = make_image([])
    space = make_space(image)
    assert lookup(space, 0x10000) == (State.NONE, None)
    assert locate(space, 0, 1) is None
    assert next_missing(space, 0, 1, 1) == (0, 0)
    assert lib.criupy_space_remove(space, 0, 1 << 47) == 0
