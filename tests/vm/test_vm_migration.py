"""Old and new CRIU on Linux 6.1, with criupy's daemon between."""

from __future__ import annotations

import signal

import pytest

from vm.machine import Machine
from vm.playing import DEBIAN, play

pytestmark = pytest.mark.vm

Pair = tuple[Machine, Machine]


async def test_a_busy_tree_moves(machines: Pair, guest_criu: str) -> None:
    async with machines[0].connect() as guest:
        found = await play(guest, "plain", guest_criu)
    assert found["stats"]["pages_missing"] == 0
    assert found["stats"]["pages_demand"] > 0
    assert f"frames of {32 if '4.2' in guest_criu else 24} bytes" in found["log"]


async def test_tasks_are_killed_where_nothing_can_be_poisoned(machines: Pair) -> None:
    async with machines[0].connect() as guest:
        found = await play(guest, "lost", DEBIAN)
    assert found["daemon"] == 1
    assert "this kernel cannot poison pages (Invalid argument), so the tasks were killed" in found["error"]
    assert found["task"] == signal.SIGKILL
    assert found["child"] is not None
