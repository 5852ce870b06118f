"""Who may call a server: the modes, the check of every call, and the caller's name for handlers.

token, service_account   before anything of the request is read: the token is in the metadata
mtls                     before the request is parsed: the handshake has proven the certificate
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import pydantic

from kleash.base import metrics
from kleash.base.config import Config
from kleash.rpc.errors import PermissionDenied, Unauthenticated
from kleash.rpc.static_tokens import StaticTokens
from kleash.rpc.token_review import ApiServer, TokenReviews

logger = logging.getLogger(__name__)

_caller: ContextVar[str] = ContextVar("kleash_caller", default="")


def caller() -> str:
    """Name of who makes the call being handled; "" when the server does not ask, or outside."""
    return _caller.get()


class AuthConfig(Config):
    """Who may call the gRPC port. Health is open to everybody, reflection is not."""

    mode: Literal["none", "token", "service_account", "mtls"] = "none"
    """How callers are known: not at all; by static keys; by Kubernetes ServiceAccount tokens; by
    client certificates."""
    tokens_file: Path | None = None
    """Keys of mode token, a line "NAME sha256:HEX" each, as kleash token NAME makes them; a file
    that changes is read again."""
    audience: str = ""
    """What tokens of mode service_account must be projected for."""
    allowed_callers: tuple[str, ...] = ()
    """Names that may call, * and ? for any letters: of keys, of ServiceAccounts
    ("system:serviceaccount:NAMESPACE:NAME") or of certificates (their alternative names, or else
    the common name). Empty for every known caller."""

    @pydantic.model_validator(mode="after")
    def _check_mode(self) -> Self:
        for key, mode in (("tokens_file", "token"), ("audience", "service_account")):
            if self.mode == mode and not getattr(self, key):
                raise ValueError(f"mode {mode} needs {key}")
            if self.mode != mode and getattr(self, key):
                raise ValueError(f"{key} has no effect in mode {self.mode}; it is of mode {mode}")
        if self.mode == "none" and self.allowed_callers:
            raise ValueError("allowed_callers has no effect in mode none, which knows no callers")
        return self


class Authenticator(Protocol):
    """Knows callers by a token."""

    async def identify(self, token: str) -> str:
        """Name of the holder. Raises ServiceError."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class Gate:
    """Lets calls through, or not, and remembers who made them."""

    def __init__(self, config: AuthConfig) -> None:
        """Raises ConfigError for files or surroundings that the mode needs and cannot use."""
        self._allowed = config.allowed_callers
        self.is_on = config.mode != "none"
        self.knows_peers = config.mode == "mtls"
        self._tokens: Authenticator | None = None
        if config.mode == "token":
            assert config.tokens_file is not None
            self._tokens = StaticTokens(config.tokens_file)
        elif config.mode == "service_account":
            self._tokens = TokenReviews(ApiServer.of_this_pod(), config.audience)

    async def check_token(self, service: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """In the modes of tokens: let the call through, or raise ServiceError.

        ``service`` is the label of the metric of refused calls.
        """
        if self._tokens is None:
            return
        try:
            name = await self._tokens.identify(_bearer(metadata))
            self._let_in([name])
        except (Unauthenticated, PermissionDenied):
            _count_refusal(service)
            raise

    def check_peer(self, service: str, context: Any) -> None:
        """In mode mtls: let the call through, or raise ServiceError."""
        if not self.knows_peers:
            return
        try:
            self._let_in(_certificate_names(context.auth_context()))
        except (Unauthenticated, PermissionDenied):
            _count_refusal(service)
            raise

    def close(self) -> None:
        """Give back what the mode holds."""
        if self._tokens is not None:
            self._tokens.close()

    def _let_in(self, names: list[str]) -> None:
        """The caller has ``names``, the first its main one; it is known by the one allowed."""
        allowed = [name for name in names if self._is_allowed(name)]
        _caller.set(allowed[0] if allowed else names[0])
        if not allowed:
            raise PermissionDenied(
                f"'{names[0]}' may not call this server; its operator lets in who is in "
                "server.auth.allowed_callers.",
                reason="CALLER_NOT_ALLOWED",
            )

    def _is_allowed(self, name: str) -> bool:
        return not self._allowed or any(fnmatchcase(name, pattern) for pattern in self._allowed)


def warn_about_plain_tokens(config: AuthConfig, *, has_tls: bool, host: str) -> None:
    """Say in the log that tokens can be read on the way."""
    if config.mode in ("token", "service_account") and not has_tls and not is_loopback(host):
        logger.warning(
            "callers send their tokens in clear, as server.tls.cert is not set: keep others off "
            "this network, with a NetworkPolicy at least"
        )


def is_loopback(host: str) -> bool:
    """Whether ``host``, an address or a name, is this machine to itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The token of a call. Raises Unauthenticated."""
    values = [value for key, value in metadata if key == "authorization"]
    if not values:
        raise Unauthenticated(
            "this server wants to know who calls, and the call has no token; set KLEASH_TOKEN or "
            "KLEASH_TOKEN_FILE, or send the metadata 'authorization: Bearer TOKEN'.",
            reason="MISSING_CREDENTIALS",
        )
    scheme, _, token = str(values[0]).partition(" ")
    is_token = bool(token.strip()) and token.isascii()
    if len(values) > 1 or scheme.lower() != "bearer" or not is_token:
        raise Unauthenticated(
            "the call's metadata 'authorization' is not one value 'Bearer TOKEN'; "
            "KLEASH_TOKEN holds the token alone.",
            reason="BAD_CREDENTIALS",
        )
    return token.strip()


def _certificate_names(peer: dict[str, list[bytes]]) -> list[str]:
    """Names of a client certificate: its subject alternative names, or its common name."""
    for key in ("x509_subject_alternative_name", "x509_common_name"):
        if found := [name.decode("utf-8", "replace") for name in peer.get(key, ()) if name]:
            return found
    raise Unauthenticated(
        "the call came without a client certificate that names the caller; set KLEASH_TLS_CERT and "
        "KLEASH_TLS_KEY to one with a subject alternative name.",
        reason="MISSING_CREDENTIALS",
    )


def _count_refusal(service: str) -> None:
    metrics.REQUESTS_REJECTED.labels(service, "auth").inc()
