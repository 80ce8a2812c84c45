"""What CRIU measured of itself: ``stats-dump`` and ``stats-restore``.

CRIU writes them at the end of a dump, pre-dump or restore that succeeded, into
its work directory, which is the images directory unless ``--work-dir`` or the
RPC's ``work_dir_fd`` says otherwise (CRIU: criu/stats.c). A restore whose
post-restore script failed writes its own, too. Times are 32-bit counts of
microseconds: they start again from zero after 71 minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from google.protobuf.message import Message

from criupy.images import _framing, _schema_pb2
from criupy.images._framing import ImageFile, StrPath, open_image
from criupy.images._tasks import parse_message, require

DUMP_STATS: Final = "stats-dump"
RESTORE_STATS: Final = "stats-restore"


@dataclass(frozen=True, slots=True)
class DumpStats:
    """What a dump or pre-dump took: times in microseconds, memory in pages.

    ``freezing_us`` went into stopping the tasks. ``frozen_us`` is how long
    they stood still: of a lazy dump it has the whole transfer, of a pre-dump
    only the collecting. ``memdump_us`` went into their memory, ``memwrite_us``,
    which a dump counts in that as well, into writing it to images or sending
    it. ``irmap_resolve_us`` went into finding the paths of watched inodes.

    ``pages_scanned`` were looked at; of these ``pages_skipped_parent`` are
    taken from the parent images, ``pages_written`` were written or sent, and
    ``pages_lazy`` were left for a lazy dump to serve. ``page_pipes`` and
    ``page_pipe_bufs`` are what held them. The ``shpages`` are those of shared
    memory. None: the CRIU that wrote this did not count it.
    """

    freezing_us: int
    frozen_us: int
    memdump_us: int
    memwrite_us: int
    irmap_resolve_us: int | None
    pages_scanned: int
    pages_skipped_parent: int
    pages_written: int
    pages_lazy: int | None
    page_pipes: int | None
    page_pipe_bufs: int | None
    shpages_scanned: int | None
    shpages_skipped_parent: int | None
    shpages_written: int | None


@dataclass(frozen=True, slots=True)
class RestoreStats:
    """What a restore took: times in microseconds, memory in pages.

    ``forking_us`` went into forking the tasks; each of them adds to it without
    regard to the others, so of a larger tree it is only a hint.
    ``restore_us`` is the whole until the tasks are about to run.

    ``pages_compared`` were compared with what a task had inherited, of these
    ``pages_skipped_cow`` were the same and stay shared. ``pages_restored``
    were read from images (None: the CRIU that wrote this did not count them).
    Pages that come lazily are in none of these.
    """

    forking_us: int
    restore_us: int
    pages_compared: int
    pages_skipped_cow: int
    pages_restored: int | None


def read_dump_stats(work_dir: StrPath) -> DumpStats:
    """Read ``stats-dump`` of CRIU's work directory."""
    with open_image(work_dir, DUMP_STATS, _framing.STATS) as image:
        offset, message = _read(image, "dump")
        found = message.dump
        require(
            image,
            offset,
            found,
            (
                "freezing_time",
                "frozen_time",
                "memdump_time",
                "memwrite_time",
                "pages_scanned",
                "pages_skipped_parent",
                "pages_written",
            ),
        )
        return DumpStats(
            found.freezing_time,
            found.frozen_time,
            found.memdump_time,
            found.memwrite_time,
            _optional(found, "irmap_resolve"),
            found.pages_scanned,
            found.pages_skipped_parent,
            found.pages_written,
            _optional(found, "pages_lazy"),
            _optional(found, "page_pipes"),
            _optional(found, "page_pipe_bufs"),
            _optional(found, "shpages_scanned"),
            _optional(found, "shpages_skipped_parent"),
            _optional(found, "shpages_written"),
        )


def read_restore_stats(work_dir: StrPath) -> RestoreStats:
    """Read ``stats-restore`` of CRIU's work directory."""
    with open_image(work_dir, RESTORE_STATS, _framing.STATS) as image:
        offset, message = _read(image, "restore")
        found = message.restore
        require(image, offset, found, ("pages_compared", "pages_skipped_cow", "forking_time", "restore_time"))
        return RestoreStats(
            found.forking_time,
            found.restore_time,
            found.pages_compared,
            found.pages_skipped_cow,
            _optional(found, "pages_restored"),
        )


def _read(image: ImageFile, what: Literal["dump", "restore"]) -> tuple[int, _schema_pb2.Stats]:
    offset, data = image.read_only_record()
    message = parse_message(image, offset, data, _schema_pb2.Stats)
    if not message.HasField(what):
        raise image.error(offset, f"expected statistics of a {what}, the image has none")
    return offset, message


def _optional(message: Message, field: str) -> int | None:
    if not message.HasField(field):
        return None
    value: int = getattr(message, field)
    return value
