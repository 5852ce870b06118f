"""The result of a run: the policy as a Hugging Face folder, and report.json."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from typing import Any

from kleash.lm.digest import model_digest
from kleash.lm.load import read_lineage, save_checkpoint_folder
from kleash.ppo.run_folder import write_whole
from kleash.ppo.session import Session


@dataclass(frozen=True)
class PPOReport:
    """What a run did; report.json of the run folder once it is complete."""

    steps: int
    """PPO steps done."""
    is_complete: bool
    """All steps are done; False when the run was stopped."""
    kl_per_sequence_nats: float
    """KL from the reference in the last step, mean over sequences."""
    reward_mean_first: float
    """Score minus KL penalty in the first step, mean over sequences."""
    reward_mean_last: float
    score_mean_first: float
    """Normalised reward-model score in the first step."""
    score_mean_last: float
    evaluation_first: dict[str, float]
    """Figures of the evaluation before the first step; empty without evaluation."""
    evaluation_last: dict[str, float]
    step_s_mean: float
    samples_per_s_mean: float
    seconds: float
    """Of this process; a resumed run counts from its resumption."""
    run_id: str
    weights_version: int
    digests: dict[str, str]
    """Of the policy and of what it came from."""
    signal_number: int = 0
    """The signal that ended the run before its last step; 0 for none."""


def write_result(run: Session, *, seconds: float, is_complete: bool) -> PPOReport:
    """Describe the run; once it is complete also write ``policy/`` and ``report.json``."""
    rows = run.folder.read_metrics()
    steps = [row for row in rows if "step_s" in row]
    evaluations = [row for row in rows if "evaluation/score_mean" in row]
    report = PPOReport(
        steps=run.position.step,
        is_complete=is_complete,
        kl_per_sequence_nats=_figure(steps, -1, "kl_per_sequence"),
        reward_mean_first=_figure(steps, 0, "reward_mean"),
        reward_mean_last=_figure(steps, -1, "reward_mean"),
        score_mean_first=_figure(steps, 0, "score_mean"),
        score_mean_last=_figure(steps, -1, "score_mean"),
        evaluation_first=evaluations[0] if evaluations else {},
        evaluation_last=evaluations[-1] if evaluations else {},
        step_s_mean=_mean(steps, "step_s"),
        samples_per_s_mean=_mean(steps, "samples_per_s"),
        seconds=round(seconds, 3),
        run_id=run.folder.run_id,
        weights_version=run.position.weights_version,
        digests={"policy": model_digest(run.learner.policy), **run.digests},
        signal_number=0 if is_complete else run.control.signal_number,
    )
    if is_complete:
        # One may be here: of this very state when a finished run is resumed, of another one when
        # the run had to start again without its checkpoints.
        if read_lineage(run.folder.policy).get("digest") != report.digests["policy"]:
            shutil.rmtree(run.folder.policy, ignore_errors=True)
            save_checkpoint_folder(
                run.learner.policy, run.tokenizer, run.folder.policy, run.lineage()
            )
        write_whole(run.folder.path / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    return report


def _figure(rows: list[dict[str, Any]], index: int, key: str) -> float:
    return rows[index][key] if rows else 0.0


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows) if rows else 0.0
