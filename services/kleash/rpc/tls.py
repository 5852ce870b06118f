"""TLS of a server's gRPC port; certificates that change on disk are used without a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import grpc
import pydantic

from kleash.base.config import Config
from kleash.rpc.pem import Pem, watch_pem


class TlsConfig(Config):
    """Certificates of the gRPC port, PEM files; the health and metrics ports stay without TLS."""

    cert: Path | None = None
    """Certificate of this server and those that lead to its authority; null for no TLS. Files that
    change are used for the next connection."""
    key: Path | None = None
    """Private key of the certificate, without a password."""
    client_ca: Path | None = None
    """Authorities of the callers' certificates; then a connection without one is refused."""

    @property
    def is_on(self) -> bool:
        return self.cert is not None

    @pydantic.model_validator(mode="after")
    def _check_pair(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key go together; set both or neither")
        if self.client_ca is not None and self.cert is None:
            raise ValueError("client_ca needs TLS; set cert and key, too")
        return self


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials | None:
    """Credentials that follow the files; None without TLS. Raises ConfigError for bad files."""
    if not config.is_on:
        return None
    files = watch_pem(cert=config.cert, key=config.key, ca=config.client_ca)
    in_use = files.current()

    def fetch() -> Any:
        """The configuration for a new connection, None for no change; a thread of gRPC asks."""
        nonlocal in_use
        newest = files.current()
        if newest is in_use:
            return None
        in_use = newest
        return _configuration(newest)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(in_use), fetch, require_client_authentication=config.client_ca is not None
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None
    assert pem.cert is not None
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)
