"""Several reward models whose scores are combined. No model of its own: members do the work.

Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv:2310.02743,
section 3), of the scores r_1 .. r_K of one item:

    mean         mean optimization               sum_k w_k r_k
    min          worst-case optimization, WCO    min_k r_k
    penalized    uncertainty-weighted, UWO       mean - penalty * sum_k w_k (r_k - mean)^2

The paper's weights w_k are 1/K, and its variance divides by K. The uncertainty that a reply tells
is the square root of that variance. r_k is normalized by the member's own figures unless
``ensemble_scores`` says "raw": raw scales of separately trained models do not compare.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kleash.common.v1 import common_pb2
from kleash.lm.heads import Normalization
from kleash.reward.config import RewardModelConfig
from kleash.reward.model import Component, Fault, ModelFacts, RawScore, RewardModel, ScoreJob
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import PreconditionFailed, ServiceError
from kleash.rpc.requests import TOKENIZER_MISMATCH

_NON_FINITE = common_pb2.ITEM_STATUS_CODE_NON_FINITE

SCORE_RANGE = 20.0
"""Scores within +-10, of which ``batch_tolerance`` speaks, are at most this far apart."""


class Ensemble(RewardModel):
    """Members that are loaded. They belong to whoever loaded them and are not closed here."""

    def __init__(
        self, name: str, config: RewardModelConfig, members: Mapping[str, RewardModel]
    ) -> None:
        self._config = config
        self._members = {each: members[each] for each in config.ensemble}
        self.uses_model_thread = any(m.uses_model_thread for m in self._members.values())
        given = config.ensemble_weights or dict.fromkeys(config.ensemble, 1.0)
        weights = np.array([given[each] for each in config.ensemble])
        self._weights_K = weights / weights.sum()
        self._threads: ThreadPoolExecutor | None = None
        super().__init__(self._facts(name))

    @staticmethod
    def of(name: str, config: RewardModelConfig, members: Mapping[str, RewardModel]) -> Ensemble:
        """The ensemble that ``config`` describes, of its members among ``members``."""
        return Ensemble(name, config, members)

    def prepare(
        self,
        items: Sequence[reward_pb2.ScoreItem],
        options: reward_pb2.ScoreOptions,
        place: str,
    ) -> list[ScoreJob | Fault]:
        """Each member's job for each item; a member's fault is the item's."""
        self._check_tokens(items, place)
        prepared = {
            name: self._ask(name, lambda m=member: m.prepare(items, options, place))
            for name, member in self._members.items()
        }
        jobs: list[ScoreJob | Fault] = []
        for index in range(len(items)):
            parts = {name: given[index] for name, given in prepared.items()}
            jobs.append(_fault(parts) or _joined([*parts.values()]))
        return jobs

    def count_tokens(self, items: Sequence[reward_pb2.ScoreItem], place: str) -> list[int | Fault]:
        """The most that a member counts."""
        self._check_tokens(items, place)
        counted = {
            name: self._ask(name, lambda m=member: m.count_tokens(items, place))
            for name, member in self._members.items()
        }
        counts: list[int | Fault] = []
        for index in range(len(items)):
            parts = {name: given[index] for name, given in counted.items()}
            most = [each for each in parts.values() if not isinstance(each, tuple)]
            counts.append(_fault(parts) or max(most))
        return counts

    def compute(self, jobs: list[ScoreJob]) -> list[RawScore]:
        """Score a batch with each member, and combine. Members that wait for others do so at once.

        Raises ServiceError, which names the member, when one fails as a whole.
        """
        tasks: dict[str, Callable[[], list[RawScore]]] = {}
        for place, (name, member) in enumerate(self._members.items()):
            own = [job.content[place] for job in jobs]
            tasks[name] = lambda n=name, m=member, o=own: self._ask(n, lambda: m.compute(o))
        waiting = {
            name: self._pool().submit(task)
            for name, task in tasks.items()
            if not self._members[name].uses_model_thread
        }
        scores = {name: task() for name, task in tasks.items() if name not in waiting}
        scores |= {name: future.result() for name, future in waiting.items()}
        return [
            self._combined({name: scores[name][index] for name in self._members})
            for index in range(len(jobs))
        ]

    def close(self) -> None:
        """End the threads; the members stay."""
        if self._threads is not None:
            self._threads.shutdown()

    def _combined(self, parts: Mapping[str, RawScore]) -> RawScore:
        for name, part in parts.items():
            if part.fault is not None:
                return RawScore(fault=_named(name, part.fault))
            if not math.isfinite(part.score):
                return RawScore(fault=_named(name, (_NON_FINITE, "its score is not finite.")))
        scores_K = np.array(
            [
                (part.score - scale.mean) / scale.std
                for part, scale in zip(parts.values(), self._scales(), strict=True)
            ]
        )
        mean = float(self._weights_K @ scores_K)
        variance = float(self._weights_K @ (scores_K - mean) ** 2)
        score = {
            "mean": mean,
            "min": float(scores_K.min()),
            "penalized": mean - (self._config.penalty or 0.0) * variance,
        }[self._config.combine]
        known = [part.num_tokens for part in parts.values()]
        return RawScore(
            score,
            components=tuple(part.score for part in parts.values()),
            uncertainty=math.sqrt(variance),
            num_tokens=None if None in known else max(each or 0 for each in known),
            is_truncated=any(part.is_truncated for part in parts.values()),
        )

    def _scales(self) -> list[Normalization]:
        if self._config.ensemble_scores == "raw":
            return [Normalization()] * len(self._members)
        return [member.facts.normalization for member in self._members.values()]

    def _facts(self, name: str) -> ModelFacts:
        facts = [member.facts for member in self._members.values()]
        tokenizers = {each.tokenizer_sha256 for each in facts}
        templates = {each.chat_template_sha256 for each in facts}
        dtypes = {each.dtype for each in facts}
        return ModelFacts(
            name=name,
            revision=self._revision(facts),
            kind=reward_pb2.MODEL_KIND_ENSEMBLE,
            dtype=dtypes.pop() if len(dtypes) == 1 else "",
            tokenizer_sha256=tokenizers.pop() if len(tokenizers) == 1 else "",
            chat_template_sha256=templates.pop() if len(templates) == 1 else "",
            max_item_tokens=min(each.max_item_tokens for each in facts),
            components=tuple(
                Component(member, float(weight), each.revision)
                for member, weight, each in zip(self._members, self._weights_K, facts, strict=True)
            ),
            batch_tolerance=self._tolerance(facts),
        )

    def _tolerance(self, facts: Sequence[ModelFacts]) -> float:
        """What the members' tolerances come to, at most."""
        own = [f.batch_tolerance / s.std for f, s in zip(facts, self._scales(), strict=True)]
        if self._config.combine == "min":
            return max(own)
        mean = float(self._weights_K @ np.array(own))
        # A member's part of the variance changes by twice its distance from the mean.
        return mean * (1 + 2 * SCORE_RANGE * (self._config.penalty or 0.0))

    def _revision(self, facts: Sequence[ModelFacts]) -> str:
        """Digest of the members' revisions, and of what makes one score of theirs."""
        members = [
            [member, each.revision, float(weight), scale.mean, scale.std]
            for member, each, weight, scale in zip(
                self._members, facts, self._weights_K, self._scales(), strict=True
            )
        ]
        text = json.dumps([self._config.combine, self._config.penalty, members])
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def _check_tokens(self, items: Sequence[reward_pb2.ScoreItem], place: str) -> None:
        """Raise PreconditionFailed for token ids that would mean something else to a member."""
        if self.facts.tokenizer_sha256:
            return
        for index, item in enumerate(items):
            if item.WhichOneof("input") == "tokens":
                field = f"{place.format(index)}.tokens"
                raise PreconditionFailed(
                    f"{field}: the members of '{self.facts.name}' do not share a tokenizer; send "
                    "text or a conversation.",
                    reason=TOKENIZER_MISMATCH,
                    field=field,
                )

    def _ask(self, name: str, ask: Callable[[], list]) -> list:
        try:
            return ask()
        except ServiceError as error:
            raise type(error)(
                f"member '{name}': {error.message}",
                reason=error.reason,
                field=error.field,
                retry_after_s=error.retry_after_s,
                metadata=error.metadata,
            ) from error

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(len(self._members), f"kleash-{self.facts.name}")
        return self._threads


def _fault(parts: Mapping[str, ScoreJob | int | Fault]) -> Fault | None:
    """The first member's fault, with its name."""
    for name, part in parts.items():
        if isinstance(part, tuple):
            return _named(name, part)
    return None


def _named(name: str, fault: Fault) -> Fault:
    return fault[0], f"member '{name}': {fault[1]}"


def _joined(parts: list) -> ScoreJob:
    return ScoreJob(
        parts,
        num_tokens=max(part.num_tokens for part in parts),
        is_truncated=any(part.is_truncated for part in parts),
    )
