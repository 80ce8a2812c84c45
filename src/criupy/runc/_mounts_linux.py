"""What a ``runc restore`` that was killed leaves mounted.

For CRIU it mounts the container's root file system once more, as ``criu-root``
in the container's state directory, and undoes that at its end. If it is killed
it does not, and ``runc delete`` then removes the state directory with all that
it finds in it: the files of the container's root file system
(runC: libcontainer/criu_linux.go, libcontainer/state_linux.go).
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

__all__ = ["mounts_below", "release_root"]


def mounts_below(directory: Path) -> list[str]:
    """List what is mounted at a directory and below it, the last one first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # Blanks and the like are written in octal (proc(5)).
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split()[4])
        if place == str(directory) or place.startswith(f"{directory}/"):
            found.append(place)
    return found[::-1]


def release_root(root: str | None, container: str) -> str | None:
    """Unmount what is left in a container's state directory; return what could not be, or None.

    Its files stay: only its name goes from there.
    """
    states = (
        [root] if root is not None else ["/run/runc", f"{os.environ.get('XDG_RUNTIME_DIR', '/run')}/runc"]
    )
    for state in states:
        for place in mounts_below(Path(state).resolve() / container):
            subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)
        if left := mounts_below(Path(state).resolve() / container):
            return left[-1]
    return None
