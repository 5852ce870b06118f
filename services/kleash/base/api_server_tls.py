"""TLS to a cluster's API server, for whatever here talks to one.

Python 3.13 began to refuse authorities without the extensions that RFC 5280 asks for (an authority
key identifier, key usage), and those of many clusters were made without them. The certificate, its
chain to the authority of the cluster and its name are checked all the same, so this is left out:
https://github.com/kubernetes-client/python/issues/2394.
"""

from __future__ import annotations

import ssl
from pathlib import Path

LEFT_OUT = ssl.VERIFY_X509_STRICT
"""Of ssl's flags, in a connection to an API server."""


def api_server_context(ca_file: Path) -> ssl.SSLContext:
    """Trusts the authorities in ``ca_file`` alone. Raises OSError."""
    context = ssl.create_default_context(cafile=ca_file)
    context.verify_flags &= ~LEFT_OUT
    return context
