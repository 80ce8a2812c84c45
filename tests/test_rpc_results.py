"""What the clients return: versions."""

from __future__ import annotations

import pytest

from criupy import Version


def version(*numbers: int, gitid: str | None = None) -> Version:
    major, minor, sublevel = (*numbers, 0, 0)[:3]
    return Version(major, minor, sublevel, gitid=gitid)


@pytest.mark.parametrize(
    ("found", "is_next"),
    [
        (version(4, 1), False),
        (version(4, 1, gitid="v4.1"), False),
        (version(4, 1, 1, gitid="v4.1.1"), False),
        (version(4, 1, gitid="v4.1-12-gabc"), True),
        (version(4, 1, gitid="v4.0"), True),
        (version(4, 2), True),
    ],
    ids=str,
)
def test_a_build_from_git_between_releases_counts_as_the_next(found: Version, is_next: bool) -> None:
    assert found.at_least(4, 1)
    assert found.at_least(4, 2) is is_next
    assert not found.at_least(4, 2, 1)
    assert not found.at_least(4, 3)


def test_a_version_equals_tuples() -> None:
    found = version(4, 1, gitid="v4.1-12-gabc")
    assert found == (4, 1)
    assert found == (4, 1, 0)
    assert found == version(4, 1)
    assert found != (4, 1, 1)
    assert (4, 0) < found < (4, 2)


def test_a_version_has_no_hash() -> None:
    """The tuples that it equals have different ones."""
    with pytest.raises(TypeError, match="unhashable"):
        hash(version(4, 1))
