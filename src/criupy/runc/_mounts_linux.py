"""What a restore that was killed leaves mounted.

For CRIU ``runc restore`` mounts the container's root file system once more, as
``criu-root`` in the container's state directory, and undoes that at its end. If
it is killed it does not, and ``runc delete`` then removes the state directory
with all that it finds in it: the files of the container's root file system
(runC: libcontainer/criu_linux.go, libcontainer/state_linux.go).

CRIU mounts the host's cgroups in its work directory, as ``.criu.cgyard.XXXXXX``
(criu/cgroup.c). If it is killed they stay, and who removes the checkpoint walks
through them.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path

__all__ = ["mounts_below", "release_cgroups", "release_root"]


def mounts_below(directory: Path) -> list[str]:
    """List what is mounted at a directory and below it, the last one first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # Blanks and the like are written in octal (proc(5)).
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split()[4])
        if place == str(directory) or place.startswith(f"{directory}/"):
            found.append(place)
    return found[::-1]


def _unmount(place: str) -> None:
    with contextlib.suppress(OSError):  # without umount(8) it stays, and is told of
        subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)


def release_root(root: str | None, container: str) -> str | None:
    """Unmount what is left in a container's state directory; return what could not be, or None.

    Its files stay: only its name goes from there.
    """
    user_state = Path(os.environ.get("XDG_RUNTIME_DIR", "/run"), "runc")
    for state in [Path(root)] if root is not None else [Path("/run/runc"), user_state]:
        directory = state.resolve() / container
        for place in mounts_below(directory):
            _unmount(place)
        if left := mounts_below(directory):
            return left[-1]
    return None


def release_cgroups(work_dir: Path) -> str | None:
    """Unmount the cgroups that CRIU has left in its work directory; return what could not be, or None."""
    for yard in work_dir.resolve().glob(".criu.cgyard.*"):
        for place in mounts_below(yard):
            _unmount(place)
        if left := mounts_below(yard):
            return left[-1]
        with contextlib.suppress(FileNotFoundError):  # a CRIU that has ended by itself has removed it
            for folder in [*yard.iterdir(), yard]:  # one level of empty directories; never what is in them
                with contextlib.suppress(OSError):
                    folder.rmdir()
    return None
