"""TLS sessions, as Python drives them: files, the handshake, and words for failures.

The bytes after the handshake never pass here: a session becomes the transport
of a pager's link or of a page server's connection.
"""

from __future__ import annotations

import enum
import errno
import os
import select
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio

from criupy._tls.files import CACERT, CACRL, CERT, KEY, TlsFiles
from criupy.errors import TlsError

__all__ = ["TlsContext", "TlsFault", "TlsFiles", "TlsSession", "is_available"]

_FAULT_LENGTH = 512


class TlsFault(enum.IntEnum):
    """What went wrong with a session (``tls.h``); UNTRUSTED to CERTIFICATE: the peer's certificate."""

    OK = 0
    CLOSED = 1
    SOCKET = 2
    PLAIN = 3
    VERSION = 4
    NO_CERTIFICATE = 5
    UNTRUSTED = 6
    NAME = 7
    EXPIRED = 8
    NOT_YET = 9
    REVOKED = 10
    OLD_LIST = 11
    CERTIFICATE = 12
    ALERT = 13
    OTHER = 14


def _load() -> Any:
    try:
        from criupy._tls import _native
    except ImportError as error:
        raise TlsError(
            "TLS: this build of criupy has none, because OpenSSL 3 was not found; install its library and "
            "headers (Debian: libssl-dev) and build criupy again"
        ) from error
    return _native


def is_available() -> bool:
    """Tell whether this build of criupy has TLS."""
    try:
        _load()
    except TlsError:
        return False
    return True


class TlsContext:
    """Whom one end trusts and who it is: the files, read once.

    A client's keeps the tickets that servers of ours give it, and resumes its
    session with a peer of the same name (TLS 1.3), for some hours at most and
    no longer than certificates and revocation lists of the first one are good.
    Lists and authorities that the files get later count neither for resumed
    sessions nor for others: they need a new context, to which old tickets mean
    nothing. Sessions may be made and used by several threads at once.

    Raises TlsError with one line for files that cannot be used.
    """

    def __init__(self, files: TlsFiles, *, server: bool) -> None:
        native = _load()
        self._ffi, self._lib = native.ffi, native.lib
        out = self._ffi.new("struct criupy_tls_context **")
        if self._lib.criupy_tls_context_create(out, server) < 0:
            raise TlsError("TLS: OpenSSL cannot be set up as its configuration has it (openssl.cnf)")
        self._context: Any = self._ffi.gc(out[0], self._lib.criupy_tls_context_destroy)
        self.verify_name: bool = files.verify_name
        self._trust(files)
        self._identify(files)

    def _trust(self, files: TlsFiles) -> None:
        trust = self._lib.criupy_tls_context_trust
        if files.cacert is None:
            self._lib.criupy_tls_context_trust_system(self._context)
            if CACERT.exists():
                self._give(trust, "cacert", CACERT, "certificate")
        else:
            self._give(trust, "cacert", files.cacert, "certificate")
        cacrl = files.cacrl
        if cacrl is None and CACRL.exists():
            cacrl = CACRL
        if cacrl is not None:
            self._give(self._lib.criupy_tls_context_revoke, "cacrl", cacrl, "revocation list")

    def _identify(self, files: TlsFiles) -> None:
        cert, key = files.cert or CERT, files.key or KEY
        what = "certificate"
        result = self._give(
            self._lib.criupy_tls_context_certificate, "cert", cert, what, allowed=(errno.EKEYREJECTED,)
        )
        if result:
            raise TlsError(f"--tls-cert {cert}: too weak for OpenSSL here (see openssl.cnf, SECLEVEL)")
        self._check_dates(cert)
        result = self._give(
            self._lib.criupy_tls_context_key,
            "key",
            key,
            "private key",
            allowed=(errno.ENOKEY, errno.EKEYREJECTED),
        )
        if result == errno.ENOKEY:
            raise TlsError(f"--tls-key {key}: protected by a passphrase, and nobody is there to type it")
        if result:
            raise TlsError(f"--tls-key {key}: not the key of the certificate {cert}")

    def _check_dates(self, cert: Path) -> None:
        """Refuse a certificate that every peer would refuse, who alone would say why."""
        text = self._ffi.new("char[]", _FAULT_LENGTH)
        fault = self._lib.criupy_tls_context_dates(self._context, text, _FAULT_LENGTH)
        date = self._ffi.string(text).decode()
        if fault == TlsFault.EXPIRED:
            raise TlsError(
                f"--tls-cert {cert}: has expired on {date}; get a new one, or set this machine's clock right"
            )
        if fault == TlsFault.NOT_YET:
            raise TlsError(
                f"--tls-cert {cert}: is not valid before {date}; wait, or set this machine's clock right"
            )

    def _give(self, call: Any, option: str, path: Path, what: str, *, allowed: tuple[int, ...] = ()) -> int:
        """Let C read a file; return 0 or one of the allowed errnos."""
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise TlsError(f"--tls-{option} {path}: {error.strerror}") from error
        result = -int(call(self._context, os.fsencode(path)))
        if result and result not in allowed:
            raise TlsError(f"--tls-{option} {path}: holds no {what} in PEM format")
        return result

    def session(self, fd: int, name: str | None) -> TlsSession:
        """Begin a session on a connected, non-blocking socket that stays the caller's.

        ``name`` is what the peer's certificate must be for, unless the files
        were given without ``verify_name``.
        """
        out = self._ffi.new("struct criupy_tls_session **")
        wanted = self._ffi.NULL
        if self.verify_name:
            if name is None:
                raise TlsError(
                    "TLS: what is the peer's certificate to be for? See --address and --tls-no-cn-verify"
                )
            wanted = name.encode()
        if self._lib.criupy_tls_session_create(out, self._context, fd, wanted) < 0:
            raise TlsError("TLS: no memory for a session")
        return TlsSession(self._ffi, self._lib, out[0], fd)


class TlsSession:
    """One session: a handshake, then a transport for whoever moves the pages."""

    def __init__(self, ffi: Any, lib: Any, session: Any, fd: int) -> None:
        self._ffi, self._lib = ffi, lib
        self._session = session
        self._fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the session, without a word to the peer; not if it was handed over."""
        session, self._session = self._session, None
        if session is not None:
            self._lib.criupy_tls_session_destroy(session)

    def step(self) -> int:
        """Go on with the handshake as far as possible; return the poll events to wait for, 0 when it is done.

        Raises TlsError, whose words are the rest of a sentence about the peer.
        """
        events = self._ffi.new("int *")
        result = self._lib.criupy_tls_session_handshake(self._session, events)
        if result == 0:
            return 0
        if result == -errno.EAGAIN:
            return int(events[0])
        raise TlsError(self._text(self._lib.criupy_tls_session_fault))

    async def handshake(self) -> None:
        """Do the handshake; after a cancellation it can be called again and goes on."""
        while events := self.step():
            if events & select.POLLOUT:
                await trio.lowlevel.wait_writable(self._fd)
            else:
                await trio.lowlevel.wait_readable(self._fd)

    @property
    def fault(self) -> TlsFault:
        """What made the session fail."""
        text = self._ffi.new("char[]", _FAULT_LENGTH)
        return TlsFault(self._lib.criupy_tls_session_fault(self._session, text, _FAULT_LENGTH))

    def describe(self) -> str:
        """Return version, cipher, the peer's name and whether it was resumed, once the handshake is done."""
        return self._text(self._lib.criupy_tls_session_describe)

    def _text(self, call: Any) -> str:
        text = self._ffi.new("char[]", _FAULT_LENGTH)
        call(self._session, text, _FAULT_LENGTH)
        return bytes(self._ffi.string(text)).decode(errors="replace")

    @property
    def transport(self) -> int:
        """The address of the ``struct criupy_transport``; ``given`` says that somebody took it."""
        return int(self._ffi.cast("uintptr_t", self._lib.criupy_tls_session_transport(self._session)))

    def given(self) -> None:
        """Say that the transport, and with it the session, was taken over."""
        self._session = None
