"""One batch of responses, scored: generation streams in, scoring overlaps it.

    replica 0 ─ share of the prompts ─► Generate ─ finished responses, in order of completion ─┐
    replica 1 ─ share of the prompts ─► Generate ─ ...                                         │
                                                          groups of fixed size, per replica    │
                                              ┌── reward.score_tokens ◄────────────────────────┤
                                              └── reference.log_probs ◄────────────────────────┘
    rows in the order of the prompts, whatever order they arrived in

One thread a replica reads its stream; a pool of threads waits for the scoring calls. A group is
what one replica finished in a row, so that its composition, and with it every bit of the answers,
is the same in a repeated run. A call that finds a service away is repeated; tokens do not change
by that, because their random numbers depend on (seed, prompt id, sample index, position) alone.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from kleash.base import tracing
from kleash.base.errors import KleashError
from kleash.client.types import GeneratedSequence, Sampling, VersionSpan
from kleash.data.prompts import PromptRecord
from kleash.lm.sequences import TokenSequence
from kleash.ppo.calibration import RewardState
from kleash.ppo.config import PPOConfig
from kleash.ppo.patience import Patience, is_curable
from kleash.ppo.pinning import RewardPin
from kleash.ppo.rows import Row, number_rows, requests_of, shares_of
from kleash.ppo.scoring import Finished, Group, RolloutError, Scoring
from kleash.ppo.services import Policy, Services, describe_misfit
from kleash.rpc.errors import ServiceError, Unavailable

SCORING_THREADS = 4
"""Two calls under way for each scoring service: one computes while the next is decoded."""

POLL_S = 0.2
"""How often a rollout looks whether it is to be abandoned."""


class RolloutAbandonedError(KleashError):
    """The run is to stop and this rollout was given up; nothing of the trainer's state changed."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One response and what the services said about it."""

    record: PromptRecord
    sequence: TokenSequence
    """Prompt and response."""
    behaviour_log_probs: np.ndarray
    """One a response token, float32: the sampler's own."""
    reference_log_probs: np.ndarray
    """One a response token, float32."""
    score: float
    """Normalised reward-model score, on the scale of the run."""
    uncalibrated_score: float
    """The same as the reward model gave it."""
    is_stopped: bool
    """The response ends with a stop token; False when the length limit cut it."""
    weights_version: int
    """Weights that produced every token."""
    version_spans: tuple[VersionSpan, ...]
    """The same as the policy service said it, token by token."""
    reward_revision: str
    """Digest of the reward model that gave the score."""
    reference_revision: str
    """Digest of the reference that gave its log-probs."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """A scored batch, in the order of the prompts."""

    samples: list[Sample]
    generate_s: float
    """Until the last response was there."""
    score_s: float
    """From then until everything was scored: the part of scoring that generation did not hide."""
    reward: RewardState
    """The reward model that gave every score."""


@dataclass(eq=False)
class Collector:
    """Collects rollouts from the services."""

    services: Services
    config: PPOConfig
    tokenizer_sha256: str
    reward: RewardState
    """Scores of another reward model are refused, or it is adopted: then this becomes its."""
    reference_revision: str
    """Log-probs of another reference are refused."""
    ensure_weights: Callable[[int, int], None]
    """Called with (replica, version) before a replica is asked: it must serve the trainer's weights
    of that version, and get them again when it was restarted."""
    is_abandoned: Callable[[], bool] = lambda: False
    """Polled; once true, ``collect`` raises RolloutAbandonedError."""
    _replicas: list[int] = field(default_factory=list)
    """Policy replicas that are asked; empty means all."""
    _told: set[str] = field(default_factory=set)
    """Reward models of which the log has said that they are refused."""

    def use_replicas(self, replicas: Sequence[int]) -> None:
        """From now on ask these policy replicas: those that serve the newest version."""
        self._replicas[:] = replicas

    @tracing.measured("rollout")
    def collect(
        self,
        prompts: Sequence[PromptRecord],
        *,
        seed: int,
        weights_version: int,
        begins_step: bool = True,
    ) -> Rollout:
        """One response to each prompt, drawn with the weights of ``weights_version``.

        ``begins_step``: a new reward model may be adopted. False keeps to that of the step before,
        unless the service holds it no longer.
        """
        self._check_abandoned()
        start = time.monotonic()
        rows = number_rows(prompts)
        replicas = self._present_replicas()
        shares = shares_of(rows, len(replicas))
        drawing = ThreadPoolExecutor(len(shares), "generate")
        scoring = ThreadPoolExecutor(SCORING_THREADS, "score")
        task = _Task(self, replicas, seed, weights_version, scoring)
        same_reference = scoring.submit(tracing.bound(task.scoring.check_reference))
        try:
            if begins_step:
                self._wait([scoring.submit(tracing.bound(task.scoring.begin_step))])
            run = tracing.bound(task.run)
            futures = [drawing.submit(run, index, share) for index, share in enumerate(shares)]
            self._wait(futures)
            groups = [group for future in futures for group in future.result()]
            generated = time.monotonic()
            answers = [future for group in groups for future in (group.scores, group.log_probs)]
            self._wait([same_reference, *answers])
            settled = scoring.submit(task.scoring.settle, groups, self.reward)
            self._wait([settled])
            self.reward = settled.result()
            samples = sorted(
                (pair for group in groups for pair in self._samples(group, weights_version)),
                key=lambda pair: pair[0],
            )
        finally:
            task.is_over.set()
            drawing.shutdown(wait=False, cancel_futures=True)
            scoring.shutdown(wait=False, cancel_futures=True)
        return Rollout(
            samples=[sample for _, sample in samples],
            generate_s=generated - start,
            score_s=time.monotonic() - generated,
            reward=self.reward,
        )

    def _samples(self, group: Group, weights_version: int) -> Iterator[tuple[int, Sample]]:
        answers = zip(
            group.rows, group.scores.result().scores, group.log_probs.result(), strict=True
        )
        for (row, generated, sequence), score, log_probs in answers:
            if not math.isfinite(score) or not np.isfinite(log_probs).all():
                raise RolloutError(
                    f"the response to prompt {row.record.prompt_id!r} got the score {score:g} and "
                    f"{int((~np.isfinite(log_probs)).sum())} log-probs that are not finite; score "
                    "that prompt by hand and serve a reward model and a reference whose weights "
                    "are finite, then resume."
                )
            if len(log_probs) != sequence.response_length:
                raise RolloutError(
                    f"the reference service sent {len(log_probs)} log-probs for the "
                    f"{sequence.response_length} tokens of the response to "
                    f"{row.record.prompt_id!r}; serve the reference with the trainer's version of "
                    "kleash, then resume."
                )
            yield (
                row.index,
                Sample(
                    record=row.record,
                    sequence=sequence,
                    behaviour_log_probs=generated.log_probs,
                    reference_log_probs=log_probs,
                    score=self.reward.calibration.apply(score),
                    uncalibrated_score=score,
                    is_stopped=generated.finish_reason == "stop",
                    weights_version=weights_version,
                    version_spans=generated.version_spans,
                    reward_revision=self.reward.revision,
                    reference_revision=self.reference_revision,
                ),
            )

    def _present_replicas(self) -> list[int]:
        """Those that serve the newest version, or any where these have left; at least one."""
        patience = Patience(self.config.services.wait_s, self.is_abandoned)
        while True:
            there = list(self.services.policies)
            if replicas := [it for it in self._replicas if it in there] or there:
                return replicas
            patience.wait_after(
                Unavailable(
                    "no policy replica is there; kubectl get pods shows why, and the run goes on "
                    "when one is.",
                    reason="NO_REPLICA",
                )
            )

    def _wait(self, futures: Sequence[Future]) -> None:
        """Until all are done; raises the first error at once, and when the run is to stop."""
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_EXCEPTION)
            self._check_abandoned()
            for future in done:
                future.result()

    def _check_abandoned(self) -> None:
        if self.is_abandoned():
            raise RolloutAbandonedError("the rollout was abandoned because the run is to stop.")


class _Task:
    """One call of ``collect``, as its threads see it."""

    def __init__(
        self,
        collector: Collector,
        replicas: Sequence[int],
        seed: int,
        weights_version: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._replicas = replicas
        self.is_over = threading.Event()
        config = collector.config
        self._services = collector.services
        self._config = config
        self._tokenizer_sha256 = collector.tokenizer_sha256
        self._ensure_weights = collector.ensure_weights
        self._weights_version = weights_version
        self.scoring = Scoring(
            services=collector.services,
            config=config,
            tokenizer_sha256=collector.tokenizer_sha256,
            pin=RewardPin(
                collector.services.reward,
                collector.reward.revision,
                may_adopt=config.services.new_reward_model == "adopt",
                told=collector._told,
                describe_misfit=lambda answer: describe_misfit(
                    answer, config, collector.tokenizer_sha256
                ),
            ),
            reference_revision=collector.reference_revision,
            pool=pool,
            is_over=self.is_over,
        )
        self._sampling = Sampling(
            seed=seed,
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            stop_token_ids=config.sampling.stop_token_ids,
        )

    def run(self, index: int, rows: Sequence[Row]) -> list[Group]:
        """Generate the share of a replica and hand each full group on."""
        groups: list[Group] = []
        finished: list[Finished] = []
        measured = tracing.span("generate", share=index, responses=len(rows))
        with measured, contextlib.closing(self._generate(index, rows)) as arrivals:
            for row, generated in arrivals:
                finished.append((row, generated, _sequence(row, generated, self._weights_version)))
                if len(finished) == self._config.services.group_size:
                    _raise_failures(groups)
                    groups.append(self.scoring.submit(finished))
                    finished = []
        if finished:
            groups.append(self.scoring.submit(finished))
        return groups

    def _generate(
        self, index: int, rows: Sequence[Row]
    ) -> Generator[tuple[Row, GeneratedSequence]]:
        """Responses as they finish; after a failure those that are missing are asked for again.

        So are those that a commit of other weights ended. The same replica is asked, or where the
        run may go on without some, the next one. Tokens do not change.
        """
        replica = self._replicas[index]
        missing = {(row.record.prompt_id, row.sample_index): row for row in rows}
        known = set(missing)
        patience = Patience(self._config.services.wait_s, self.is_over.is_set)
        while missing and not self.is_over.is_set():
            num_aborted = 0
            try:
                self._bring_weights(replica)
                stream = self._policy(replica).generate(
                    requests_of(missing.values()),
                    self._sampling,
                    min_weights_version=self._weights_version,
                    tokenizer_sha256=self._tokenizer_sha256,
                )
                with contextlib.closing(stream):
                    for generated in stream:
                        if self.is_over.is_set():
                            return
                        key = (generated.prompt_id, generated.sample_index)
                        if key not in known:
                            raise RolloutError(
                                f"policy replica {replica} answered {key}, which nobody asked; "
                                "serve it with the trainer's version of kleash, then resume."
                            )
                        if generated.finish_reason == "aborted":
                            num_aborted += 1
                        elif row := missing.pop(key, None):
                            patience.start_again()
                            yield row, generated
            except ServiceError as error:
                if not is_curable(error) and error.reason != "WEIGHTS_TOO_OLD":
                    raise
                patience.wait_after(error)
                if self._config.quorum is not None:
                    replica = self._after(replica)
                continue
            if len(missing) > num_aborted:
                raise RolloutError(
                    f"policy replica {replica} ended its stream without {len(missing)} of "
                    f"{len(rows)} responses; its log says why. Resume when it is mended."
                )

    def _after(self, replica: int) -> int:
        """The next replica in turn of those that are there now."""
        there = sorted(self._services.policies)
        return next(
            (number for number in there if number > replica), there[0] if there else replica
        )

    def _policy(self, replica: int) -> Policy:
        policy = self._services.policies.get(replica)
        if policy is None:
            raise Unavailable(
                f"policy replica {replica} has left; its share is asked of another.",
                reason="NO_REPLICA",
            )
        return policy

    def _bring_weights(self, replica: int) -> None:
        """The replica serves the trainer's version; raises Unavailable while it may come to."""
        try:
            self._ensure_weights(replica, self._weights_version)
        except ServiceError as error:
            if not is_curable(error):
                raise
            raise Unavailable(error.message, reason=error.reason) from None


def _raise_failures(groups: Sequence[Group]) -> None:
    """What cannot be scored need not be generated to the end."""
    for group in groups:
        for answer in (group.scores, group.log_probs):
            if answer.done():
                answer.result()


def _sequence(row: Row, generated: GeneratedSequence, weights_version: int) -> TokenSequence:
    """Prompt and response, after the checks that make it usable."""
    versions = {span.weights_version for span in generated.version_spans}
    if versions != {weights_version}:
        raise RolloutError(
            f"the response to prompt {row.record.prompt_id!r} was drawn with weights of version "
            f"{sorted(versions)}, and the trainer is at {weights_version}; does another trainer "
            "publish to this policy service?"
        )
    if not len(generated.ids) or len(generated.log_probs) != len(generated.ids):
        raise RolloutError(
            f"the response to prompt {row.record.prompt_id!r} has {len(generated.ids)} tokens and "
            f"{len(generated.log_probs)} log-probs; serve the policy with the trainer's version of "
            "kleash, then resume."
        )
    ids = np.concatenate([row.record.ids, generated.ids]).astype(np.int32)
    return TokenSequence(ids, response_start=len(row.record.ids))
