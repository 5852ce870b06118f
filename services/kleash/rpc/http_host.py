"""By which names the HTTP port is called, where nothing else tells its callers from a web page.

A page of another site may point its own name at 127.0.0.1 after it was loaded, and is then of one
origin with whatever listens there (DNS rebinding). Its requests still name that site in the Host
header. So a port on the loopback interface without authentication answers for names of this machine
alone. Elsewhere the network says who may call, and names are whatever DNS makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from kleash.rpc.auth import is_loopback
from kleash.rpc.errors import PermissionDenied

OTHER_HOST = "OTHER_HOST"


def check_host(header: str, allowed: Sequence[str]) -> None:
    """Raise PermissionDenied for a Host header that names another machine.

    ``allowed``: more names; * for all. Programs may leave the header out, browsers cannot.
    """
    if not header or "*" in allowed:
        return
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        name = header
    if is_loopback(name) or name.endswith(".localhost") or name in allowed:
        return
    raise PermissionDenied(
        f"the request names {name[:64]!r} as its host, and this port, which wants no "
        "authentication, answers for localhost alone; ask http://localhost, or add the name to "
        "server.http_allowed_hosts.",
        reason=OTHER_HOST,
    )
