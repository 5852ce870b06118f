"""Static keys of callers, hashed at rest: a file with a line per key.

    # name       digest           end, if it has one
    trainer      sha256:9f86d0…   until:2027-06-30T12:00:00Z
    guardrails   sha256:60303a…

A name may have several keys, so that one can take the place of another. The keys are 256 random
bits: a plain SHA-256 of one cannot be searched for.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kleash.base.errors import ConfigError
from kleash.rpc.errors import Unauthenticated
from kleash.rpc.reloading import Reloading, unreadable

PREFIX = "kleash_"
"""Of every key, so that secret scanners find one that was committed by mistake."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/-]*")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class Key:
    """One line of the file."""

    name: str
    """The caller's."""
    digest: bytes
    """SHA-256 of the key."""
    until: datetime | None
    """When it ends; None for never."""


def make_token(name: str, until: datetime | None = None) -> tuple[str, str]:
    """A new key, and the line that lets its holder call as ``name``. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' cannot name a caller; use letters, digits and . _ @ : / - only, "
            "a letter or a digit first."
        )
    token = PREFIX + secrets.token_urlsafe(32)
    line = f"{name} sha256:{_digest(token).hex()}"
    if until is not None:
        line += f" until:{until.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    return token, line


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises ConfigError that names the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(error) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file; it has lines 'NAME sha256:HEX'.") from None
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            key = _parse(words, f"{path}:{number}")
            if key.digest in keys:
                raise ConfigError(
                    f"{path}:{number}: the key is that of '{keys[key.digest].name}', too; "
                    "give each caller its own."
                )
            keys[key.digest] = key
    if not keys:
        raise ConfigError(f"{path} holds no key; kleash token NAME --tokens_file={path} adds one.")
    return tuple(keys.values())


def _parse(words: list[str], place: str) -> Key:
    name, digest, *rest = [*words, ""] if len(words) == 1 else words
    found = _DIGEST.fullmatch(digest)
    if not _NAME.fullmatch(name) or found is None or len(rest) > 1:
        raise ConfigError(
            f"{place}: a line is 'NAME sha256:HEX', then 'until:TIME' if the key ends; "
            "kleash token NAME makes one."
        )
    return Key(name, bytes.fromhex(found[1]), _parse_until(rest[0], place) if rest else None)


def _parse_until(word: str, place: str) -> datetime:
    try:
        until = datetime.fromisoformat(word.removeprefix("until:"))
        if not word.startswith("until:") or until.tzinfo is None:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{place}: '{word}' is not an end such as 'until:2027-06-30T12:00:00Z'."
        ) from None
    return until


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class StaticTokens:
    """Knows callers by the keys of a file, which may change."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self._keys = Reloading([path], lambda: read_keys(path))

    async def identify(self, token: str) -> str:
        """Name of the holder. Raises Unauthenticated."""
        digest = _digest(token)
        # Every key is compared, and in constant time: how long it takes tells nothing.
        matching = [key for key in self._keys.current() if hmac.compare_digest(key.digest, digest)]
        if not matching:
            raise Unauthenticated(
                "the token is not one that this server knows; check that KLEASH_TOKEN or the file "
                "KLEASH_TOKEN_FILE holds all of it, or ask the operator for one "
                "(kleash token NAME).",
                reason="BAD_CREDENTIALS",
            )
        key = matching[0]
        if key.until is not None and key.until <= datetime.now(UTC):
            raise Unauthenticated(
                f"the token of '{key.name}' ended at {key.until.isoformat()}; "
                "ask the operator for a new one (kleash token NAME).",
                reason="EXPIRED",
            )
        return key.name

    def close(self) -> None:
        """Nothing to end."""
