"""Certificates, keys and authorities from PEM files, checked before anybody uses them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from kleash.base.errors import ConfigError
from kleash.rpc.reloading import Reloading, unreadable


@dataclass(frozen=True)
class Pem:
    """One side's part of TLS, as the text of PEM files; None for what it does not have."""

    cert: bytes | None
    """The certificate, then those that lead from it to the authority."""
    key: bytes | None
    """The certificate's private key, not encrypted."""
    ca: bytes | None
    """Authorities whose certificates the other side may have."""


def watch_pem(*, cert: Path | None, key: Path | None, ca: Path | None) -> Reloading[Pem]:
    """The files' contents, kept up to date. Raises ConfigError when they cannot be used now."""
    paths = [path for path in (cert, key, ca) if path is not None]
    return Reloading(paths, lambda: read_pem(cert=cert, key=key, ca=ca))


def read_pem(*, cert: Path | None, key: Path | None, ca: Path | None) -> Pem:
    """Read and check the files: certificate and key belong together, everything is PEM.

    Raises ConfigError; also for files that are being written.
    """
    try:
        pem = _read(cert, key, ca)
        if cert is not None and key is not None:
            _check_pair(cert, key)
        if pem.ca is not None:
            _check_authorities(pem.ca, ca)
        # The pair was checked by path: what is used must be what was checked.
        is_settled = _read(cert, key, ca) == pem
    except OSError as error:
        raise unreadable(error) from None
    if not is_settled:
        raise ConfigError(f"{cert}, {key} or {ca} is being written; it is read again soon.")
    return pem


def _read(cert: Path | None, key: Path | None, ca: Path | None) -> Pem:
    return Pem(*(path.read_bytes() if path is not None else None for path in (cert, key, ca)))


def _check_pair(cert: Path, key: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password OpenSSL would ask the terminal for one.
        context.load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{cert} and {key} are not a certificate and its private key "
            f"({error.reason or error}); give PEM files that belong together, "
            "the key without a password."
        ) from None


def _check_authorities(ca: bytes, path: Path | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=ca.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{path} holds no certificates of authorities in PEM form ({error}); "
            "give the file that signs the other side's certificates."
        ) from None
