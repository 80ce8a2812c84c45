"""``criupy lazy-parents``: a directory to restore from."""

from __future__ import annotations

from pathlib import Path

import pytest

from criupy.commands import main
from criupy.images import original_images, read_pagemap
from test_images_parents import write_chain


def test_it_makes_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = write_chain(tmp_path, [[(1, 4, 2), (5, 10, 1)], [(5, 9, 6)]])
    assert main(["lazy-parents", str(top), str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == "9 pages of the parents are lazy\n"
    assert original_images(tmp_path / "new").samefile(top)
    assert list(read_pagemap(tmp_path / "new", 7).flags) == [2, 2, 1]


def test_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lazy-parents", str(tmp_path), str(tmp_path / "new")]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("criupy lazy-parents: ")
    assert told.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
