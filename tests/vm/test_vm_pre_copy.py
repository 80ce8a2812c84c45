"""Pre-copy before post-copy: pre-dumps, a lazy dump of what changed since, a lazy restore over all of them.

https://github.com/checkpoint-restore/criu/issues/2542 says that pages which pre-dumps hold are fetched once
more because the parents' pagemaps call them lazy. They are not, by any daemon: only the last dump's pagemap
counts. What does make all pages of the last dump lazy is a dump without --track-mem, and huge pages, of
which one written byte makes two megabytes dirty.

But criu restore reads what parents hold before the process runs, unless `criupy lazy-parents` made that lazy.
"""

from __future__ import annotations

import pytest

from vm.machine import Machine
from vm.playing import DEBIAN, play

pytestmark = pytest.mark.vm

Pair = tuple[Machine, Machine]
ALL, FIRST, SECOND = 2048, 512, 256
"""Pages of the process, and those written after the first and the second pre-dump."""


@pytest.mark.parametrize("daemon", ["ours", "stock"])
async def test_pages_of_parents_are_not_fetched(machines: Pair, guest_criu: str, daemon: str) -> None:
    async with machines[0].connect() as guest:
        found = await play(guest, "hybrid", guest_criu, daemon=daemon)
    first, second, last = found["levels"]
    # That parents' pages are lazy, too, is what the issue saw.
    assert first["LAZY|PRESENT"] == ALL
    assert second["LAZY|PRESENT"] == FIRST
    assert last["LAZY"] == SECOND
    assert last["PARENT"] >= ALL - SECOND
    assert "LAZY|PRESENT" not in last
    assert SECOND <= found["fetched"] < SECOND + 16  # headers make a page or two
    if daemon == "ours":
        assert found["stats"]["pages_total"] == found["stats"]["pages_received"] == SECOND


async def test_pages_of_parents_are_lazy_as_well(machines: Pair, guest_criu: str) -> None:
    async with machines[0].connect() as guest:
        eager = await play(guest, "hybrid", guest_criu)
        lazy = await play(guest, "hybrid", guest_criu, lazy_parents="yes")
    # Without it criu reads them all; with it only what no process can do without.
    assert eager["restored"] >= ALL - SECOND
    assert lazy["restored"] < eager["restored"] - (ALL - SECOND) + 16
    assert SECOND <= lazy["fetched"] < SECOND + 16
    stats = lazy["stats"]
    assert stats["pages_total"] == stats["pages_received"]
    assert stats["local_total"] == stats["local_received"] >= ALL - SECOND
    assert stats["pages_total"] - stats["local_total"] == SECOND


@pytest.mark.parametrize("options", [{"track": "no"}, {"huge": "always"}], ids=["untracked", "huge-pages"])
async def test_what_makes_all_pages_lazy_again(machines: Pair, options: dict[str, str]) -> None:
    async with machines[0].connect() as guest:
        found = await play(guest, "hybrid", DEBIAN, **options)
    assert found["levels"][-1]["LAZY"] == ALL
    assert found["fetched"] >= ALL


async def test_a_container_of_runc(machines: Pair, guest_criu: str) -> None:
    async with machines[0].connect() as guest:
        found = await play(guest, "container", guest_criu)
    assert (found["outcome"], found["here"], found["there"]) == ("killed", None, "running")
    # Each round writes half of what the one before has; the last writing comes after the last round.
    assert found["stopped"] == "LIMIT"
    all_pages, first, second = found["written"]
    assert all_pages >= ALL
    assert FIRST <= first < FIRST + 64
    assert SECOND <= second < SECOND + 64
    assert found["counts"]["LAZY"] < SECOND
