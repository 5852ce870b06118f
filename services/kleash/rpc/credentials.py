"""What a client shows of itself, and whom it believes: TLS files and a token, from the environment.

KLEASH_TLS_CA             authorities of servers' certificates, PEM; turns TLS on
KLEASH_TLS_CERT, _KEY     the client's own certificate and key, where servers want one
KLEASH_TLS_SERVER_NAME    the name in servers' certificates, where it is not the address
KLEASH_TOKEN              a token, or
KLEASH_TOKEN_FILE         a file that holds one
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kleash.base.errors import ConfigError
from kleash.rpc.pem import Pem, watch_pem
from kleash.rpc.reloading import Reloading, unreadable


@dataclass(frozen=True)
class Credentials:
    """Of one client; the default is none: no TLS, no token. Files may change at any time."""

    ca: Path | None = None
    """Authorities of servers' certificates, a PEM file; None for no TLS. The machine's own are
    often in /etc/ssl/certs/ca-certificates.crt."""
    cert: Path | None = None
    """The client's certificate, where servers want one."""
    key: Path | None = None
    """Its private key."""
    token: str = field(default="", repr=False)
    """Shown to servers on every call."""
    token_file: Path | None = None
    """Holds the token, in place of ``token``; such as that of a ServiceAccount, which rotates."""
    server_name: str = ""
    """A name that servers' certificates hold, where the address is none, such as a pod's IP."""
    caller: str = ""
    """What the client calls itself where servers do not ask who calls; "trainer" goes first. It
    proves nothing."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a combination that has no meaning."""
        if (self.cert is None) != (self.key is None):
            raise ConfigError(
                "a client certificate and its key go together; set KLEASH_TLS_CERT and "
                "KLEASH_TLS_KEY, or neither."
            )
        if self.ca is None and (self.cert is not None or self.server_name):
            name = "KLEASH_TLS_SERVER_NAME" if self.server_name else "KLEASH_TLS_CERT"
            raise ConfigError(
                f"{name} has no effect without TLS; set KLEASH_TLS_CA to the authority of the "
                "server's certificate."
            )
        if self.token and self.token_file is not None:
            raise ConfigError("KLEASH_TOKEN and KLEASH_TOKEN_FILE are both set; keep one of them.")
        if self.token:
            _check_token(self.token, "KLEASH_TOKEN")

    @classmethod
    def from_env(cls, *, caller: str = "") -> Credentials:
        """As the environment says; empty variables count as missing. Raises ConfigError."""
        return cls(
            ca=_path("KLEASH_TLS_CA"),
            cert=_path("KLEASH_TLS_CERT"),
            key=_path("KLEASH_TLS_KEY"),
            token=os.environ.get("KLEASH_TOKEN", "").strip(),
            token_file=_path("KLEASH_TOKEN_FILE"),
            server_name=os.environ.get("KLEASH_TLS_SERVER_NAME", ""),
            caller=caller,
        )

    @property
    def is_empty(self) -> bool:
        """Neither TLS nor a token."""
        return self == Credentials(caller=self.caller)

    def watch_pem(self) -> Reloading[Pem] | None:
        """Contents of the TLS files, kept up to date; None without TLS. Raises ConfigError."""
        return _watched_pem(self) if self.ca is not None else None

    def watch_token(self) -> Callable[[], str] | None:
        """What gives the token of now; None without one. Raises ConfigError."""
        if self.token_file is not None:
            return _watched_token(self.token_file).current
        return (lambda: self.token) if self.token else None


# One for all clients of a process: a client that is opened while the files are being replaced
# takes what the others use.
@functools.cache
def _watched_pem(credentials: Credentials) -> Reloading[Pem]:
    return watch_pem(cert=credentials.cert, key=credentials.key, ca=credentials.ca)


@functools.cache
def _watched_token(path: Path) -> Reloading[str]:
    return Reloading([path], lambda: read_token(path))


def read_token(path: Path) -> str:
    """The token in a file. Raises ConfigError."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise unreadable(error) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} does not hold a token, which is text.") from None
    _check_token(token, str(path))
    return token


def _check_token(token: str, place: str) -> None:
    # A line break or a letter outside of ASCII would break the call with a riddle.
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{place} does not hold a token, which is one word of ASCII letters.")


def _path(variable: str) -> Path | None:
    value = os.environ.get(variable, "")
    return Path(value) if value else None
