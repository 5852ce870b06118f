"""PPO under a KL leash: the loop.

    kleash ppo --model=runs/sft --reward_model=runs/rm --prompts=prompts.jsonl --out=runs/ppo

Policy, reward and reference run elsewhere (kleash serve); this process holds the trained policy,
the value network and their optimizers.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager

from kleash.base import tracing
from kleash.base.progress import NullProgress, Progress
from kleash.ppo.config import PPOConfig
from kleash.ppo.control import Control, RunState
from kleash.ppo.lease import NoLease, PublishLease
from kleash.ppo.randomness import sampling_seed
from kleash.ppo.report import PPOReport, write_result
from kleash.ppo.rollout import RolloutAbandonedError
from kleash.ppo.services import Services
from kleash.ppo.session import Session, open_session

logger = logging.getLogger(__name__)


def train(
    config: PPOConfig,
    services: Services,
    *,
    control: Control | None = None,
    progress: Progress | None = None,
    lease: PublishLease | None = None,
) -> PPOReport:
    """Run PPO to its last step, or until ``control`` stops it; both end with a checkpoint.

    Raises UserError before anything is written when models, data, services and configuration do not
    fit together. The policy and report.json are written after the last step. ``lease`` says whether
    this trainer may publish; without one it takes the replicas over.
    """
    control, progress = control or Control(), progress or NullProgress()
    started = time.monotonic()
    with open_session(config, services, control, lease or NoLease()) as run:
        # Whatever the replicas served before, from here on it is this run's policy.
        run.publish(run.position.weights_version)
        logger.info(
            "run %s goes from step %d to %d",
            run.folder.run_id,
            run.position.step,
            config.total_steps,
            extra={"event": "TrainingStarted"},
        )
        progress.start(config.total_steps, "PPO")
        progress.advance(run.position.step)
        try:
            run.evaluate_if_due()
            while run.position.step < config.total_steps and control.may_continue(run.save):
                with _traced_step(run):
                    metrics = ppo_step(run)
                    run.record(metrics)
                    figures = run.evaluate_if_due()
                    control.step_done(figures | metrics)
                    if run.position.step % config.checkpoint.every == 0:
                        run.save()
                shown = {"score": "score_mean", "kl": "kl_per_sequence", "reward": "reward_mean"}
                progress.advance(1, **{name: metrics[key] for name, key in shown.items()})
        except RolloutAbandonedError:
            logger.info("the rollout of step %d was abandoned", run.position.step + 1)
        if run.position.step > run.saved_step:
            run.save()
        progress.finish()

        is_complete = run.position.step == config.total_steps
        logger.info(
            "%s after step %d of %d",
            "completed" if is_complete else "stopped",
            run.position.step,
            config.total_steps,
            extra={"event": "TrainingCompleted" if is_complete else "TrainingStopped"},
        )
        report = write_result(run, seconds=time.monotonic() - started, is_complete=is_complete)
        control.end(RunState.COMPLETED if is_complete else RunState.STOPPING)
        return report


def _traced_step(run: Session) -> AbstractContextManager[object]:
    """Measures the next step, where it is one of those that are traced."""
    step = run.position.step + 1
    is_sampled = step % run.config.tracing.sample_every == 0
    return tracing.root_span("ppo_step", is_sampled=is_sampled, step=step)


def ppo_step(run: Session) -> dict[str, float]:
    """One step: roll out, learn, publish. Returns its figures; docs/metrics.md defines them."""
    config, learner = run.config, run.learner
    step, version = run.position.step + 1, run.position.weights_version
    started = time.monotonic()

    # Responses with behaviour log-probs, scores and reference log-probs, from the services.
    prompts = run.draw_prompts()
    run.start_recording(step, prompts)
    rollout = run.collector.collect(
        prompts, seed=sampling_seed(config.seed, step), weights_version=version
    )
    calibration = run.note_rollout(rollout)

    # Old log-probs, values, rewards = score - beta * KL, advantages: before any update.
    collected = time.monotonic()
    batch, figures = learner.prepare(rollout.samples)
    with tracing.span("keep_samples"):
        run.keep_samples(rollout, batch, step=step, kl_coefficient=figures["kl_coefficient"])

    # Epochs over minibatches: clipped policy loss, clipped value loss, one optimizer step each.
    prepared = time.monotonic()
    figures |= learner.update(batch, step)
    run.recorder.finish(figures, learner)

    # Every replica generates the next step with the new weights.
    updated = time.monotonic()
    if learner.trains_policy(step):
        version += 1
        published = run.publish(version)
        figures |= published.figures() if published else {}

    ended = time.monotonic()
    return {
        "step": step,
        "weights_version": version,
        **figures,
        **calibration,
        "time_generate_s": rollout.generate_s,
        "time_score_s": rollout.score_s,
        "time_old_log_probs_s": prepared - collected,
        "time_update_s": updated - prepared,
        "time_publish_s": ended - updated,
        "step_s": ended - started,
        "samples_per_s": len(rollout.samples) / (ended - started),
    }
