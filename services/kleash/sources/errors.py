"""What can be wrong with a source, and who can help.

UserError                   the address or the rights; another try ends the same way
├── ModelError              what is there is no model that Kleash loads
└── ConfigError             the address
RemoteError
└── SourceUnavailable       it did not answer, or not whole; another try may help
NoSpaceError (KleashError)  the volume is full; a later try finds room that others have freed
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from kleash.base.errors import KleashError, RemoteError, UserError

_REACH_IT = (
    "check that the source runs and can be reached from here, or let more time pass with "
    "--wait_s=SECONDS"
)
_DAMAGED = "fetch it again, and upload it again if it stays so"


class SourceUnavailable(RemoteError):  # noqa: N818  named like kleash.rpc.errors.Unavailable
    """A source did not answer, or broke off."""

    def __init__(self, what: str, remedy: str = _REACH_IT) -> None:
        super().__init__(f"{what}; {remedy}.")
        self.what = what
        """Without the remedy, for a log line of a try that others follow."""


class NoSpaceError(KleashError):
    """Nothing more can be written; exit status 1, as another time it may work."""


def not_found(uri: str, detail: str = "") -> UserError:
    """Nothing is there."""
    return UserError(f"{uri} does not exist{_because(detail)}; check the address.")


def denied(uri: str, remedy: str, detail: str = "") -> UserError:
    """Something may be there, for others."""
    return UserError(f"{uri} may not be read with these credentials{_because(detail)}; {remedy}.")


def unavailable(uri: str, detail: str) -> SourceUnavailable:
    """Another try may help."""
    return SourceUnavailable(f"cannot read {uri}{_because(detail)}")


def damaged(name: str, detail: str) -> SourceUnavailable:
    """It arrived, and is not what was announced."""
    return SourceUnavailable(f"cannot use {name}{_because(detail)}", _DAMAGED)


def cannot_write(folder: Path, error: OSError, *, needed_bytes: int = 0) -> KleashError:
    """This machine's side failed; ``needed_bytes`` are still to be written, 0 if nobody knows."""
    if error.errno == errno.ENOSPC:
        return no_space(folder, needed_bytes)
    if error.errno == errno.EDQUOT:
        return no_space(folder, needed_bytes, "a quota on ")
    return UserError(f"cannot write {folder} ({error.strerror or error}); choose another --out.")


def no_space(folder: Path, needed_bytes: int, limit: str = "") -> NoSpaceError:
    """The volume of ``folder`` is full, or a ``limit`` on it is reached."""
    place = folder.resolve()
    volume = next(path for path in (place, *place.parents) if os.path.ismount(path))
    needed = f"{_size(needed_bytes)} more are needed, and " if needed_bytes else ""
    return NoSpaceError(
        f"{limit}the volume {volume} leaves no room for the model in {folder}: {needed}"
        f"{_size(shutil.disk_usage(volume).free)} are free; enlarge the volume or free some."
    )


def _size(num_bytes: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes} bytes"


def _because(detail: str) -> str:
    """One line of what a library says, without its full stop; "" without any."""
    text = " ".join(detail.split()).rstrip(".")
    return f" ({text})" if text else ""
