"""The marker of a relay beside the images."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from criupy.errors import ImageError
from criupy.images import MARKER, RelayMarker, read_marker, write_marker
from criupy.testing.images import write_images
from criupy.testing.spec import WorkloadSpec

KEY = bytes(range(32))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", WorkloadSpec(size=1 << 20), style="lazy").directory


def test_a_marker_comes_back(images: Path) -> None:
    assert read_marker(images) is None
    path = write_marker(images, RelayMarker(KEY, 2.5))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_marker(images) == RelayMarker(KEY, 2.5)
    write_marker(images, RelayMarker(bytes(32), None))
    assert read_marker(images) == RelayMarker(bytes(32), None)
    assert [path.name for path in images.glob(f"{MARKER}*")] == [MARKER]


def test_it_says_nothing_beside_the_images_of_another_dump(images: Path, tmp_path: Path) -> None:
    write_marker(images, RelayMarker(KEY, None))
    other = write_images(tmp_path / "other", WorkloadSpec(size=2 << 20), style="lazy").directory
    (other / MARKER).write_bytes((images / MARKER).read_bytes())
    assert read_marker(other) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"version": 1, "dump": "x", "key": "zz", "hold_timeout": null}',
        '{"version": 2, "dump": "x", "key": "00", "hold_timeout": null}',
        f'{{"version": 1, "dump": "x", "key": "{KEY.hex()}", "hold_timeout": "soon"}}',
    ],
)
def test_what_no_relay_wrote_is_told(images: Path, text: str) -> None:
    (images / MARKER).write_text(text)
    with pytest.raises(ImageError, match=MARKER):
        read_marker(images)


def test_no_marker_without_a_dump(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="expected the images of a dump"):
        write_marker(tmp_path, RelayMarker(KEY, None))
