"""Metrics of the calls that the bundled clients of this process make, in prometheus_client's
default registry.

from kleash.client import metrics
metrics.enable()            # before the clients are made; or KLEASH_CLIENT_METRICS=1
"""

from __future__ import annotations

from kleash.rpc.client_metrics import enable

__all__ = ["enable"]
