"""Whose a live source is: the rules by which a relay lets destinations in, without any input or output.

A live process must come to run in one place only, so its pages go to one
destination. The first that asks is the one. It is

* one of ours, which says HELLO: a session of two lanes, each of which may be lost
  and come back. It is known by a name that it chose and proves with the key of the
  marker; what was overheard on the way is of no use later, as counters only rise
* a stock one, which has no name: one connection, and when that is lost nobody can
  say that he is the same

and all others are refused until the source has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from criupy.wire.extension import Hello, Lane, Refusal

__all__ = ["Session"]


@dataclass(slots=True)
class Session:
    """The one destination of a live source.

    ``key`` is the marker's. ``name`` is None until a destination of ours came,
    ``stock`` is the connection of one that is not. ``lanes`` are the connections
    there are. ``has_pages`` says that a page was asked for, ``has_finished`` that
    the tasks run as far as the destination told.
    """

    key: bytes
    name: bytes | None = None
    stock: int | None = None
    lanes: dict[Lane, int] = field(default_factory=dict)
    has_pages: bool = False
    has_finished: bool = False
    _counters: dict[Lane, int] = field(default_factory=dict)

    @property
    def is_taken(self) -> bool:
        """Whether there is a destination, here or lost."""
        return self.name is not None or self.stock is not None

    @property
    def is_connected(self) -> bool:
        """Whether the destination can be heard of."""
        return bool(self.lanes)

    def hello(self, serial: int, body: bytes) -> Refusal | int | None:
        """Let a connection in that said HELLO: a refusal, or the connection in whose place it is."""
        hello = Hello.decode(body, self.key)
        if isinstance(hello, Refusal):
            return hello
        if self.stock is not None or self.name not in {None, hello.session}:
            return Refusal.TAKEN
        if hello.counter <= self._counters.get(hello.lane, -1):
            return Refusal.REPLAYED
        self.name = hello.session
        self._counters[hello.lane] = hello.counter
        # Here it may still look alive: only the destination knows that it is not.
        before = self.lanes.get(hello.lane)
        self.lanes[hello.lane] = serial
        return before

    def begin(self, serial: int) -> Refusal | None:
        """Let a connection in that began as a stock one does, or asks for its first page."""
        if serial in self.lanes.values():
            return None
        if self.is_taken:
            return Refusal.TAKEN
        self.stock = serial
        self.lanes[Lane.BULK] = serial
        return None

    def speaks_for(self, serial: int) -> bool:
        """Whether what a connection says of the session counts: it is its first lane, as it is now."""
        return self.lanes.get(Lane.BULK) == serial

    def lost(self, serial: int) -> bool:
        """Forget a connection that has ended; tell whether it belonged to the destination."""
        for lane, there in self.lanes.items():
            if there == serial:
                del self.lanes[lane]
                return True
        return False
