"""TLS of a server's HTTP port: the files of the gRPC port, and the same names of callers."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kleash.base.errors import ConfigError
from kleash.rpc.pem import read_pem
from kleash.rpc.reloading import Reloading
from kleash.rpc.tls import TlsConfig


def server_context(config: TlsConfig) -> ssl.SSLContext | None:
    """A context that follows the files; None without TLS. Raises ConfigError for bad files."""
    if not config.is_on:
        return None
    paths = [path for path in (config.cert, config.key, config.client_ca) if path is not None]
    contexts = Reloading(paths, lambda: _context(config))
    outer = _context(config)

    def use_the_newest(connection: Any, _name: str | None, _outer: ssl.SSLContext) -> None:
        """OpenSSL asks at each ClientHello, with a name or without."""
        connection.context = contexts.current()

    outer.sni_callback = use_the_newest
    return outer


def _context(config: TlsConfig) -> ssl.SSLContext:
    """Raises ConfigError for files that cannot be used."""
    assert config.cert is not None
    pem = read_pem(cert=config.cert, key=config.key, ca=config.client_ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, config.cert, config.key)
    if pem.ca is not None:
        # A resumed session would be one whose certificate nobody checks again.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=pem.ca.decode("ascii"))
    if read_pem(cert=config.cert, key=config.key, ca=config.client_ca) != pem:
        raise ConfigError(f"{config.cert} or {config.key} is being written; it is read again soon.")
    return context


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        raise ConfigError(f"{cert} and {key} do not belong together ({error}).") from None


def auth_context(certificate: Mapping[str, Any] | None) -> dict[str, list[bytes]]:
    """What gRPC tells of a client's certificate, from what Python's ssl does."""
    if not certificate:
        return {}
    alternatives = [
        _as_address(value) if kind == "IP Address" else value
        for kind, value in certificate.get("subjectAltName", ())
        if kind in ("DNS", "email", "URI", "IP Address")
    ]
    subject = [pair for parts in certificate.get("subject", ()) for pair in parts]
    names = [value for kind, value in subject if kind == "commonName"]
    return {
        "x509_subject_alternative_name": [value.encode() for value in alternatives],
        "x509_common_name": [value.encode() for value in names[:1]],
    }


def _as_address(text: str) -> str:
    """As gRPC writes it: Python's ssl spells IPv6 in full, in capitals."""
    return str(ipaddress.ip_address(text.strip()))
