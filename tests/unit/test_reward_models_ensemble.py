"""Ensembles: the combinations of Coste et al. 2023 in hand-worked numbers, faults, revisions."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kleash.common.v1 import common_pb2
from kleash.lm.heads import Normalization
from kleash.lm.sequences import TokenSequence
from kleash.reward.config import RewardModelConfig
from kleash.reward.ensemble import Ensemble
from kleash.reward.local import LocalReward
from kleash.reward.model import Fault, ModelFacts, RawScore, RewardModel, ScoreJob
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import Overloaded, PreconditionFailed
from kleash.rpc.requests import Limits

pytestmark = pytest.mark.unit

FAILED = common_pb2.ITEM_STATUS_CODE_FAILED
INVALID = common_pb2.ITEM_STATUS_CODE_INVALID_INPUT


class Member(RewardModel):
    """Scores a text of digits by its number times a factor."""

    uses_model_thread = False

    def __init__(self, factor: float, **facts: Any) -> None:
        self.factor = factor
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        given = {
            "name": "m",
            "revision": f"sha256:{factor}",
            "kind": reward_pb2.MODEL_KIND_CLASSIFIER,
            "max_item_tokens": 100,
            "tokenizer_sha256": "t",
        } | facts
        super().__init__(ModelFacts(**given))

    def prepare(
        self, items: Sequence[reward_pb2.ScoreItem], options: Any, place: str
    ) -> list[ScoreJob | Fault]:
        return [
            (INVALID, "it is bad.") if each.text == "bad" else ScoreJob(each.text, len(each.text))
            for each in items
        ]

    def count_tokens(self, items: Sequence[reward_pb2.ScoreItem], place: str) -> list[int | Fault]:
        return [int(len(each.text) * self.factor) for each in items]

    def compute(self, jobs: list[ScoreJob]) -> list[RawScore]:
        self.thread = threading.current_thread()
        if self.error is not None:
            raise self.error
        return [self._score(job.content) for job in jobs]

    def _score(self, text: str) -> RawScore:
        if text == "fail":
            return RawScore(fault=(FAILED, "it failed."))
        return RawScore(math.nan if text == "nan" else float(text) * self.factor)


def ensemble(*members: Member, **keys: Any) -> LocalReward:
    named = dict(zip("abcd", members, strict=False))
    config = RewardModelConfig.model_validate({"ensemble": list(named)} | keys)
    return LocalReward(Ensemble.of("judges", config, named), Limits())


MEMBERS = (1.0, 2.0, 6.0)
"""Of the text "2" the members say 2, 4, 12: mean 6, variance (16 + 4 + 36) / 3."""


@pytest.mark.parametrize(
    ("keys", "score", "uncertainty"),
    [
        ({}, 6.0, math.sqrt(56 / 3)),
        ({"combine": "min"}, 2.0, math.sqrt(56 / 3)),
        ({"combine": "penalized", "penalty": 0.25}, 6 - 0.25 * 56 / 3, math.sqrt(56 / 3)),
        # weights 1/2, 1/4, 1/4: mean 5, variance 9/2 + 1/4 + 49/4
        ({"ensemble_weights": {"a": 2, "b": 1, "c": 1}}, 5.0, math.sqrt(17)),
        (
            {
                "ensemble_weights": {"a": 2, "b": 1, "c": 1},
                "combine": "penalized",
                "penalty": 0.5,
            },
            5 - 0.5 * 17,
            math.sqrt(17),
        ),
    ],
)
def test_scores_are_combined(keys: dict[str, Any], score: float, uncertainty: float) -> None:
    local = ensemble(*map(Member, MEMBERS), **keys)
    [got] = local.score_texts(["2"])
    assert got.score == pytest.approx(score)
    assert got.uncertainty == pytest.approx(uncertainty)
    assert got.components == {"a": 2.0, "b": 4.0, "c": 12.0}


def test_each_member_is_normalized_by_its_own_figures() -> None:
    """(4 - 2) / 1 and (20 - 0) / 5: mean 3, not the 12 of raw scores."""
    members = (
        Member(1.0, normalization=Normalization(2.0, 1.0)),
        Member(5.0, normalization=Normalization(0.0, 5.0)),
    )
    [got] = ensemble(*members).score_texts(["4"])
    assert (got.score, got.uncertainty) == (3.0, 1.0)
    assert got.components == {"a": 4.0, "b": 20.0}
    [raw] = ensemble(*members, ensemble_scores="raw").score_texts(["4"])
    assert (raw.score, raw.uncertainty) == (12.0, 8.0)


def test_it_tells_its_members() -> None:
    local = ensemble(
        Member(1.0, dtype="float32"), Member(2.0, dtype="float32", max_item_tokens=7),
        ensemble_weights={"b": 3.0, "a": 1.0},
    )  # fmt: skip
    facts = local.get_model()
    assert facts.kind == reward_pb2.MODEL_KIND_ENSEMBLE
    assert [(c.name, c.weight, c.revision) for c in facts.components] == [
        ("a", 0.25, "sha256:1.0"),
        ("b", 0.75, "sha256:2.0"),
    ]
    assert (facts.tokenizer_sha256, facts.dtype) == ("t", "float32")
    assert facts.limits.max_item_tokens == 7
    assert not facts.supports_token_scores


def test_a_fault_of_a_member_is_the_items_with_its_name() -> None:
    local = ensemble(Member(1.0), Member(2.0))
    got = local.score_texts(["1", "bad", "fail", "nan", "3"], raise_on_item_error=False)
    assert [(each.code, each.error_message) for each in got] == [
        ("OK", ""),
        ("INVALID_INPUT", "member 'a': it is bad."),
        ("FAILED", "member 'a': it failed."),
        ("NON_FINITE", "member 'a': its score is not finite."),
        ("OK", ""),
    ]
    assert [got[0].score, got[4].score] == [1.5, 4.5]


def test_a_member_that_fails_as_a_whole_is_named() -> None:
    good, bad = Member(1.0), Member(2.0)
    bad.error = Overloaded("no room.", reason="QUEUE_FULL", retry_after_s=2.5)
    with pytest.raises(Overloaded, match="member 'b': no room") as caught:
        ensemble(good, bad).score_texts(["1"])
    assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 2.5)


def test_token_ids_need_one_tokenizer() -> None:
    mixed = ensemble(Member(1.0), Member(2.0, tokenizer_sha256="other"))
    assert mixed.get_model().tokenizer_sha256 == ""
    assert mixed.score_texts(["2"])[0].score == 3.0
    ids = [TokenSequence(np.array([1, 2], dtype=np.int32), 1)]
    with pytest.raises(PreconditionFailed, match="do not share a tokenizer") as caught:
        mixed.score_tokens(ids, tokenizer_sha256="t")
    assert (caught.value.reason, caught.value.field) == ("TOKENIZER_MISMATCH", "items[0].tokens")


def test_it_counts_what_the_member_with_most_tokens_counts() -> None:
    assert ensemble(Member(1.0), Member(3.0)).count_tokens(["abc"]) == [9]


def test_the_revision_follows_the_members_and_the_combination() -> None:
    def revision(*members: Member, **keys: Any) -> str:
        return ensemble(*members, **keys).get_model().model.revision

    one, two, three = Member(1.0), Member(2.0), Member(3.0)
    scaled = Member(2.0, normalization=Normalization(1.0, 2.0))
    revisions = [
        revision(one, two),
        revision(one, three),
        revision(two, one),
        revision(one, scaled),
        revision(one, two, combine="min"),
        revision(one, two, combine="penalized", penalty=0.5),
        revision(one, two, combine="penalized", penalty=0.25),
        revision(one, two, ensemble_weights={"a": 1, "b": 2}),
    ]
    assert len(set(revisions)) == len(revisions)
    assert revision(Member(1.0), Member(2.0), ensemble_weights={"a": 5, "b": 5}) == revisions[0]
    assert revision(one, scaled, ensemble_scores="raw") == revisions[0]


def test_members_that_wait_for_others_are_asked_at_once() -> None:
    """Each waits until all are asked: one after another they would wait for ever."""
    meeting = threading.Barrier(3, timeout=20)

    class Waiting(Member):
        def compute(self, jobs: list[ScoreJob]) -> list[RawScore]:
            meeting.wait()
            return super().compute(jobs)

    class Busy(Waiting):
        uses_model_thread = True

    busy = Busy(3.0)
    local = ensemble(Waiting(1.0), Waiting(2.0), busy)
    assert local.model.uses_model_thread
    assert local.score_texts(["2"])[0].score == 4.0
    assert busy.thread is threading.current_thread()
    assert not ensemble(Member(1.0), Member(2.0)).model.uses_model_thread


def test_an_ensemble_of_ensembles() -> None:
    inner = Ensemble.of(
        "inner",
        RewardModelConfig.model_validate({"ensemble": ["a", "b"]}),
        {"a": Member(1.0), "b": Member(3.0)},
    )
    outer = Ensemble.of(
        "outer",
        RewardModelConfig.model_validate({"ensemble": ["inner", "c"], "combine": "min"}),
        {"inner": inner, "c": Member(5.0)},
    )
    [got] = LocalReward(outer, Limits()).score_texts(["2"])
    assert (got.score, got.components) == (4.0, {"inner": 4.0, "c": 10.0})


def test_the_tolerance_is_what_the_members_come_to() -> None:
    members = (
        Member(1.0, batch_tolerance=1e-5),
        Member(1.0, batch_tolerance=4e-5, normalization=Normalization(0.0, 2.0)),
    )

    def tolerance(**keys: Any) -> float:
        return ensemble(*members, **keys).get_model().batch_tolerance

    assert tolerance() == pytest.approx(1.5e-5)
    assert tolerance(combine="min") == pytest.approx(2e-5)
    assert tolerance(combine="penalized", penalty=0.1) == pytest.approx(1.5e-5 * 5)
