"""The figures of a step for Prometheus; docs/metrics.md explains them."""

from __future__ import annotations

import time
from collections.abc import Mapping

from kleash.base import metrics as exported

_GAUGES = {
    "step": exported.TRAIN_STEP,
    "reward_mean": exported.TRAIN_REWARD_MEAN,
    "kl_per_sequence": exported.TRAIN_KL,
    "kl_coefficient": exported.TRAIN_KL_COEFFICIENT,
    "entropy": exported.TRAIN_ENTROPY,
    "clip_fraction": exported.TRAIN_CLIP_FRACTION,
}

PHASES = ("generate", "score", "old_log_probs", "update", "publish")
"""Parts of a step; their seconds are time_NAME_s in metrics.jsonl."""


def export(metrics: Mapping[str, float]) -> None:
    """Show the step that just ended."""
    for name, gauge in _GAUGES.items():
        if name in metrics:
            gauge.set(metrics[name])
    for model in ("policy", "value"):
        if f"{model}_grad_norm" in metrics:
            exported.TRAIN_GRAD_NORM.labels(model).set(metrics[f"{model}_grad_norm"])
    for phase in PHASES:
        exported.TRAIN_PHASE_SECONDS.labels(phase).observe(metrics[f"time_{phase}_s"])
    exported.TRAIN_TOKENS.inc(metrics["response_length_mean"] * metrics["episodes"])
    # Synchronous training: the batch is always drawn with the newest weights.
    exported.TRAIN_POLICY_LAG_STEPS.set(0)
    exported.TRAIN_LAST_STEP_TIMESTAMP.set(time.time())
