"""Which files a TLS connection is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["CACERT", "CACRL", "CERT", "KEY", "TlsFiles"]

# criu/tls.c, with the sysconfdir of every distribution.
CACERT = Path("/etc/pki/CA/cacert.pem")
CACRL = Path("/etc/pki/CA/cacrl.pem")
CERT = Path("/etc/pki/criu/cert.pem")
KEY = Path("/etc/pki/criu/private/key.pem")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files; what is None is where CRIU looks for it.

    ``cacert`` are the CAs to trust; without it those that the system trusts
    are trusted, too. ``cacrl`` lists revoked certificates, and need not exist
    where CRIU looks for it. ``cert`` and ``key`` are our own. With
    ``verify_name`` the peer's certificate must be for the page server's
    address: both ends compare with it, as CRIU does.
    """

    cacert: Path | None = None
    cacrl: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    verify_name: bool = True
