"""Move a running process and watch it happen: python -m criupy.testing.demo."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from criupy._elsewhere import need_linux
from criupy.errors import CriupyError, NeedsLinux
from criupy.testing._demo_report import Measured, summary

if TYPE_CHECKING:
    from criupy.testing.criu_linux import Criu

__all__ = ["main"]

MIB = 1 << 20
DEFAULT_SIZE = 256
_SPARE = 256 * MIB
_WIDEST = 100
_SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))

_DESCRIPTION = """\
Move a process from a source to a destination, both on this machine, and let
it run there before its memory has arrived. First criupy-lazy-pages fetches
the memory, then criu lazy-pages does for an identical process; at the end is
a table of what both cost. Without root, or a CRIU that works here, stand-ins
play the two ends of the migration and only criupy-lazy-pages is shown."""


class _Interrupted(CriupyError):
    """A signal asks for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; everything was cleaned up")
        self.number = number


class _Narrator:
    """Tell the story on standard output: wrapped lines on a terminal, whole ones elsewhere."""

    def __init__(self) -> None:
        self._on_terminal = sys.stdout.isatty()
        self.last = "nothing yet"

    @property
    def terminal(self) -> Path | None:
        # By our descriptor, not by its name: that also works where the terminal's device is not mounted.
        return Path(f"/proc/{os.getpid()}/fd/{sys.stdout.fileno()}") if self._on_terminal else None

    def _wrap(self, text: str, indent: str) -> str:
        if not self._on_terminal:
            return text
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        return textwrap.fill(text, max(width - 1, 40), subsequent_indent=indent, break_on_hyphens=False)

    def line(self, text: str = "", *, wrap: bool = True, indent: str = "") -> None:
        """Write a line in the place of a bar that may be there."""
        clear = "\r\x1b[2K" if self._on_terminal else ""
        print(clear + (self._wrap(text, indent) if wrap else text), flush=True)

    def say(self, text: str) -> None:
        self.last = text
        who, _, _ = text.partition(":")
        self.line(text, indent=" " * (len(who) + 2))

    def quote(self, program: str, line: str) -> None:
        self.line(f"  {program}: {line}", wrap=False)

    def show(self, text: str) -> None:
        if self._on_terminal:
            print(f"\r\x1b[2K  {text}", end="", flush=True)

    def give_back(self) -> None:
        """Leave the terminal as it was: a bar whose program was killed has hidden the cursor."""
        if self._on_terminal:
            print("\r\x1b[2K\x1b[?25h", end="", flush=True)


def _size(text: str) -> int:
    try:
        size = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of MiB") from None
    # the fewest pages of which not all arrive at once
    if not 4 <= size <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{size} MiB: choose between 4 and {1 << 20}")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m criupy.testing.demo",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--size",
        type=_size,
        default=DEFAULT_SIZE,
        metavar="MIB",
        help=f"memory of the process in MiB, {DEFAULT_SIZE} unless given",
    )
    parser.add_argument("--no-criu", action="store_true", help="use the stand-ins even where CRIU works")
    return parser


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


def _check_room(size: int, room: Path, *, on_disk: bool) -> None:
    """Raise CriupyError unless two copies of the process fit: one at the source, one at the destination."""
    needed, free = 2 * size + _SPARE, _free_memory()
    if needed > free:
        raise CriupyError(
            f"--size {size // MIB}: two copies of the process need {needed // MIB} MiB of memory and "
            f"{free // MIB} are free: choose a smaller size"
        )
    disk = shutil.disk_usage(room).free
    if on_disk and size + _SPARE > disk:
        raise CriupyError(
            f"--size {size // MIB}: {room} has {disk // MIB} MiB free and {(size + _SPARE) // MIB} are "
            "needed: choose a smaller size or another place with TMPDIR"
        )


@contextlib.asynccontextmanager
async def _stopped_by_signals() -> AsyncIterator[None]:
    """Cancel the body at a signal, see it clean up, then raise _Interrupted."""
    wanted = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    caught: list[int] = []

    async def watch(scope: trio.CancelScope) -> None:
        async for number in signals:
            caught.append(number)
            scope.cancel()

    with trio.open_signal_receiver(*wanted) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            yield
            nursery.cancel_scope.cancel()
    if caught:
        raise _Interrupted(caught[0])


async def _migrations(narrator: _Narrator, criu: Criu | None, size: int, room: Path) -> list[Measured]:
    from criupy.testing._demo_linux import OURS, STOCK, migrate, migrate_standin

    if criu is None:
        return [await migrate_standin(narrator, size, room / "standin")]
    runs = []
    for ours in (True, False):
        narrator.line()
        narrator.line(f"{OURS if ours else STOCK} fetches the memory" + ("" if ours else ", for comparison"))
        runs.append(await migrate(criu, narrator, size, room / ("criupy" if ours else "criu"), ours=ours))
    return runs


async def _demo(narrator: _Narrator, size: int, room: Path, *, without_criu: bool) -> None:
    from criupy.testing._demo_criu_linux import choose_criu

    async with _stopped_by_signals():
        narrator.line(
            "A process moves from a source to a destination and runs there before its memory has arrived."
        )
        if without_criu:
            criu, reason = None, "--no-criu was given"
        else:
            criu, reason = await trio.to_thread.run_sync(choose_criu, abandon_on_cancel=True)
        if criu is None:
            narrator.line(f"CRIU is not used: {reason}.")
            narrator.line(
                "So stand-ins play its part: a page server for the source, and a process with empty memory "
                "for the restored one. Between them works the real criupy-lazy-pages."
            )
        else:
            version = ".".join(map(str, criu.version))
            narrator.line(f"Both are on this machine; CRIU {version} ({criu.path}) freezes and rebuilds it.")
        _check_room(size, room, on_disk=criu is None)
        # far beyond what it takes, so that nobody waits for ever
        patience = 120 + size / MIB
        with trio.move_on_after(patience) as deadline:
            runs = await _migrations(narrator, criu, size, room)
        if deadline.cancelled_caught:
            raise CriupyError(f"gave up after {patience:.0f} s; the last step was: {narrator.last}")
        narrator.line()
        table, sentences = summary(runs)
        for line in table:
            narrator.line(line, wrap=False)
        narrator.line()
        for sentence in sentences:
            narrator.line(sentence)
        if criu is None:
            narrator.line(
                "The page server is a simple one for tests, so these figures say little of a real source."
            )


def _only(error: BaseException) -> BaseException:
    """Take an error out of the groups around it; what fails first makes the rest fail."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _keep_logs(room: Path) -> None:
    """Remove everything but logs and what programs said."""
    for path in sorted(room.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # logs are in it
                path.rmdir()
        elif path.suffix not in {".log", ".out"}:
            path.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status: 0 when every byte arrived."""
    options = _parser().parse_args(argv)
    try:
        need_linux("the demo")
    except NeedsLinux as why:
        print(f"demo: {why}", file=sys.stderr)
        return 1
    narrator = _Narrator()
    room = Path(tempfile.mkdtemp(prefix="criupy-demo-"))
    keep = False
    try:
        trio.run(lambda: _demo(narrator, options.size * MIB, room, without_criu=options.no_criu))
    except BaseException as caught:
        error = _only(caught)
        narrator.give_back()
        if isinstance(error, (_Interrupted, KeyboardInterrupt)):
            number = error.number if isinstance(error, _Interrupted) else signal.SIGINT
            print(f"demo: {error if isinstance(error, _Interrupted) else 'interrupted'}", file=sys.stderr)
            return 128 + number
        keep = any(path.suffix in {".log", ".out"} for path in room.rglob("*"))
        kept = f"; logs are kept in {room}" if keep else ""
        if not isinstance(error, (CriupyError, OSError)):
            print(f"demo: a defect of the demo{kept}", file=sys.stderr)
            raise
        print(f"demo: {' '.join(str(error).split())}{kept}", file=sys.stderr)
        return 1
    finally:
        if keep:
            _keep_logs(room)
        else:
            shutil.rmtree(room)
    return 0


if __name__ == "__main__":
    sys.exit(main())
