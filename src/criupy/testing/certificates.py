"""Certificates to try TLS with: python -m criupy.testing.certificates DIR.

Made by the program openssl(1), 3.0 or newer. Nothing here is for production: the keys lie about unprotected.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from criupy._tls.files import TlsFiles
from criupy.errors import CriupyError

__all__ = ["Certificates", "main", "make_certificates"]

_DESCRIPTION = """\
Make a certificate authority and certificates signed by it in DIR, to try TLS
between page server and lazy-pages daemon, CRIU's or criupy's."""

_LOOPBACK = "DNS:localhost,IP:127.0.0.1,IP:::1"

_CONFIG = """\
[ca]
default_ca = demo
[demo]
database = {books}/index.txt
new_certs_dir = {books}
serial = {books}/serial
crlnumber = {books}/crlnumber
default_md = sha256
default_crl_days = 3650
policy = any
unique_subject = no
[any]
commonName = supplied
[req]
prompt = no
distinguished_name = name
[name]
[authority]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[host]
basicConstraints = CA:FALSE
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""


class CertificatesError(CriupyError):
    """openssl(1) is missing, or said no."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """The files of ``make_certificates``: each certificate NAME is NAME.pem, with its key in NAME-key.pem."""

    directory: Path

    @property
    def cacert(self) -> Path:
        """The authority that signed all but ``stranger``."""
        return self.directory / "cacert.pem"

    @property
    def cacrl(self) -> Path:
        """Its revocation list, which has ``revoked``."""
        return self.directory / "cacrl.pem"

    def cert(self, name: str) -> Path:
        """Return a certificate: server, client, elsewhere, revoked, expired, early or stranger."""
        return self.directory / f"{name}.pem"

    def key(self, name: str) -> Path:
        """Its private key."""
        return self.directory / f"{name}-key.pem"

    def files(self, name: str, *, verify_name: bool = True, revocations: bool = False) -> TlsFiles:
        """Return what an end needs that shows this certificate."""
        return TlsFiles(
            cacert=self.cacert,
            cacrl=self.cacrl if revocations else None,
            cert=self.cert(name),
            key=self.key(name),
            verify_name=verify_name,
        )

    def options(self, name: str, *, verify_name: bool = True, revocations: bool = False) -> list[str]:
        """Return the same as options, which CRIU and criupy share."""
        return [
            "--tls",
            *(["--tls-cacert", str(self.cacert), "--tls-cert", str(self.cert(name))]),
            *(["--tls-key", str(self.key(name))]),
            *(["--tls-cacrl", str(self.cacrl)] if revocations else []),
            *([] if verify_name else ["--tls-no-cn-verify"]),
        ]


def _openssl(*words: str | Path) -> None:
    try:
        subprocess.run(
            ["openssl", *words], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise CertificatesError("openssl(1) is missing: install it (Debian: openssl)") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["nothing"])[-1]
        raise CertificatesError(f"openssl {words[0]} failed: {said}") from None


class _Authority:
    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.books = directory / f"{name}-books"
        self.books.mkdir(exist_ok=True)
        self.config = self.books / "openssl.cnf"
        (self.books / "index.txt").write_text("")
        (self.books / "serial").write_text("1000\n")
        (self.books / "crlnumber").write_text("01\n")
        self._configure(_LOOPBACK)
        subject = f"/CN=criupy demo {name}"
        days = ("-days", "3650", "-x509", "-extensions", "authority")
        _openssl("req", *self._key(name), *days, "-subj", subject, "-out", self.cert, "-config", self.config)

    @property
    def cert(self) -> Path:
        return self.directory / f"{self.name}.pem"

    def _configure(self, names: str) -> None:
        self.config.write_text(_CONFIG.format(books=self.books, names=names))

    def _key(self, name: str) -> tuple[str | Path, ...]:
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        return (*curve, "-keyout", self.directory / f"{name}-key.pem")

    def sign(self, name: str, *, names: str = _LOOPBACK, start: float = -1, end: float = 3650) -> None:
        """Make a certificate that is valid from so many days from now to so many."""
        self._configure(names)
        request = self.books / f"{name}.csr"
        subject = f"/CN=criupy demo {name}"
        _openssl("req", *self._key(name), "-subj", subject, "-out", request, "-config", self.config)
        dates = [
            (datetime.now(UTC) + timedelta(days=days)).strftime("%y%m%d%H%M%SZ") for days in (start, end)
        ]
        who = ("-cert", self.cert, "-keyfile", self.directory / f"{self.name}-key.pem")
        what = ("-in", request, "-out", self.directory / f"{name}.pem", "-notext", "-extensions", "host")
        when = ("-startdate", dates[0], "-enddate", dates[1])
        _openssl("ca", "-batch", "-config", self.config, *who, *what, *when)
        request.unlink()

    def revoke(self, name: str, crl: Path) -> None:
        """Revoke a certificate and write the list."""
        who = ("-cert", self.cert, "-keyfile", self.directory / f"{self.name}-key.pem")
        revoked = self.directory / f"{name}.pem"
        _openssl("ca", "-batch", "-config", self.config, *who, "-revoke", revoked)
        _openssl("ca", "-batch", "-config", self.config, *who, "-gencrl", "-out", crl)


def make_certificates(directory: Path, *, names: str = _LOOPBACK) -> Certificates:
    """Make the files; ``names`` are those of server and client, as a subjectAltName of openssl.

    ``elsewhere`` is for another host, ``early`` not valid yet, ``stranger``
    signed by another authority.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    authority = _Authority(directory, "cacert")
    for name in ("server", "client", "revoked"):
        authority.sign(name, names=names)
    authority.sign("elsewhere", names="DNS:elsewhere.example,IP:192.0.2.1")
    authority.sign("expired", start=-30, end=-1)
    authority.sign("early", start=30)
    authority.revoke("revoked", directory / "cacrl.pem")
    _Authority(directory, "other-cacert").sign("stranger", names=names)
    return Certificates(directory)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m criupy.testing.certificates", description=_DESCRIPTION)
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to; made if it is not there")
    parser.add_argument(
        "--names",
        default=_LOOPBACK,
        help="what server and client are called, as a subjectAltName of openssl (default: %(default)s)",
    )
    given = parser.parse_args(argv)
    try:
        made = make_certificates(given.directory, names=given.names)
    except (CriupyError, OSError) as error:
        print(f"certificates: {error}", file=sys.stderr)
        return 1
    print(f"an end that shows {made.cert('server')} is given:")
    print("  " + " ".join(made.options("server", revocations=True)))
    print("likewise client, elsewhere, revoked, expired, early and stranger (of another authority)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
