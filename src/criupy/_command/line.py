"""Reading a daemon's command line as far as that is the same for all of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from criupy._command.getopt import GetoptError, normalise, show
from criupy._command.parser import REFUSED, Program, UsageError, refused_dest
from criupy._tls.files import TlsFiles

__all__ = ["Answer", "common_warnings", "read_line", "tls_details", "tls_files"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the command line only asked to print on standard output, with exit status 0."""

    text: str


def read_line(
    argv: Sequence[str], program: Program, parser: argparse.ArgumentParser
) -> argparse.Namespace | Answer:
    """Read a command line, without the program's name, and refuse what no daemon can follow.

    Raises UsageError with one line.
    """
    if any("\0" in word for word in argv):
        raise UsageError("a word of the command line holds a NUL byte")
    # CRIU looks for these two words before it reads anything, wherever they stand.
    if "-h" in argv or "--help" in argv:
        return Answer(parser.format_help())
    try:
        words, rest = normalise(argv, program.own)
    except GetoptError as error:
        raise UsageError(str(error)) from None
    given = parser.parse_args([_without_bare_dashes(word) for word in words])
    if given.help:
        return Answer(parser.format_help())
    if given.version:
        return Answer(f"{program.name} {_version()}\n")
    if rest and rest[0] != program.command:
        raise UsageError(f"'{show(rest[0])}': the only command here is {program.command}; see --help")
    if len(rest) > 1:
        raise UsageError(f"'{show(rest[1])}': nothing may follow but options; see --help")
    _refuse(given)
    return given


def _without_bare_dashes(word: str) -> str:
    # argparse drops a value that is "--"; the only thing called so could be a file.
    name, _, value = word.partition("=")
    return f"{name}=./--" if value == "--" else word


def _version() -> str:
    import importlib.metadata  # takes a sixth of the start-up, for one option

    try:
        return importlib.metadata.version("criupy")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _refuse(given: argparse.Namespace) -> None:
    for name, reason in REFUSED.items():
        if getattr(given, refused_dest(name)):
            raise UsageError(f"--{name} {reason}")
    if given.restore_sibling and not given.daemon:
        raise UsageError("--restore-sibling is for criu restore --restore-detached only")
    for name, fd in (("ps-socket", given.ps_socket), ("status-fd", given.status_fd)):
        if fd is not None and fd <= 2 and given.daemon:
            raise UsageError(f"--{name} {fd} is closed by --daemon: give a descriptor above 2")


def common_warnings(given: argparse.Namespace, program: Program, environ: Mapping[str, str]) -> list[str]:
    """Say what of a line has no effect in any daemon."""
    warnings = [f"{name} {reason}" for name, reason in given.senseless.items()]
    if given.restore_sibling:
        warnings.append(f"--restore-sibling {program.no_sense('restore-sibling')}")
    if environ.get("CRIU_CONFIG_FILE"):
        warnings.append("CRIU_CONFIG_FILE is ignored: CRIU's configuration files are not read")
    if given.tls and given.tls_no_cn_verify and given.tls_cacert is None:
        warnings.append(
            "--tls-no-cn-verify without --tls-cacert: a certificate of any CA that this system trusts will do"
        )
    if given.pidfile is not None and not given.daemon:
        warnings.append(f"--pidfile is written only with --daemon, as criu {program.command} does")
    return warnings


def tls_details(given: argparse.Namespace) -> bool:
    """Tell whether the line says anything of how TLS is to be."""
    details = (given.tls_cacert, given.tls_cacrl, given.tls_cert, given.tls_key)
    return bool(given.tls_no_cn_verify) or any(detail is not None for detail in details)


def tls_files(given: argparse.Namespace) -> TlsFiles:
    """Return which files TLS is to be done with."""
    return TlsFiles(
        cacert=given.tls_cacert,
        cacrl=given.tls_cacrl,
        cert=given.tls_cert,
        key=given.tls_key,
        verify_name=not given.tls_no_cn_verify,
    )
