"""When pre-copy stops, and where its rounds go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import images_writer as w
from criupy.errors import ImageError, LocalProtocolError, OptionError
from criupy.pre_copy import PreCopy, Round, Stopped


def write_stats(this: Round, pages: int) -> None:
    fields = dict.fromkeys(range(1, 8), 0)
    fields[7] = pages
    (this.images_dir / "stats-dump").write_bytes(w.dump_stats(fields))


def run(rounds: PreCopy, written: Sequence[int]) -> list[Round]:
    """Go through the rounds as if each had written so many pages."""
    made: list[Round] = []
    for this in rounds:
        write_stats(this, written[len(made)])
        made.append(this)
    return made


@pytest.mark.parametrize(
    ("written", "how", "stopped"),
    [
        ([1000, 0], {}, Stopped.CLEAN),
        ([0], {}, Stopped.CLEAN),
        ([1000, 400, 100, 95], {}, Stopped.CONVERGED),
        ([1000, 2000], {}, Stopped.CONVERGED),
        ([1000, 100, 89, 89], {}, Stopped.CONVERGED),
        ([1000, 999, 998, 998], {"min_shrink": 0}, Stopped.CONVERGED),
        ([1000, 501], {"min_shrink": 0.5}, Stopped.CONVERGED),
        ([1000, 500, 250, 125, 60, 30, 15, 7], {}, Stopped.LIMIT),
        ([1000], {"max_rounds": 1}, Stopped.LIMIT),
        ([1000, 500], {"max_rounds": 2}, Stopped.LIMIT),
    ],
)
def test_when_it_stops(tmp_path: Path, written: list[int], how: dict[str, float], stopped: Stopped) -> None:
    rounds = PreCopy(tmp_path / "ckpt", **how)  # type: ignore[arg-type]
    made = run(rounds, written)
    assert rounds.stopped is stopped
    assert [stats.pages_written for stats in rounds.stats] == written
    last = len(written) + 1
    assert [this.number for this in made] == list(range(1, last))
    assert rounds.last == Round(last, tmp_path / "ckpt" / str(last), f"../{last - 1}")
    assert rounds.last.images_dir.is_dir()
    assert next(rounds, None) is None


@given(written=st.lists(st.integers(0, 1 << 40), min_size=8, max_size=8), limit=st.integers(1, 8))
def test_it_always_stops(written: list[int], limit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rounds = PreCopy(tmp_path_factory.mktemp("rounds") / "ckpt", max_rounds=limit)
    assert 1 <= len(run(rounds, written)) <= limit
    assert rounds.stopped is not None


def test_each_round_is_the_child_of_the_one_before(tmp_path: Path) -> None:
    made = run(PreCopy(tmp_path), [100, 50, 50])
    assert [this.parent for this in made] == [None, "../1", "../2"]
    assert [this.options for this in made] == [
        {"track_mem": True},
        {"track_mem": True, "parent_img": "../1"},
        {"track_mem": True, "parent_img": "../2"},
    ]
    for this in made[1:]:
        assert (this.images_dir / (this.parent or "")).resolve().is_dir()


def test_a_round_that_was_not_made(tmp_path: Path) -> None:
    rounds = PreCopy(tmp_path)
    next(rounds)
    with pytest.raises(ImageError, match="stats-dump"):
        next(rounds)


def test_a_directory_that_is_there(tmp_path: Path) -> None:
    run(PreCopy(tmp_path), [0])
    with pytest.raises(OptionError, match=r"directory: expected none of .*/1, it has stats-dump already"):
        next(PreCopy(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"directory: cannot make .*/file/1: Not a directory"):
        next(PreCopy(tmp_path / "file"))


def test_a_first_round_that_failed_can_be_tried_again(tmp_path: Path) -> None:
    next(PreCopy(tmp_path))
    assert next(PreCopy(tmp_path)).images_dir == tmp_path / "1"


def test_the_last_before_the_others(tmp_path: Path) -> None:
    with pytest.raises(LocalProtocolError, match="iterate over the rounds first"):
        _ = PreCopy(tmp_path).last


@pytest.mark.parametrize(
    "how",
    [{"max_rounds": 0}, {"max_rounds": True}, {"min_shrink": 1}, {"min_shrink": -1}, {"min_shrink": "x"}],
)
def test_wrong_limits(tmp_path: Path, how: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(how))):
        PreCopy(tmp_path, **how)  # type: ignore[arg-type]


def test_no_directory() -> None:
    with pytest.raises(OptionError, match="directory: expected a path"):
        PreCopy("")
