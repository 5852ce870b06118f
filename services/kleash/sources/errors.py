"""What can be wrong with a source, and who can help.

UserError                   the address, the rights or the space; another try ends the same way
├── ModelError              what is there is no model that Kleash loads
└── ConfigError             the address
RemoteError
└── SourceUnavailable       it did not answer, or not whole; another try may help
"""

from __future__ import annotations

import errno
from pathlib import Path

from kleash.base.errors import RemoteError, UserError


class SourceUnavailable(RemoteError):  # noqa: N818  named like kleash.rpc.errors.Unavailable
    """A source did not answer, or broke off."""


def not_found(uri: str, detail: str = "") -> UserError:
    """Nothing is there."""
    return UserError(f"{uri} does not exist{_because(detail)}; check the address.")


def denied(uri: str, remedy: str, detail: str = "") -> UserError:
    """Something may be there, for others."""
    return UserError(f"{uri} may not be read with these credentials{_because(detail)}; {remedy}.")


def unavailable(uri: str, detail: str) -> SourceUnavailable:
    """Another try may help."""
    return SourceUnavailable(f"cannot read {uri}{_because(detail)}.")


def cannot_write(folder: Path, error: OSError, *, needed_bytes: int = 0) -> UserError:
    """This machine's side failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = f", and {needed_bytes / 1e9:.2f} GB are still to come" if needed_bytes else ""
        return UserError(f"no space is left in {folder}{needed}; enlarge the volume or free some.")
    return UserError(f"cannot write {folder} ({error.strerror or error}); choose another --out.")


def _because(detail: str) -> str:
    """One line of what a library says, without its full stop; "" without any."""
    text = " ".join(detail.split()).rstrip(".")
    return f" ({text})" if text else ""
