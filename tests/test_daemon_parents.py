"""The daemon over pre-dumps: what parents hold comes from their images, the rest from the source."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

import pytest

from criupy.errors import ImageError
from criupy.images import LAZY_PARENTS
from criupy.lazy_pages._images_linux import load_tasks
from criupy.lazy_pages._statistics import State, Statistics
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.page_server import Behaviour, End
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from parents import give_to_parents, lazily, nr_dirty
from serving import MIB, all_good, needs_poison, no_lies, serve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

ONE = WorkloadSpec(size=8 * MIB)
TREE = WorkloadSpec(size=2 * MIB, areas=4, adjacent=True, tree=5, threads=2, zombie=True)
SCATTERED = WorkloadSpec(size=2 * MIB, areas=2, fragmented=True, reserve=64 * MIB)


def dump(room: Path, spec: WorkloadSpec = ONE, count: Literal["old", "new"] = "new") -> WrittenImages:
    return lazily(give_to_parents(write_images(room / "images", spec, count=count)))


@pytest.mark.parametrize("count", ["old", "new"])
@pytest.mark.parametrize("spec", [ONE, TREE, SCATTERED], ids=["one", "tree", "scattered"])
async def test_only_what_is_dirty_comes_over_the_link(
    room: Path, spec: WorkloadSpec, count: Literal["old", "new"]
) -> None:
    images = dump(room, spec, count)
    async with serve(room, spec, images=images) as s, s.restore(early=4) as standin:
        await standin.finish()
        assert standin.early_result_is_good
        await all_good(standin)
        done = await s.daemon.wait()
        await all_good(standin)
        assert not await s.source_goes_on()
        assert s.source.end is End.CLOSED
        assert s.source.pages_sent == nr_dirty(images)
    pages = spec.populated_pages * spec.tree
    assert (done.state, done.pages_total, done.pages_missing) == (State.COMPLETE, pages, 0)
    assert done.local_total == done.local_received == pages - nr_dirty(images)
    assert done.pages_received == pages


async def test_a_link_that_is_lost_when_its_pages_have_come(
    room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is left to come is here: nobody loses a page."""
    spec = WorkloadSpec(size=256 * MIB)
    images = lazily(give_to_parents(write_images(room / "images", spec), every=1 << 30))
    async with serve(room, spec, images=images, inherit=True) as s, s.restore() as standin:
        await standin.finish()
        await s.transferring()
        await until(lambda: has_come(s.daemon.statistics()))
        assert s.kept is not None
        s.kept.shutdown(socket.SHUT_RDWR)
        assert s.daemon.statistics().local_missing > 0, "too late"
        done = await s.daemon.wait()
        await all_good(standin)
    assert (done.state, done.pages_poisoned) == (State.COMPLETE, 0)
    assert done.pages_received == done.local_received + nr_dirty(images) == spec.populated_pages
    assert "every page arrived, but the page server did not confirm the end" in caplog.text


def has_come(now: Statistics) -> bool:
    """Whether the source has nothing more that is wanted."""
    return now.pages_total > 0 and now.pages_missing == now.local_missing


@needs_poison
async def test_a_source_that_dies_takes_only_what_it_had(room: Path) -> None:
    images = dump(room)
    behaviour = Behaviour(cut_after=200_000)
    async with serve(room, ONE, images=images, behaviour=behaviour) as s, s.restore() as standin:
        await standin.finish()
        assert "missing pages were poisoned" in await s.failure()
        result = await standin.worker().verify()
        no_lies(result)
        assert result.poisoned == s.daemon.statistics().pages_poisoned
    done = s.daemon.statistics()
    assert done.local_received == done.local_total
    assert 0 < done.pages_poisoned < nr_dirty(images)


async def test_an_aborted_restore_leaves_the_source_as_it_was(room: Path) -> None:
    images = dump(room)
    async with serve(room, ONE, images=images) as s, s.restore():
        await s.handed_over()
        s.daemon.stop()
        assert "the restore was vetoed and a live source goes on" in await s.failure()
        assert await s.source_goes_on()


def test_a_dump_that_changed_since(room: Path) -> None:
    images = dump(room, WorkloadSpec(size=MIB))
    (path,) = images.directory.glob("pagemap-*.img")
    path.write_bytes((room / "images" / path.name).read_bytes())
    with pytest.raises(ImageError, match="one of the two has changed"):
        load_tasks(images.directory, local=False)


def test_a_dump_that_is_gone(room: Path) -> None:
    images = dump(room, WorkloadSpec(size=MIB))
    (room / "images").rename(room / "moved")
    with pytest.raises(ImageError):
        load_tasks(images.directory, local=False)


def test_a_lazy_dump_without_its_source(room: Path) -> None:
    images = dump(room, WorkloadSpec(size=MIB))
    with pytest.raises(ImageError, match="whose source serves them"):
        load_tasks(images.directory, local=True)


def test_without_the_marker_all_is_remote(room: Path) -> None:
    """As stock CRIU's daemon has it: the directory is that of a lazy dump."""
    images = dump(room, WorkloadSpec(size=MIB))
    (images.directory / LAZY_PARENTS).unlink()
    (task,) = load_tasks(images.directory, local=False).values()
    assert task.image is not None
    assert not task.is_whole
    task.image.close()
