"""Who comes back is known: sessions that are resumed, and those that must not be."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._tls.tls_linux import TlsContext, TlsFault, TlsSession
from criupy.errors import TlsError
from criupy.testing.certificates import Certificates, _Authority
from page_server_clients import loopback
from test_tls_key_updates import End, run
from test_tls_serving import ADDRESS, handshake, python_end, wrap

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

NEW_SESSION_TICKET = 4  # RFC 8446, B.3


@pytest.fixture
def client(certificates: Certificates) -> TlsContext:
    return TlsContext(certificates.files("client"), server=False)


@pytest.fixture
def server(certificates: Certificates) -> TlsContext:
    return TlsContext(certificates.files("server"), server=True)


class Meeting:
    """A connection between a client and a server; ``said`` by each when it does not want the other."""

    def __init__(
        self,
        client: TlsContext,
        server: TlsContext,
        *,
        name: str | None = ADDRESS,
        server_name: str | None = ADDRESS,
    ) -> None:
        self.socks = loopback()
        for sock in self.socks:
            sock.setblocking(False)
        self.client = client.session(self.socks[0].fileno(), name)
        self.server = server.session(self.socks[1].fileno(), server_name)
        self.said = {self.client: "", self.server: ""}
        thread = threading.Thread(target=self._shake_hands, args=(self.client, self.socks[0]))
        thread.start()
        self._shake_hands(self.server, self.socks[1])
        thread.join()

    def _shake_hands(self, session: TlsSession, sock: socket.socket) -> None:
        try:
            handshake(session, sock.fileno())
        except TlsError as error:
            self.said[session] = str(error)

    def talk(self) -> None:
        """Let the client receive something, and what TLS sent before."""
        run(End(self.client, self.socks[0], b"", 1), End(self.server, self.socks[1], b"!", 0))

    @property
    def is_resumed(self) -> bool:
        assert set(self.said.values()) == {""}
        resumed = [end.describe().endswith(", resumed") for end in (self.client, self.server)]
        assert resumed[0] == resumed[1]
        return resumed[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self.client, self.server, *self.socks):
            end.close()


def meet(client: TlsContext, server: TlsContext, *, name: str | None = ADDRESS) -> bool:
    """Connect, let tickets come and break off; whether it was resumed."""
    with Meeting(client, server, name=name) as meeting:
        meeting.talk()
        return meeting.is_resumed


# ---- what is resumed -----------------------------------------------------------------------------------


def test_all_but_the_first(client: TlsContext, server: TlsContext) -> None:
    """Each renews the ticket, and none was closed in a way that TLS likes."""
    assert [meet(client, server) for _ in range(5)] == [False, True, True, True, True]
    with Meeting(client, server) as meeting:
        assert (
            meeting.client.describe() == "TLSv1.3, TLS_AES_128_GCM_SHA256, CN = criupy demo server, resumed"
        )
        assert (
            meeting.server.describe() == "TLSv1.3, TLS_AES_128_GCM_SHA256, CN = criupy demo client, resumed"
        )


def test_a_ticket_is_used_once(client: TlsContext, server: TlsContext) -> None:
    """The first connection gives two, and those after it receive nothing."""
    meet(client, server)
    with contextlib.ExitStack() as stack:
        meetings = [stack.enter_context(Meeting(client, server)) for _ in range(3)]
        assert [meeting.is_resumed for meeting in meetings] == [True, True, False]


def test_a_ticket_that_nobody_answered_is_good(client: TlsContext, server: TlsContext) -> None:
    """So many attempts as somebody makes whose page server is starting."""
    meet(client, server)
    for _ in range(5):
        ours, theirs = loopback()
        ours.setblocking(False)
        with ours, client.session(ours.fileno(), ADDRESS) as session:
            assert session.step() == select.POLLIN
            theirs.close()
            with pytest.raises(TlsError):
                session.step()
    assert meet(client, server)


def test_no_certificates_are_exchanged(client: TlsContext, server: TlsContext) -> None:
    sizes = []
    for _ in range(2):
        with Meeting(client, server) as meeting:
            meeting.talk()
            info = meeting.socks[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            sizes.append(int.from_bytes(info[128:136], "little"))  # tcpi_bytes_received
    assert sizes[1] < sizes[0] - 500


def test_a_server_that_was_started_again(
    client: TlsContext, server: TlsContext, certificates: Certificates
) -> None:
    meet(client, server)
    again = TlsContext(certificates.files("server"), server=True)
    assert [meet(client, again) for _ in range(3)] == [False, True, True]


def test_a_client_that_was_started_again(
    client: TlsContext, server: TlsContext, certificates: Certificates
) -> None:
    meet(client, server)
    assert not meet(TlsContext(certificates.files("client"), server=False), server)


def test_names_that_nobody_looks_at(certificates: Certificates) -> None:
    files = certificates.files("elsewhere", verify_name=False)
    client, server = TlsContext(files, server=False), TlsContext(files, server=True)
    assert [meet(client, server, name=None) for _ in range(2)] == [False, True]


def test_many_at_once(client: TlsContext, server: TlsContext) -> None:
    """More threads than tickets: each session is whole, and the tickets of some are pushed out."""
    resumed: list[bool] = []

    def come_back() -> None:
        for _ in range(25):
            with Meeting(client, server) as meeting:
                meeting.talk()
                resumed.append(meeting.is_resumed)

    threads = [threading.Thread(target=come_back) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(resumed) == 200
    assert resumed.count(True) > 100


# ---- what is not ---------------------------------------------------------------------------------------


def test_a_peer_of_another_name(client: TlsContext, server: TlsContext) -> None:
    """The certificate is for that, too, but nobody has looked."""
    meet(client, server)
    assert not meet(client, server, name="localhost")
    assert meet(client, server)
    assert meet(client, server, name="localhost")


def test_a_server_that_is_none_of_that_name(client: TlsContext, server: TlsContext) -> None:
    meet(client, server)
    with Meeting(client, server, name="elsewhere.example") as meeting:
        assert "and not for elsewhere.example" in meeting.said[meeting.client]
        assert meeting.client.fault is TlsFault.NAME


def test_a_client_that_is_none_of_that_name(client: TlsContext, server: TlsContext) -> None:
    """It has a good ticket, and gets the refusal of a full handshake."""
    meet(client, server)
    with Meeting(client, server, server_name="elsewhere.example") as meeting:
        assert "and not for elsewhere.example" in meeting.said[meeting.server]
        assert meeting.server.fault is TlsFault.NAME


@pytest.mark.parametrize("which", ["client", "server"])
def test_tickets_live_no_longer_for_being_renewed(client: TlsContext, server: TlsContext, which: str) -> None:
    context = client if which == "client" else server
    context._lib.criupy_tls_context_set_ticket_life(context._context, 4)
    started = time.monotonic()
    assert [meet(client, server) for _ in range(2)] == [False, True]
    time.sleep(1.5)
    assert meet(client, server)
    time.sleep(max(0.0, started + 4.1 - time.monotonic()))
    assert not meet(client, server)


@pytest.mark.parametrize("what", ["client", "server", "client's list", "server's list"])
def test_what_expires_meanwhile(what: str, tmp_path: Path) -> None:
    """A full handshake comes instead, and says what is wrong."""
    authority = _Authority(tmp_path, "cacert")
    life = 5
    for name in ("client", "server"):
        authority.sign(name, end=life / 86400 if name == what else 30)
    made = Certificates(tmp_path)
    whose, _, is_list = what.partition("'")
    if is_list:
        who = ["-cert", authority.cert, "-keyfile", made.key("cacert"), "-out", made.cacrl]
        command = ["openssl", "ca", "-config", authority.config, *who, "-gencrl", "-crlsec", str(life)]
        subprocess.run([*map(str, command)], check=True, capture_output=True)
    files = {
        name: made.files(name, revocations=bool(is_list) and name == whose) for name in ("client", "server")
    }
    client = TlsContext(files["client"], server=False)
    server = TlsContext(files["server"], server=True)
    made_at = time.monotonic()
    assert [meet(client, server) for _ in range(2)] == [False, True]
    time.sleep(max(0.0, made_at + life + 0.1 - time.monotonic()))
    with Meeting(client, server) as meeting:
        ends = {"client": meeting.client, "server": meeting.server}
        looks = ends[whose] if is_list else ends["server" if what == "client" else "client"]
        said = "our revocation list for" if is_list else f"its certificate (CN = criupy demo {what})"
        assert said in meeting.said[looks]
        assert "has expired on 2" in meeting.said[looks]


# ---- peers that are not ours --------------------------------------------------------------------------


@pytest.fixture
def socks() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = loopback()
    with pair[0], pair[1]:
        yield pair


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_who_does_not_ask_gets_no_ticket(
    server: TlsContext,
    certificates: Certificates,
    socks: tuple[socket.socket, socket.socket],
    version: ssl.TLSVersion,
) -> None:
    messages: list[int] = []

    def see(_: object, _direction: str, _version: object, _content: object, kind: int, _data: bytes) -> None:
        messages.append(kind)

    context = python_end(certificates, server=False)
    context.maximum_version = version
    context._msg_callback = see  # type: ignore[attr-defined]
    theirs, ours = socks
    ours.setblocking(False)
    with (
        server.session(ours.fileno(), ADDRESS) as session,
        wrap(context, theirs, session, ours.fileno(), server=False) as sock,
    ):
        run(End(session, ours, b"!", 0))
        assert sock.recv(1) == b"!"
        assert sock.session is not None
        assert not sock.session.has_ticket
        assert not sock.session.id or version == ssl.TLSVersion.TLSv1_3
    assert messages
    assert NEW_SESSION_TICKET not in messages


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_server_that_sends_tickets_unasked(
    client: TlsContext, certificates: Certificates, version: ssl.TLSVersion
) -> None:
    """Those of TLS 1.3 are good."""
    context = python_end(certificates, server=True)
    context.maximum_version = version
    for is_resumed in (False, version == ssl.TLSVersion.TLSv1_3):
        ours, theirs = loopback()
        ours.setblocking(False)
        with (
            ours,
            client.session(ours.fileno(), ADDRESS) as session,
            wrap(context, theirs, session, ours.fileno(), server=True) as sock,
        ):
            sock.sendall(b"!")
            run(End(session, ours, b"", 1))
            assert sock.session_reused == is_resumed
            assert session.describe().endswith(", resumed") == is_resumed
