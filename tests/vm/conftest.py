"""The virtual machines that all of these tests share: two, joined by a network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vm.image import Missing, find_criu_prefixes, make_disks
from vm.machine import Machine, start_pair
from vm.playing import DEBIAN


@pytest.fixture(scope="session")
def machines() -> Iterator[tuple[Machine, Machine]]:
    try:
        make_disks()
    except Missing as missing:
        pytest.skip(str(missing))
    with start_pair() as pair:
        yield pair


def crius() -> dict[str, str]:
    """The CRIUs in the guest by their names, and where they are there."""
    try:
        prefixes = find_criu_prefixes()
    except Missing:
        prefixes = []
    return {"criu-3.17.1": DEBIAN, **{prefix.name: str(prefix / "bin/criu") for prefix in prefixes}}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "guest_criu" in metafunc.fixturenames:
        found = crius()
        metafunc.parametrize("guest_criu", found.values(), ids=found)
