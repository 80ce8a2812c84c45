"""What a relay does with the second holder of its source, as a process that a test can kill.

Run it with the descriptors of the socket to the source and of the control socket, the frame
size and the seconds to hold. Each line of standard input is a step, which is answered by the holder's pid.
"""

from __future__ import annotations

import sys

from criupy.page_server._held_linux import Holder


def main() -> None:
    upstream, control, frame_size = map(int, sys.argv[1:4])
    seconds = None if sys.argv[4] == "-" else float(sys.argv[4])
    holder = Holder()
    for line in sys.stdin:
        match line.strip():
            case "start":
                holder.start()
            case "give":
                holder.give(upstream, control, 24 if frame_size == 24 else 32, seconds)
            case "holding":
                holder.tell("holding")
            case "closing":
                holder.tell("closing")
            case "done":
                holder.done()
            case step:
                raise ValueError(step)
        sys.stdout.write(f"{holder.pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
