"""A run while it lives: its models, services, data and files, put together before the first step.

train.py holds the method; this module holds what it stands on: loading, checking, saving.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kleash.data.prompts import PromptRecord
from kleash.lm.digest import model_digest
from kleash.lm.lineage import describe_lineage
from kleash.ppo import checkpoint as checkpoints
from kleash.ppo.batch import RolloutBatch
from kleash.ppo.calibration import Calibration, Probe, RewardState
from kleash.ppo.checkpoint import Checkpoint, RunPosition
from kleash.ppo.config import PPOConfig
from kleash.ppo.control import Control, RunState, SavedCheckpoint, Snapshot
from kleash.ppo.evaluation import Evaluator
from kleash.ppo.inputs import load_inputs
from kleash.ppo.learner import Learner
from kleash.ppo.lease import PublishLease
from kleash.ppo.models import make_learner, sft_digest
from kleash.ppo.patience import Patience, is_curable
from kleash.ppo.publish import Canary, Publisher, PublishReport
from kleash.ppo.randomness import draw
from kleash.ppo.recorder import Recorder
from kleash.ppo.rollout import Collector, Rollout
from kleash.ppo.run_folder import RunFolder, open_run_folder
from kleash.ppo.samples import describe_samples, newest_samples
from kleash.ppo.services import Services, shake_hands
from kleash.ppo.start import record_start, seen_step
from kleash.ppo.telemetry import export, export_publish
from kleash.rpc.errors import ServiceError
from kleash.rpc.server import BackgroundServer
from kleash.sinks.config import check_packages
from kleash.sinks.feed import Feed
from kleash.weights.store import Store
from kleash.weights.store_service import StoreService

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Session:
    """A run with its lock held. ``position`` is the only part that changes beside the models."""

    config: PPOConfig
    services: Services
    control: Control
    folder: RunFolder
    tokenizer: Any
    prompts: Sequence[PromptRecord]
    learner: Learner
    publisher: Publisher
    collector: Collector
    evaluator: Evaluator | None
    digests: dict[str, str]
    recorder: Recorder
    sinks: Feed
    position: RunPosition
    saved_step: int
    """Step of the newest checkpoint; 0 without one."""
    policy_digest: str = ""
    """Of the weights that the replicas serve; empty before the first publish."""

    # --------------------------------------------------------------------------------- the loop's

    def draw_prompts(self) -> list[PromptRecord]:
        """The prompts of the next step: a fresh permutation every epoch."""
        indices = draw(
            len(self.prompts),
            seed=self.config.seed,
            purpose="prompts",
            position=self.position.prompt_position,
            count=self.config.batch_size,
        )
        return [self.prompts[index] for index in indices]

    def publish(self, version: int) -> PublishReport | None:
        """Give the policy to every replica; None when the run is to stop and a replica is away."""
        patience = Patience(self.config.services.wait_s, self.control.is_abandoned)
        while True:
            try:
                report = self.publisher.publish(self.learner.policy, version)
                export_publish(report, len(self.services.weights))
                self.collector.use_replicas(report.replicas)
                self.policy_digest = report.digest
                return report
            except ServiceError as error:
                export_publish(None, len(self.services.weights))
                if not is_curable(error):
                    raise
                if self.control.is_abandoned():
                    # The next start publishes in any case; the step is worth keeping.
                    logger.warning("version %d was not published: %s", version, error)
                    return None
                patience.wait_after(error)

    def start_recording(self, step: int, prompts: Sequence[PromptRecord]) -> None:
        """Keep the run as it is, and what the services are asked, where the step is recorded."""
        self.recorder.begin(
            step,
            prompts,
            save_before=self._write_checkpoint,
            described={
                "run_id": self.folder.run_id,
                "weights_version": self.position.weights_version,
                "reference_revision": self.collector.reference_revision,
                "environment": self.folder.read_starts()[-1],
            },
        )

    def note_rollout(self, rollout: Rollout) -> dict[str, float]:
        """The step at hand has its scores: the lineage names their model from now on, and probes
        for a next one are kept. Returns the figures of the calibration.
        """
        self._note_reward_model()
        services, reward = self.config.services, self.collector.reward
        if services.calibration != "none":
            probes = [
                Probe(sample.record.prompt_id, sample.sequence, sample.score)
                for sample in rollout.samples
            ]
            self.collector.reward = reward.with_probes(probes, services.calibration_samples)
        calibration = reward.calibration
        if services.calibration == "none" and calibration == Calibration():
            return {}
        return {
            "reward_calibration_scale": calibration.scale,
            "reward_calibration_shift": calibration.shift,
        }

    def keep_samples(
        self, rollout: Rollout, batch: RolloutBatch, *, step: int, kl_coefficient: float
    ) -> None:
        """Write the first responses of the step to samples.jsonl, as often as the run wants."""
        config = self.config
        if config.samples.per_step and step % config.samples.every == 0:
            rows = describe_samples(
                rollout.samples[: config.samples.per_step],
                batch,
                self.tokenizer,
                config.algorithm,
                kl_coefficient=kl_coefficient,
            )
            known = {"step": step, "policy_digest": self.policy_digest}
            rows = [known | row for row in rows]
            self.folder.append_samples(rows)
            self.control.samples_kept(rows)
            self.sinks.samples(step, rows)

    def record(self, metrics: dict[str, float]) -> None:
        """A step is done: keep its figures and move on."""
        self.folder.append_metrics(metrics)
        self.sinks.metrics(int(metrics["step"]), metrics)
        export(metrics)
        self.position = replace(
            self.position,
            step=int(metrics["step"]),
            weights_version=int(metrics["weights_version"]),
            prompt_position=self.position.prompt_position + self.config.batch_size,
        )

    def evaluate_if_due(self) -> dict[str, float]:
        """Before the first step, every evaluation.every steps and after the last; once each."""
        step = self.position.step
        is_due = step % self.config.evaluation.every == 0 or step == self.config.total_steps
        if self.evaluator is None or not is_due or self._was_evaluated(step):
            return {}
        figures = self.evaluator.evaluate(
            self.collector,
            step=step,
            weights_version=self.position.weights_version,
            folder=self.folder.evaluations,
        )
        self._note_reward_model()
        self.folder.append_metrics({"step": step, **figures})
        self.sinks.metrics(step, figures)
        return figures

    def save(self) -> SavedCheckpoint:
        """Write a checkpoint of the present step, unless there is one."""
        path = checkpoints.path_of(self.folder.checkpoints, self.position.step)
        if self.position.step == self.saved_step and path.exists():
            return SavedCheckpoint(path, self.saved_step)
        checkpoints.save(
            self.folder.checkpoints, self.learner, self.tokenizer, self.config, **self._state()
        )
        self.saved_step = self.position.step
        self.control.checkpoint_saved(self.position.step)
        logger.info("checkpoint %s", path)
        return SavedCheckpoint(path, self.position.step)

    def _write_checkpoint(self, folder: Path) -> Path:
        return checkpoints.write(folder, self.learner, self.tokenizer, self.config, **self._state())

    def _state(self) -> dict[str, Any]:
        """Of the run, for a checkpoint of it."""
        return {
            "position": self.position,
            "run_id": self.folder.run_id,
            "fence": self.folder.fence,
            "digests": self.digests,
            "reward": self.collector.reward,
            "lineage": self.lineage(),
        }

    def lineage(self) -> dict[str, Any]:
        """``kleash.json`` of the policy as it is now."""
        described = describe_lineage(
            "ppo",
            self.config,
            parent=self.config.model,
            parent_digest=self.digests["sft_checkpoint"],
            digest=model_digest(self.learner.policy),
            data_sha256=self.digests["prompts"],
        )
        return described | {
            "run_id": self.folder.run_id,
            "step": self.position.step,
            "reward_model_digest": self.digests["reward_model"],
            "reward_calibration": asdict(self.collector.reward.calibration),
        }

    def _note_reward_model(self) -> None:
        reward = self.collector.reward
        if reward.revision != self.digests["reward_model"]:
            logger.warning(
                "from step %d on scores are those of reward model %s times %.6g plus %.6g, and "
                "were those of %s",
                self.position.step + 1,
                reward.revision,
                reward.calibration.scale,
                reward.calibration.shift,
                self.digests["reward_model"],
                extra={"event": "RewardModelAdopted"},
            )
            self.digests["reward_model"] = reward.revision

    def _was_evaluated(self, step: int) -> bool:
        path = self.folder.evaluations / f"step-{step:06d}.jsonl"
        return path.exists() and any(
            row["step"] == step and "evaluation/score_mean" in row
            for row in self.folder.read_metrics()
        )


@contextlib.contextmanager
def open_session(
    config: PPOConfig, services: Services, control: Control, lease: PublishLease
) -> Iterator[Session]:
    """Lock the run folder, load and check everything, go back to the newest checkpoint if any.

    Raises UserError, with nothing written, when something does not fit.
    """
    with (
        open_run_folder(
            config.out, resume=config.resume, has_lease=config.publish.lease is not None
        ) as folder,
        contextlib.ExitStack() as stack,
    ):
        session = _prepare(config, services, control, lease=lease, folder=folder, stack=stack)
        _introduce(session)
        yield session


def _prepare(
    config: PPOConfig,
    services: Services,
    control: Control,
    *,
    lease: PublishLease,
    folder: RunFolder,
    stack: contextlib.ExitStack,
) -> Session:
    check_packages(config.sinks)
    inputs = load_inputs(config)
    saved = checkpoints.newest(folder.checkpoints)
    hands = shake_hands(
        services,
        config,
        tokenizer_sha256=inputs.tokenizer_sha256,
        reference_digest=partial(sft_digest, config),
        reward_revision=saved.reward.revision if saved else "",
    )
    digests = inputs.digests(config, hands.reward_revision)
    learner = make_learner(config, inputs.policy, inputs.pretraining or (), saved, digests)
    # A new reward model is adopted when a step begins, by a run that goes on as by any other.
    reward = saved.reward if saved else RewardState(hands.reward_revision)
    digests |= {"reward_model": reward.revision}
    position, seen = saved.position if saved else RunPosition(), seen_step(folder)
    _go_back(folder, saved)
    folder.begin(config, max(hands.fence, lease.fence, saved.fence if saved else 0))
    lease.record(folder.run_id, folder.fence)
    recorder = Recorder(config.record, folder.recordings)
    stack.callback(recorder.discard)
    canary_ids = inputs.prompts[0].ids[: config.publish.canary_tokens]
    canary = Canary(canary_ids, learner.canary_log_probs) if len(canary_ids) > 1 else None
    publisher = _publisher(config, services, lease=lease, folder=folder, canary=canary, stack=stack)
    return Session(
        config=config,
        services=services,
        control=control,
        folder=folder,
        tokenizer=inputs.tokenizer,
        prompts=inputs.prompts,
        learner=learner,
        publisher=publisher,
        collector=Collector(
            recorder.watch(services),
            config,
            tokenizer_sha256=inputs.tokenizer_sha256,
            reward=reward,
            reference_revision=hands.reference_revision,
            ensure_weights=publisher.ensure,
            is_abandoned=control.is_abandoned,
        ),
        evaluator=inputs.evaluator,
        digests=digests,
        recorder=recorder,
        sinks=stack.enter_context(
            record_start(config, folder, from_step=position.step, seen_step=seen, digests=digests)
        ),
        position=position,
        saved_step=saved.position.step if saved else 0,
    )


def _go_back(folder: RunFolder, saved: Checkpoint | None) -> None:
    if not folder.holds_a_run():
        return
    if saved is None:
        logger.warning(
            "%s has no complete checkpoint; the run starts from its beginning", folder.path
        )
    else:
        logger.info("going on from %s", saved.path)
    folder.cut_back(saved.position.step if saved else -1)


def _publisher(
    config: PPOConfig,
    services: Services,
    *,
    lease: PublishLease,
    folder: RunFolder,
    canary: Canary | None,
    stack: contextlib.ExitStack,
) -> Publisher:
    """The publisher, and the server of its store when a replica lives in another process."""
    settings = config.publish.model_copy(update={"quorum": config.quorum})
    store = Store(folder.weights, keep_versions=settings.keep_versions)
    stack.callback(store.close)
    address = settings.address or ""
    if config.services.is_elastic or any(its.address for its in services.weights.values()):
        service = StoreService(store)
        server = stack.enter_context(BackgroundServer([service], settings.server))
        stack.callback(service.end_watches)  # runs first: the server waits for open streams
        address = address or server.address
        logger.info("weights store at %s", server.address)
    return Publisher(
        services.weights,
        store,
        run_id=folder.run_id,
        fence=folder.fence,
        config=settings,
        store_address=address,
        canary=canary,
        may_publish=lease.check,
    )


def _introduce(session: Session) -> None:
    """Tell Control what the run is, and the steps that a checkpoint brought back."""
    if session.control.address:
        session.folder.note_addresses(session.control.address, session.control.page)
    session.control.samples_kept(newest_samples(session.folder.path / "samples.jsonl"))
    rows = session.folder.read_metrics()
    evaluations = {row["step"]: row for row in rows if "step_s" not in row}
    session.control.begin(
        Snapshot(
            run_id=session.folder.run_id,
            state=RunState.STARTING,
            step=session.position.step,
            total_steps=session.config.total_steps,
            weights_version=session.position.weights_version,
            checkpoint_step=session.saved_step,
            config_json=session.config.model_dump_json(),
        ),
        [evaluations.get(row["step"], {}) | row for row in rows if "step_s" in row],
    )
