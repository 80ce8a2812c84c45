"""Scenarios in the virtual machines, as the tests here play them."""

from __future__ import annotations

import json
from typing import Any

from vm.machine import Guest

ROOM = "/root/room"
DEBIAN = "/usr/sbin/criu"
"""criu 3.17.1 of the guest's own Debian."""


def words(name: str, criu: str, **options: object) -> list[str]:
    """Return the command of a scenario."""
    chosen = [f"{key}={value}" for key, value in options.items()]
    return ["python3", "/opt/criupy/scenarios.py", name, criu, ROOM, *chosen]


async def play(guest: Guest, name: str, criu: str, **options: object) -> dict[str, Any]:
    """Run a scenario in a guest and return what it found."""
    await guest.run(["rm", "-rf", ROOM])
    return last((await guest.run(words(name, criu, **options), timeout=150)).output)


def last(output: str) -> dict[str, Any]:
    """Return what a scenario found, or said last."""
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found
