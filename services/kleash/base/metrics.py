"""Every metric that a Kleash process exports, in one place; docs/metrics.md is made of it.

Process-wide, in prometheus_client's default registry. Labels stay few: never a weights version, run
id, prompt id or revision, except on ``*_info`` gauges. What a metric means, its labels and buckets
are where it is defined: call_metrics.py, model_metrics.py, train_metrics.py. Those of clients
(other applications import them) are in client_metrics.py.
"""

from __future__ import annotations

from kleash.base import call_metrics, model_metrics, train_metrics
from kleash.base.call_metrics import *  # noqa: F403  every metric is metrics.NAME to who sets it
from kleash.base.model_metrics import *  # noqa: F403
from kleash.base.train_metrics import *  # noqa: F403

GROUPS = (
    call_metrics.CALLS,
    call_metrics.QUEUE,
    model_metrics.PROCESS,
    model_metrics.MODELS,
    model_metrics.WEIGHTS,
    train_metrics.TRAINER,
    train_metrics.EVALUATION,
    train_metrics.CHECKPOINTS,
    train_metrics.PUBLISHER,
)
"""In the order of docs/metrics.md."""
