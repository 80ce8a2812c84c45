"""What the tests of a pager with two lanes do again and again."""

from __future__ import annotations

from criupy._uffd.pager_linux import URGENT, Outcome, Phase
from native_peer import FINISHED, Restore, Source, remote_image
from native_target import Target


def lazy(restore: Restore, target: Target, nr_pages: int) -> int:
    addr, uffd = target.lazy(nr_pages)
    restore.pager.add_task(77, uffd, remote_image(77, [(addr, nr_pages)]))
    return addr


def both(restore: Restore, bulk: Source, urgent: Source) -> None:
    restore.link_lane(bulk)
    restore.link_lane(urgent, URGENT)


def running(restore: Restore, bulk: Source) -> None:
    """Finish the restore; the first word on the lane for bulk says so."""
    restore.finish()
    assert bulk.frame() == (FINISHED, 0, 0, 0)


def ended(restore: Restore) -> None:
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.error, stats.pages_missing) == (Outcome.COMPLETE, 0, 0)
    assert stats.nr_outstanding == 0
