"""What a run does, for Prometheus; docs/metrics.md explains every figure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from kleash.base import metrics as exported
from kleash.base.metric_labels import MODEL, PHASE
from kleash.ppo.control import Control, RunState
from kleash.ppo.publish import PublishReport

_GAUGES = {
    "step": exported.TRAIN_STEP,
    "score_mean": exported.TRAIN_SCORE_MEAN,
    "score_std": exported.TRAIN_SCORE_STD,
    "reward_mean": exported.TRAIN_REWARD_MEAN,
    "kl_per_sequence": exported.TRAIN_KL,
    "kl_coefficient": exported.TRAIN_KL_COEFFICIENT,
    "entropy": exported.TRAIN_ENTROPY,
    "response_length_mean": exported.TRAIN_RESPONSE_LENGTH_MEAN,
    "stop_fraction": exported.TRAIN_STOP_FRACTION,
    "explained_variance": exported.TRAIN_EXPLAINED_VARIANCE,
    "behaviour_gap_max": exported.TRAIN_BEHAVIOUR_GAP_MAX,
    "policy_loss": exported.TRAIN_POLICY_LOSS,
    "value_loss": exported.TRAIN_VALUE_LOSS,
    "clip_fraction": exported.TRAIN_CLIP_FRACTION,
    "approx_kl": exported.TRAIN_APPROX_KL,
}
_EVALUATION_GAUGES = {
    "evaluation/score_mean": exported.TRAIN_EVALUATION_SCORE_MEAN,
    "evaluation/kl_per_sequence": exported.TRAIN_EVALUATION_KL,
}
_JUDGE = "evaluation/judge"

PHASES = PHASE.values
"""Parts of a step; their seconds are time_NAME_s in metrics.jsonl."""


def export(metrics: Mapping[str, float]) -> None:
    """Show the step that just ended."""
    for name, gauge in _GAUGES.items():
        if name in metrics:
            gauge.set(metrics[name])
    rates = {"policy": "learning_rate", "value": "value_learning_rate"}
    for model in MODEL.values:
        if f"{model}_grad_norm" in metrics:
            exported.TRAIN_GRAD_NORM.labels(model).set(metrics[f"{model}_grad_norm"])
        exported.TRAIN_LEARNING_RATE.labels(model).set(metrics[rates[model]])
    for phase in PHASES:
        exported.TRAIN_PHASE_SECONDS.labels(phase).observe(metrics[f"time_{phase}_s"])
    exported.TRAIN_STEP_SECONDS.observe(metrics["step_s"])
    exported.TRAIN_SAMPLES.inc(metrics["episodes"])
    exported.TRAIN_TOKENS.inc(metrics["response_length_mean"] * metrics["episodes"])
    # Synchronous training: the batch is always drawn with the newest weights.
    exported.TRAIN_POLICY_LAG_STEPS.set(0)
    exported.TRAIN_LAST_STEP_TIMESTAMP.set(time.time())


def export_evaluation(figures: Mapping[str, float]) -> None:
    """Show the evaluation that just ended."""
    for name, gauge in _EVALUATION_GAUGES.items():
        gauge.set(figures[name])
    for name, value in figures.items():
        if name.startswith(_JUDGE):
            figure = name.removeprefix(_JUDGE).removeprefix("/") or "judge"
            exported.TRAIN_EVALUATION_JUDGE.labels(figure).set(value)
    exported.TRAIN_LAST_EVALUATION_TIMESTAMP.set(time.time())


def export_checkpoint(folder: Path, seconds: float) -> None:
    """Show the checkpoint that was just written, which took so long."""
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    exported.TRAIN_CHECKPOINT_BYTES.set(sum(sizes))
    exported.TRAIN_CHECKPOINT_SECONDS.observe(seconds)
    exported.TRAIN_LAST_CHECKPOINT_TIMESTAMP.set(time.time())


def export_publish(report: PublishReport | None, num_known: int) -> None:
    """Show an attempt to publish, None for one that failed, and the replicas that there are."""
    exported.PUBLISH_KNOWN_REPLICAS.set(num_known)
    exported.PUBLISHES.labels("committed" if report else "failed").inc()
    if report is None:
        return
    exported.PUBLISH_SECONDS.observe(report.seconds)
    exported.PUBLISH_BYTES.inc(report.bytes)
    exported.PUBLISH_CHANGED_FRACTION.set(report.changed_fraction)
    exported.PUBLISH_VERSION.set(report.version)
    exported.PUBLISH_REPLICAS.set(len(report.replicas))


def export_run(control: Control) -> None:
    """Show where the run is, as of each scrape."""
    for state in RunState:
        exported.TRAIN_STATE.labels(state.name.lower()).set_function(
            lambda state=state: float(control.snapshot.state is state)
        )
    exported.TRAIN_TOTAL_STEPS.set_function(lambda: control.snapshot.total_steps)
    exported.TRAIN_CHECKPOINT_STEP.set_function(lambda: control.snapshot.checkpoint_step)

    def show_id() -> None:
        if run_id := control.snapshot.run_id:
            exported.TRAIN_INFO.labels(run_id).set(1)

    control.add_listener(show_id)
