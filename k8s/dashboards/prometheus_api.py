"""What is asked of a Prometheus over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

TIMEOUT_S = 60.0


class PrometheusApi:
    """A running Prometheus at ``url``, such as "http://127.0.0.1:9090"."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str, at_s: float | None = None) -> list[dict[str, Any]]:
        """Series at a Unix time, or now: {"metric": labels, "value": [time, text]}.

        Raises ValueError with Prometheus's own words for an expression that it refuses.
        """
        moment = {} if at_s is None else {"time": f"{at_s:.3f}"}
        return self.get("query", query=expression, **moment)["result"]

    def query_range(
        self, expression: str, start_s: float, end_s: float, step_s: float
    ) -> list[dict[str, Any]]:
        """Series over a time: {"metric": labels, "values": [[time, text], ...]}.

        Raises ValueError as ``query`` does.
        """
        times = {"start": f"{start_s:.3f}", "end": f"{end_s:.3f}", "step": f"{step_s:g}"}
        return self.get("query_range", query=expression, **times)["result"]

    def get(self, path: str, **parameters: str) -> Any:
        """The data of any other path below /api/v1."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{parameters}: {json.load(error)['error']}") from None
