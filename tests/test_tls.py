"""TLS sessions: which files will do, who is let in, and what is said of those who are not."""

from __future__ import annotations

import os
import re
import select
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._tls.tls_linux import TlsContext, TlsFault, TlsFiles, TlsSession
from criupy.errors import TlsError
from criupy.testing.certificates import Certificates, main
from page_server_clients import loopback

pytestmark = pytest.mark.usefixtures("nothing_is_left")

ADDRESS = "127.0.0.1"


class Pair:
    """The two ends of a connection, each with a session."""

    def __init__(self, server: TlsFiles, client: TlsFiles, *, name: str = ADDRESS) -> None:
        self.socks = loopback()
        for sock in self.socks:
            sock.setblocking(False)
        client_fd, server_fd = (sock.fileno() for sock in self.socks)
        self.client = TlsContext(client, server=False).session(client_fd, name)
        self.server = TlsContext(server, server=True).session(server_fd, name)

    def close(self) -> None:
        for end in (*self.socks, self.client, self.server):
            end.close()

    def outcomes(self) -> dict[TlsSession, str]:
        """Shake hands; return what each end says: nothing when it is content."""
        said: dict[TlsSession, str] = {}
        waiting = {self.client: select.POLLOUT, self.server: select.POLLIN}
        fds = {self.client: self.socks[0].fileno(), self.server: self.socks[1].fileno()}
        while waiting:
            poll = select.poll()
            for end, events in waiting.items():
                poll.register(fds[end], events)
            ready = {fd for fd, _ in poll.poll(5000)}
            assert ready, "both ends wait"
            for end in [end for end in waiting if fds[end] in ready]:
                try:
                    waiting[end] = end.step()
                except TlsError as error:
                    said[end] = str(error)
                    waiting[end] = 0
                if not waiting[end]:
                    said.setdefault(end, "")
                    del waiting[end]
        return said


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    made: list[Pair] = []
    yield made
    for pair in made:
        pair.close()


# ---- who is let in -----------------------------------------------------------------------------------


def test_both_ends_know_each_other(pairs: list[Pair], certificates: Certificates) -> None:
    pairs.append(
        pair := Pair(
            certificates.files("server", revocations=True), certificates.files("client", revocations=True)
        )
    )
    assert pair.outcomes() == {pair.client: "", pair.server: ""}
    assert pair.client.describe() == "TLSv1.3, TLS_AES_128_GCM_SHA256, CN = criupy demo server"
    assert pair.server.describe() == "TLSv1.3, TLS_AES_128_GCM_SHA256, CN = criupy demo client"
    assert pair.client.fault is TlsFault.OK


WRONG = [
    ("stranger", TlsFault.UNTRUSTED, "is not signed by a CA that is trusted here"),
    ("revoked", TlsFault.REVOKED, "(CN = criupy demo revoked) has been revoked"),
    (
        "elsewhere",
        TlsFault.NAME,
        "is for DNS:elsewhere.example, IP Address:192.0.2.1 and not for 127.0.0.1 (--tls-no-cn-verify)",
    ),
]


@pytest.mark.parametrize(("name", "fault", "said"), WRONG, ids=[name for name, *_ in WRONG])
def test_a_client_that_is_refused(
    pairs: list[Pair], certificates: Certificates, name: str, fault: TlsFault, said: str
) -> None:
    files = certificates.files("server", revocations=True), certificates.files(name, revocations=True)
    pairs.append(pair := Pair(*files))
    outcomes = pair.outcomes()
    assert said in outcomes[pair.server]
    assert pair.server.fault is fault


@pytest.mark.parametrize(("name", "fault", "said"), WRONG, ids=[name for name, *_ in WRONG])
def test_a_server_that_is_refused(
    pairs: list[Pair], certificates: Certificates, name: str, fault: TlsFault, said: str
) -> None:
    files = certificates.files(name, revocations=True), certificates.files("client", revocations=True)
    pairs.append(pair := Pair(*files))
    outcomes = pair.outcomes()
    assert said in outcomes[pair.client]
    assert pair.client.fault is fault
    assert "our certificate" in outcomes[pair.server]  # the alert says so
    assert pair.server.fault is TlsFault.ALERT


def test_names_need_not_be_looked_at(pairs: list[Pair], certificates: Certificates) -> None:
    files = certificates.files("elsewhere", verify_name=False)
    pairs.append(pair := Pair(files, files))
    assert pair.outcomes() == {pair.client: "", pair.server: ""}


@pytest.mark.parametrize("name", ["elsewhere.example", "192.0.2.1"])
def test_names_and_addresses(pairs: list[Pair], certificates: Certificates, name: str) -> None:
    files = certificates.files("elsewhere")
    pairs.append(pair := Pair(files, files, name=name))
    assert pair.outcomes() == {pair.client: "", pair.server: ""}


def test_a_revoked_certificate_without_the_list(pairs: list[Pair], certificates: Certificates) -> None:
    files = certificates.files("revoked")
    pairs.append(pair := Pair(files, files))
    assert pair.outcomes() == {pair.client: "", pair.server: ""}


def test_a_list_binds_only_its_own_authority(
    pairs: list[Pair], certificates: Certificates, tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    other = certificates.directory / "other-cacert.pem"
    both.write_text(certificates.cacert.read_text() + other.read_text())
    files = replace(certificates.files("stranger", revocations=True), cacert=both)
    pairs.append(pair := Pair(files, files))
    assert pair.outcomes() == {pair.client: "", pair.server: ""}


# ---- who is no such peer ---------------------------------------------------------------------------------


def session(certificates: Certificates, *, server: bool) -> tuple[TlsSession, socket.socket, socket.socket]:
    ours, theirs = loopback()
    ours.setblocking(False)
    context = TlsContext(certificates.files("server"), server=server)
    return context.session(ours.fileno(), ADDRESS), ours, theirs


@pytest.mark.parametrize("server", [True, False])
@pytest.mark.parametrize(
    ("sent", "fault", "said"),
    [
        (b"\7\0\0\0" + bytes(28), TlsFault.PLAIN, "what it sent is no TLS: it was not told to use it"),
        (b"", TlsFault.CLOSED, "it closed the connection"),
    ],
)
async def test_no_tls_comes(
    certificates: Certificates, server: bool, sent: bytes, fault: TlsFault, said: str
) -> None:
    end, ours, theirs = session(certificates, server=server)
    with end, ours, theirs:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(TlsError, match="^" + said):
            await end.handshake()
        assert end.fault is fault
        with pytest.raises(TlsError):  # and so it stays
            end.step()


@pytest.mark.parametrize(
    ("alert", "fault", "said"),
    [
        (0x46, TlsFault.VERSION, "it says that it knows neither TLS"),
        (0x28, TlsFault.ALERT, "it ended the TLS session: handshake failure"),
        (0x30, TlsFault.ALERT, "it says that our certificate is not signed by a CA that it trusts"),
        (0x2D, TlsFault.ALERT, "it says that our certificate has expired, or is not valid yet"),
    ],
)
async def test_alerts(certificates: Certificates, alert: int, fault: TlsFault, said: str) -> None:
    end, ours, theirs = session(certificates, server=False)
    with end, ours, theirs:
        theirs.sendall(bytes([0x15, 3, 3, 0, 2, 2, alert]))
        with pytest.raises(TlsError, match="^" + said):
            await end.handshake()
        assert end.fault is fault


async def test_a_reset(certificates: Certificates) -> None:
    end, ours, theirs = session(certificates, server=True)
    with end, ours:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()
        with pytest.raises(TlsError, match="it reset the connection"):
            await end.handshake()


async def test_a_handshake_goes_on_after_a_cancellation(certificates: Certificates) -> None:
    end, ours, theirs = session(certificates, server=False)
    with end, ours, theirs:
        with trio.move_on_after(0.05) as patience:
            await end.handshake()
        assert patience.cancelled_caught
        theirs.setblocking(False)
        files = certificates.files("client")
        with TlsContext(files, server=True).session(theirs.fileno(), ADDRESS) as other:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end.handshake)
                nursery.start_soon(other.handshake)


def plain_ssl(certificates: Certificates, **settings: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificates.cacert)
    context.check_hostname = False
    for name, value in settings.items():
        setattr(context, name, value)
    return context


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_no_common_version(certificates: Certificates) -> None:
    old = plain_ssl(
        certificates, minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1
    )
    old.set_ciphers("ALL:@SECLEVEL=0")
    end, ours, theirs = session(certificates, server=True)
    with end, ours:

        def connect() -> None:
            with pytest.raises(ssl.SSLError), theirs:
                old.wrap_socket(theirs)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, connect)
            with pytest.raises(TlsError, match="knows neither TLS"):
                await end.handshake()
            ours.shutdown(socket.SHUT_RDWR)
        assert end.fault is TlsFault.VERSION


async def test_a_client_without_a_certificate(certificates: Certificates) -> None:
    end, ours, theirs = session(certificates, server=True)
    with end, ours:

        def connect() -> None:
            with pytest.raises(ssl.SSLError), plain_ssl(certificates).wrap_socket(theirs) as sock:
                sock.recv(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, connect)
            with pytest.raises(TlsError, match="it has shown no certificate"):
                await end.handshake()
        assert end.fault is TlsFault.NO_CERTIFICATE


@pytest.mark.parametrize("server", [True, False])
@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("expired", TlsFault.EXPIRED, r"\(CN = criupy demo expired\) has expired on 2"),
        ("early", TlsFault.NOT_YET, r"\(CN = criupy demo early\) is not valid before 2"),
    ],
)
async def test_a_certificate_out_of_its_time(
    certificates: Certificates, server: bool, name: str, fault: TlsFault, said: str
) -> None:
    """Python's ssl shows it, because no end of ours begins with it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if server else ssl.PROTOCOL_TLS_SERVER)
    context.load_verify_locations(certificates.cacert)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificates.cert(name), certificates.key(name))
    end, ours, theirs = session(certificates, server=server)
    with end, ours:

        def talk() -> None:
            with (
                pytest.raises(ssl.SSLError, match="alert"),
                context.wrap_socket(theirs, server_side=not server) as sock,
            ):
                sock.recv(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, talk)
            with pytest.raises(TlsError, match=said):
                await end.handshake()
        assert end.fault is fault


async def test_tls_1_2(certificates: Certificates) -> None:
    context = plain_ssl(certificates, maximum_version=ssl.TLSVersion.TLSv1_2)
    context.load_cert_chain(certificates.cert("client"), certificates.key("client"))
    end, ours, theirs = session(certificates, server=True)
    with end, ours:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, lambda: context.wrap_socket(theirs).close())
            await end.handshake()
        assert end.describe().startswith("TLSv1.2, ")


# ---- files -----------------------------------------------------------------------------------------


def refused(files: TlsFiles) -> str:
    with pytest.raises(TlsError) as caught:
        TlsContext(files, server=True)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("option", ["cacert", "cacrl", "cert", "key"])
def test_files_that_are_not_as_they_must_be(certificates: Certificates, tmp_path: Path, option: str) -> None:
    good = certificates.files("server")

    def instead(path: Path) -> TlsFiles:
        changed: dict[str, Any] = {option: path}
        return replace(good, **changed)

    gone = tmp_path / "gone.pem"
    assert refused(instead(gone)) == f"--tls-{option} {gone}: No such file or directory"
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    what = {"cacrl": "revocation list", "key": "private key"}.get(option, "certificate")
    assert refused(instead(nonsense)) == (f"--tls-{option} {nonsense}: holds no {what} in PEM format")
    assert refused(instead(tmp_path)) == f"--tls-{option} {tmp_path}: Is a directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
def test_a_file_that_may_not_be_read(certificates: Certificates, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(certificates.key("server").read_bytes())
    key.chmod(0)
    shown = certificates.directory
    script = (
        "import os, sys; from pathlib import Path; from criupy._tls.tls_linux import *; "
        "from criupy.testing.certificates import Certificates; import dataclasses; "
        "files = Certificates(Path(sys.argv[1])).files('server'); "
        "files = dataclasses.replace(files, key=Path(sys.argv[2])); "
        "os.setuid(65534); TlsContext(files, server=True)"
    )
    for directory in (*shown.parents, shown, *tmp_path.parents, tmp_path):
        if directory.is_relative_to("/tmp") and directory != Path("/tmp"):
            directory.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script, shown, key], capture_output=True, text=True, check=False
    )
    assert f"TlsError: --tls-key {key}: Permission denied" in done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "expired",
            r"has expired on 2\d{3}-\d\d-\d\d [\d:]{8} UTC; get a new one, or set this machine's clock right",
        ),
        (
            "early",
            r"is not valid before 2\d{3}-\d\d-\d\d [\d:]{8} UTC; wait, or set this machine's clock right",
        ),
    ],
)
def test_our_certificate_out_of_its_time(certificates: Certificates, name: str, said: str) -> None:
    text = refused(certificates.files(name))
    assert re.fullmatch(f"--tls-cert {re.escape(str(certificates.cert(name)))}: {said}", text)


def test_a_key_of_another_certificate(certificates: Certificates) -> None:
    wrong = certificates.key("client")
    assert refused(replace(certificates.files("server"), key=wrong)) == (
        f"--tls-key {wrong}: not the key of the certificate {certificates.cert('server')}"
    )


def test_a_key_with_a_passphrase(certificates: Certificates, tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    openssl = shutil.which("openssl")
    assert openssl is not None
    subprocess.run(
        [
            openssl,
            "ec",
            "-in",
            certificates.key("server"),
            "-out",
            locked,
            "-aes128",
            "-passout",
            "pass:secret",
        ],
        check=True,
        capture_output=True,
    )
    assert refused(replace(certificates.files("server"), key=locked)) == (
        f"--tls-key {locked}: protected by a passphrase, and nobody is there to type it"
    )


def test_where_criu_looks(certificates: Certificates) -> None:
    if Path("/etc/pki/criu/cert.pem").exists():
        pytest.skip("this machine has certificates for CRIU")
    assert refused(replace(certificates.files("server"), cert=None)) == (
        "--tls-cert /etc/pki/criu/cert.pem: No such file or directory"
    )


def test_a_build_without_tls(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    import criupy._tls

    monkeypatch.setitem(sys.modules, "criupy._tls._native", None)
    monkeypatch.delattr(criupy._tls, "_native", raising=False)
    text = refused(certificates.files("server"))
    assert "libssl-dev" in text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "made"), "--names", "DNS:a.example"]) == 0
    out = capsys.readouterr().out
    assert "--tls --tls-cacert" in out
    TlsContext(Certificates(tmp_path / "made").files("server", revocations=True), server=True)
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("certificates: ")
