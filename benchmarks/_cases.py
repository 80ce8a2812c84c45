"""What is compared: processes and what they do, links, where the pages come from, and what is aimed at."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from criupy.testing.control_linux import Command, Control, Order, Touch
from criupy.testing.link_linux import Conditions
from criupy.testing.spec import WorkloadSpec

MIB = 1 << 20
SAMPLES = 1 << 18


class Source(enum.Enum):
    """Where the pages come from."""

    DUMP = "criu dump --lazy-pages"
    IMAGES = "local images"
    STOCK_SERVER = "criu page-server"
    OUR_SERVER = "criupy-page-server"


@dataclass(frozen=True, slots=True)
class Way:
    """Whose daemon brings the pages, and from where; ``rounds`` when there are fewer than of others."""

    name: str
    source: Source = Source.DUMP
    rounds: int | None = None

    @property
    def is_stock(self) -> bool:
        """Whether the daemon is criu's."""
        return self.name == "stock"


@dataclass(frozen=True, slots=True)
class Activity:
    """What every thread of the process does from its first instruction on: touch pages, or fork children."""

    order: Order | None = None
    pause_us: int = 0
    children: int = 0

    def start(self, control: Control, spec: WorkloadSpec) -> None:
        """Tell every thread; it begins when it runs."""
        for number in range(spec.tree * spec.threads):
            worker = control.worker(*divmod(number, spec.threads))
            if self.children:
                worker.issue(Command.FORK_MANY, self.children)
            elif self.order is not None:
                flags = Touch.UNTIL_STOPPED | Touch.SAMPLE_FAULTS
                worker.start_touching(self.order, seed=7 + number, pause_ns=self.pause_us * 1000, flags=flags)


@dataclass(frozen=True, slots=True)
class Aim:
    """A metric of ``way`` that must not be above a limit, or below it: itself, or over that of ``over``."""

    metric: str
    limit: float
    way: str = "ours"
    over: str | None = "stock"
    at_least: bool = False

    def value(self, figures: dict[str, dict[str, float]]) -> float:
        """Return what is compared with the limit."""
        own = figures[self.way][self.metric]
        return own if self.over is None else own / figures[self.over][self.metric]

    def is_met(self, figures: dict[str, dict[str, float]]) -> bool:
        """Tell whether the figures of a case reach it."""
        value = self.value(figures)
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the comparison.

    With ``alone`` a stand-in takes the place of ``criu restore``: it touches so many pages before it
    says that the restore has finished, when nothing else is transferred.
    """

    name: str
    title: str
    spec: WorkloadSpec
    activity: Activity = Activity()
    link: Conditions | None = None
    ways: tuple[Way, ...] = (Way("stock"), Way("ours"))
    rounds: int | None = None
    alone: int = 0
    aims: tuple[Aim, ...] = ()
    is_main: bool = True
    """Whether the README shows it."""

    def rounds_of(self, way: Way, most: int) -> int:
        """Return how often a way is measured when others are ``most`` times."""
        return min(most, way.rounds or self.rounds or most)


def process(mib: int, *, samples: int = SAMPLES, **what: int | bool) -> WorkloadSpec:
    """Describe a process, or with ``tree`` many, of so many MiB."""
    return WorkloadSpec(size=mib * MIB, samples=samples, **what)  # type: ignore[arg-type]


def ratios(**limits: float) -> tuple[Aim, ...]:
    """Return aims for ours over stock, by metric."""
    return tuple(Aim(metric, limit) for metric, limit in limits.items())


def conditions(round_trip_ms: float, bandwidth: float) -> Conditions:
    """Return a link."""
    return Conditions(delay=round_trip_ms / 2000, bandwidth=bandwidth)


FAST, SLOW = 1.25e9, 125e6
RANDOM, IDLE = Activity(Order.RANDOM), Activity()
PAUSE_US, HOT_PAUSE_US, RARE_PAUSE_US = 50, 200, 500
PACED = Activity(Order.RANDOM, pause_us=PAUSE_US)
LOCAL = (Way("stock", Source.IMAGES), Way("ours", Source.IMAGES))

LOOPBACK_CASES = (
    Case(
        name="random",
        title="512 MiB, random touches without pause",
        spec=process(512),
        activity=RANDOM,
        ways=(Way("stock", rounds=3), Way("ours")),
        aims=ratios(drain_s=1 / 7, stall_s=1 / 12, p99_us=3, cpu_s=1 / 6),
    ),
    Case(name="idle", title="512 MiB, idle", spec=process(512), aims=ratios(drain_s=1 / 2)),
    Case(
        name="hot",
        title=f"512 MiB, 90 % of touches in a tenth, {HOT_PAUSE_US} us apart",
        spec=process(512),
        activity=Activity(Order.HOT, pause_us=HOT_PAUSE_US),
        aims=ratios(p99_us=1 / 4, stall_s=1 / 4),
    ),
    Case(
        name="sequential",
        title="512 MiB, sequential touches without pause",
        spec=process(512),
        activity=Activity(Order.SEQUENTIAL),
        rounds=3,
    ),
    Case(
        name="threads",
        title="512 MiB, 16 threads, random touches",
        spec=process(512, threads=16),
        activity=RANDOM,
        ways=(Way("stock", rounds=1), Way("ours")),
        rounds=3,
    ),
    Case(
        name="processes",
        title="16 processes of 32 MiB, random touches",
        spec=process(32, tree=16),
        activity=RANDOM,
        ways=(Way("stock", rounds=2), Way("ours")),
        rounds=3,
    ),
    Case(
        name="forking",
        title="128 MiB, forks 8 children that read it",
        spec=process(128),
        activity=Activity(children=8),
        rounds=3,
    ),
    Case(
        name="fragmented",
        title="every second page of 256 MiB (32,768 extents), random touches",
        spec=process(256, fragmented=True),
        activity=RANDOM,
        ways=(Way("stock"), Way("ours"), Way("ours, our page server", Source.OUR_SERVER)),
        rounds=3,
        aims=(Aim("drain_s", 1 / 5), Aim("drain_s", 1 / 12, way="ours, our page server")),
    ),
    Case(
        name="fault",
        title="one fault after the other, nothing else",
        spec=process(64),
        alone=500,
        aims=ratios(alone_p50_us=0.75),
    ),
    Case(
        name="rare-fault",
        title=f"one fault at a time, {RARE_PAUSE_US} us apart, nothing else",
        spec=process(64),
        activity=Activity(pause_us=RARE_PAUSE_US),
        alone=500,
        aims=ratios(alone_p50_us=0.75),
    ),
)

IMAGE_CASES = (
    Case(
        name="local-random",
        title="local images, 512 MiB, random touches",
        spec=process(512),
        activity=RANDOM,
        ways=LOCAL,
        rounds=3,
        aims=ratios(drain_s=0.6),
    ),
    Case(
        name="local-idle",
        title="local images, 1 GiB, idle",
        spec=process(1024),
        ways=LOCAL,
        aims=ratios(drain_s=0.75),
    ),
    Case(
        name="server-random",
        title="each one's page server, 512 MiB, random touches",
        spec=process(512),
        activity=RANDOM,
        ways=(Way("stock", Source.STOCK_SERVER, rounds=1), Way("ours", Source.OUR_SERVER)),
        rounds=3,
        aims=(Aim("mb_s", 1200, over=None, at_least=True),),
    ),
    Case(
        name="server-faults",
        title=f"each one's page server, 512 MiB, touches {PAUSE_US} us apart",
        spec=process(512),
        activity=PACED,
        ways=(Way("stock", Source.STOCK_SERVER), Way("ours", Source.OUR_SERVER)),
        rounds=3,
        alone=2000,
        aims=(Aim("p99_over_alone", 1.5, over=None),),
    ),
)

LINK_CASES = (
    Case(
        name="link-random",
        title="64 MiB, random touches, 10 ms round trip, 1.25 GB/s",
        spec=process(64),
        activity=RANDOM,
        link=conditions(10, FAST),
        ways=(Way("stock", rounds=2), Way("ours")),
        aims=ratios(drain_s=1 / 50, stall_s=1 / 50),
    ),
    Case(
        name="link-idle",
        title="64 MiB, idle, 10 ms round trip, 1.25 GB/s",
        spec=process(64),
        link=conditions(10, FAST),
        rounds=3,
        aims=ratios(drain_s=1 / 4),
    ),
)


def link_name(link: Conditions) -> str:
    """Say what a link is meant to be."""
    return f"{link.delay * 2000:g} ms, {speed(link.bandwidth or 0)}"


def round_trip_case(round_trip_ms: float, bandwidth: float | None) -> Case:
    """Return a point of drain and stall against round trip; without a bandwidth, of loopback."""
    if bandwidth is None:
        name, where, link = "rtt-loopback", "loopback", None
    else:
        link = conditions(round_trip_ms, bandwidth)
        name = f"rtt-{round_trip_ms:g}ms-{bandwidth / 1e6:g}MB/s"
        where = f"round trip {link_name(link)}"
    stock = Way("stock", rounds=1 if round_trip_ms >= 10 else 3)
    return Case(
        name=name,
        title=f"16 MiB, random touches, {where}",
        spec=process(16),
        activity=RANDOM,
        link=link,
        ways=(stock, Way("ours")),
        rounds=3,
        is_main=False,
    )


def speed(bandwidth: float) -> str:
    """Write a bandwidth in bytes a second."""
    return f"{bandwidth / 1e9:g} GB/s" if bandwidth >= 1e9 else f"{bandwidth / 1e6:g} MB/s"


ROUND_TRIP_CASES = (
    round_trip_case(0, None),
    *(round_trip_case(ms, bandwidth) for bandwidth in (FAST, SLOW) for ms in (1, 10, 50)),
)

CASES = {case.name: case for case in LOOPBACK_CASES + IMAGE_CASES + LINK_CASES + ROUND_TRIP_CASES}
