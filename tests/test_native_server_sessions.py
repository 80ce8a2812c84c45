"""What our own clients say to a page server beyond CRIU's protocol, and what a server that asks is told."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._uffd.image_linux import Image
from criupy._uffd.server_linux import Account, Ending, Question, Server
from criupy.page_server._images import load_tasks
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.spec import WorkloadSpec
from criupy.wire.extension import HELLO_LENGTH, Hello, Lane, Refusal, encode_getv, encode_plain
from criupy.wire.page_server import Command, Frame, PageFlags
from page_server_clients import CLOSE, GET, PAGE, Destination, loopback

pytestmark = pytest.mark.usefixtures("nothing_is_left")

KEY = bytes(range(32))
HELLO = Hello(b"a session's name", Lane.BULK, 1)


class Extended(Destination):
    """A destination of ours."""

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)

    def getv(self, pid: int, runs: list[tuple[int, int]]) -> bytes:
        self.say(encode_getv(pid, runs))
        return self.runs_of(pid, runs)

    def runs_of(self, pid: int, runs: list[tuple[int, int]]) -> bytes:
        total = sum(nr for _, nr in runs)
        head = Frame.decode(self.receive(32), 32)
        assert head == Frame(Command.GETV, total, len(runs), pid, PageFlags.PRESENT)
        data = self.receive(total * PAGE)
        assert len(data) == total * PAGE
        return data

    def status(self) -> int:
        (status,) = struct.unpack("<i", self.receive(4))
        return int(status)


class Serving:
    """A server over written images, and answers to what it asks."""

    def __init__(self, images: WrittenImages, *, asks: bool) -> None:
        self.images = images
        self.server = Server(stall_timeout=30.0, idle_timeout=None, asks=asks)
        for task in load_tasks(images.directory):
            entries = task.entries
            fd = os.open(task.pages, os.O_RDONLY | os.O_CLOEXEC)
            self.server.add_image(Image(task.pid, entries.starts, entries.nr_pages, entries.page_indices), fd)

    def connect(self, hello: bytes | None = None) -> Extended:
        ours, theirs = loopback()
        with theirs:
            self.server.serve(theirs.fileno())
            theirs.detach()
        client = Extended(ours)
        if hello is not None:
            client.say(hello)
        return client

    def asked(self) -> Question:
        while True:
            assert select.select([self.server.event_fd], [], [], 30)[0], "nothing is asked"
            assert not list(self.server.ended())
            for question in self.server.questions():
                return question

    def end(self) -> Account:
        while True:
            assert select.select([self.server.event_fd], [], [], 30)[0], "no connection ends"
            for account in self.server.ended():
                return account


Serve: TypeAlias = Callable[..., Serving]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def make(spec: WorkloadSpec | None = None, *, asks: bool = False) -> Serving:
            images = write_images(
                tmp_path / "images", spec or WorkloadSpec(size=256 * PAGE, areas=2, tree=2), style="full"
            )
            serving = Serving(images, asks=asks)
            stack.callback(serving.server.close)
            return serving

        yield make


# ---- what a server of images makes of it ---------------------------------------------------------------


def test_an_extended_connection_gets_pages_either_way(serve: Serve) -> None:
    """Runs short and long, of every extent, before and behind plain requests, all asked for at once."""
    serving = serve(WorkloadSpec(size=999 * PAGE, areas=3, tree=2))
    chance = random.Random(1)
    spec = serving.images.spec
    with serving.connect(HELLO.encode(KEY)) as client:
        wanted = []
        for _ in range(30):
            task = chance.choice(serving.images.tasks)
            runs, expected = [], b""
            for _ in range(chance.choice([1, 2, 40])):
                run = chance.choice(task.runs)
                nr = min(chance.choice([1, 1, 2, 17, 20]), run.nr_pages)
                first = chance.randrange(run.nr_pages - nr + 1)
                runs.append((run.start + first * PAGE, nr))
                expected += b"".join(spec.page(task.task, run.first + first + n) for n in range(nr))
            wanted.append((task.pid, runs, expected))
            client.say(encode_getv(task.pid, runs))
            client.send(GET, 1, *((runs[0][0], task.pid)))
        for pid, runs, expected in wanted:
            assert client.runs_of(pid, runs) == expected
            assert client.answer() == (1, runs[0][0], pid, expected[:PAGE])
        client.say(encode_plain(Command.FINISHED))
        assert client.close(CLOSE) == 0
    account = serving.end()
    assert account.ending is Ending.CLOSED
    assert account.requests == 61  # of HELLO and FINISHED nobody wants anything
    assert account.pages == sum(len(data) // PAGE for _, _, data in wanted) + 30


def test_bytes_that_come_one_by_one(serve: Serve) -> None:
    serving = serve()
    task = serving.images.tasks[0]
    runs = [(run.start, 2) for run in task.runs]
    with serving.connect() as client:
        for byte in HELLO.encode(KEY) + encode_getv(task.pid, runs) + encode_plain(Command.ABORT):
            client.say(bytes((byte,)))
        client.runs_of(task.pid, runs)
        assert client.status() == -errno.EALREADY  # images have no source that could go on
    assert serving.end().ending is Ending.CLOSED


@pytest.mark.parametrize(
    ("what", "ending"),
    [
        (Frame(Command.GETV, 1, 0, 1).encode(32), Ending.COUNT),
        (Frame(Command.GETV, 1, 257, 1).encode(32), Ending.COUNT),
        (Frame(Command.GETV, 1, 1 << 60, 1).encode(32), Ending.COUNT),
        (Frame(Command.GETV, 1, 1, 1).encode(32) + struct.pack("<QQ", 0x10001, 1), Ending.ID),
        (HELLO.encode(KEY), Ending.COMMAND),
        (Frame(Command.REFUSED, 1).encode(32), Ending.COMMAND),
        (Frame(Command.OPEN2, 0, 0, 257).encode(32), Ending.COMMAND),
    ],
    ids=["no runs", "too many", "very many", "no such process", "a second hello", "refused", "upload"],
)
def test_what_breaks_the_rules(serve: Serve, what: bytes, ending: Ending) -> None:
    serving = serve()
    with serving.connect(HELLO.encode(KEY)) as client:
        client.say(what)
        assert client.receive(1) == b""
    account = serving.end()
    assert account.ending is ending
    assert account.offset == 32 + HELLO_LENGTH


@pytest.mark.parametrize(
    ("change", "ending"),
    [
        (lambda start, _: [(start + 1, 1), (start, 1)], Ending.ADDRESS),
        (lambda start, _: [(start, 1), (start, 0)], Ending.COUNT),
        (lambda start, nr: [(start, 1), (start, nr + 1)], Ending.PAGE),
        (lambda start, _: [(start, 1), (start - (1 << 30), 1)], Ending.PAGE),
        (lambda start, _: [(start, 1), (start, 1 << 52)], Ending.COUNT),
    ],
    ids=["address", "empty", "beyond the extent", "nowhere", "too long"],
)
def test_a_run_that_cannot_be(
    serve: Serve, change: Callable[[int, int], list[tuple[int, int]]], ending: Ending
) -> None:
    """Of such a request nothing is answered; what was asked for before is."""
    serving = serve()
    task = serving.images.tasks[0]
    run = task.runs[-1]
    runs = change(run.start, run.nr_pages)
    body = b"".join(struct.pack("<QQ", *r) for r in runs)
    total = sum(nr for _, nr in runs) & 0xFFFF
    with serving.connect(HELLO.encode(KEY)) as client:
        client.send(GET, 1, run.start, task.pid)
        client.say(Frame(Command.GETV, total, len(runs), task.pid).encode(32) + body)
        assert client.answer()[0] == 1
        assert client.receive(1) == b""
    assert serving.end().ending is ending


def test_a_sum_that_is_wrong(serve: Serve) -> None:
    serving = serve()
    task = serving.images.tasks[0]
    with serving.connect(HELLO.encode(KEY)) as client:
        client.say(Frame(Command.GETV, 3, 1, task.pid).encode(32) + struct.pack("<QQ", task.runs[0].start, 2))
        assert client.receive(1) == b""
    assert serving.end().ending is Ending.COUNT


@pytest.mark.parametrize("command", [Command.GETV, Command.FINISHED, Command.ABORT])
def test_a_stock_connection_knows_nothing_of_this(serve: Serve, command: Command) -> None:
    serving = serve()
    task = serving.images.tasks[0]
    with serving.connect() as client:
        client.get(task.pid, task.runs[0].start)
        client.say(Frame(command, 1, 1, task.pid).encode(32))
        assert client.receive(1) == b""
    assert serving.end().ending is Ending.COMMAND


def test_a_hello_of_another_length(serve: Serve) -> None:
    serving = serve()
    with serving.connect(Frame(Command.HELLO, 65).encode(32)) as client:
        assert client.receive(1) == b""
    assert serving.end().ending is Ending.COUNT


def test_an_upload_has_no_hello() -> None:
    with Server(stall_timeout=30.0, idle_timeout=None, receives=True) as server:
        ours, theirs = loopback()
        with Extended(ours) as client, theirs:
            server.serve(theirs.fileno())
            theirs.detach()
            client.say(HELLO.encode(KEY))
            assert client.receive(1) == b""


# ---- one that asks ---------------------------------------------------------------------------------------


def test_it_is_asked_whose_a_connection_is_and_how_it_ends(serve: Serve) -> None:
    serving = serve(asks=True)
    task = serving.images.tasks[0]
    with serving.connect(HELLO.encode(KEY)) as client:
        client.send(GET, 1, task.runs[0].start, task.pid)
        question = serving.asked()
        assert question.command == Command.HELLO
        assert Hello.decode(question.hello, KEY) == HELLO
        serving.server.answer(question.serial, 0)
        question = serving.asked()
        assert question.command == Command.GET
        serving.server.answer(question.serial, 0)
        assert client.answer()[0] == 1
        client.say(encode_plain(Command.FINISHED))
        question = serving.asked()
        assert question.command == Command.FINISHED
        serving.server.answer(question.serial, 0)
        client.send(GET, 1, task.runs[0].start, task.pid)
        client.send(CLOSE)
        assert client.answer()[0] == 1  # it waits for no answer about the end
        question = serving.asked()
        assert question.command == Command.CLOSE
        serving.server.answer(question.serial, -5)
        assert client.status() == -5
    assert serving.end().ending is Ending.REFUSED


@pytest.mark.parametrize("first", [Command.GET, Command.CLOSE, Command.FORCE_CLOSE])
def test_a_stock_client_is_asked_about_once(serve: Serve, first: Command) -> None:
    serving = serve(asks=True)
    task = serving.images.tasks[0]
    with serving.connect() as client:
        client.send(first, 1, task.runs[0].start, task.pid)
        question = serving.asked()
        assert question.command == first
        serving.server.answer(question.serial, 0)
        if first is Command.GET:
            assert client.answer()[0] == 1
            client.get(task.pid, task.runs[0].start, 5)
            return
        question = serving.asked()
        assert question.command == first
        serving.server.answer(question.serial, 0)
        assert client.status() == 0


@pytest.mark.parametrize("command", [Command.ADD_F, Command.OPEN2, Command.PARENT])
def test_who_begins_with_an_upload_claims_nothing(serve: Serve, command: Command) -> None:
    """A dumper that was told the wrong port must not be taken for the destination."""
    serving = serve(asks=True)
    with serving.connect() as client:
        client.send(command, 0, 0x10000 if command is Command.ADD_F else 0, 257)
        account = serving.end()
    assert account.ending is Ending.COMMAND
    assert list(serving.server.questions()) == []


def test_who_is_refused_is_told_why_if_he_understands(serve: Serve) -> None:
    serving = serve(asks=True)
    task = serving.images.tasks[0]
    with serving.connect(HELLO.encode(KEY)) as client:
        client.send(GET, 1, task.runs[0].start, task.pid)
        serving.server.answer(serving.asked().serial, -Refusal.TAKEN)
        assert Frame.decode(client.receive(32), 32) == Frame(Command.REFUSED, Refusal.TAKEN)
        assert client.is_over()
    assert serving.end().errno == Refusal.TAKEN
    with serving.connect() as client:
        client.send(GET, 1, task.runs[0].start, task.pid)
        serving.server.answer(serving.asked().serial, -Refusal.TAKEN)
        assert client.is_over()
    account = serving.end()
    assert (account.ending, account.pages) == (Ending.REFUSED, 0)


def test_one_that_waits_for_an_answer_can_be_cut(serve: Serve) -> None:
    serving = serve(asks=True)
    with serving.connect(HELLO.encode(KEY)) as client:
        serial = serving.asked().serial
        serving.server.cut(serial)
        assert client.is_over()
        assert serving.end().ending is Ending.CUT
        serving.server.answer(serial, 0)  # too late, and harmless
