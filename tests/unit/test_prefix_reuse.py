"""Rows that begin alike are computed with their beginning once, and get the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.classifier_folders import CAUSAL, WINDOW, write_classifier

from kleash.lm import prefix_reuse
from kleash.lm.config import Dtype
from kleash.lm.frozen import BATCH_TOLERANCE
from kleash.lm.load import load_classifier
from kleash.lm.prefix_reuse import PositionLogits
from kleash.lm.shared_prefixes import MIN_PREFIX_TOKENS, SharedPrefix, plan_reuse, shared_prefixes
from kleash.reward.classifier import ClassifierModel
from kleash.reward.config import RewardConfig
from kleash.reward.model import ScoreJob

pytestmark = pytest.mark.unit

PROMPTS, ANSWERS = (60, 33, 81), (1, 17, 5, 9, 17, 12)
assert min(PROMPTS) > WINDOW, "sliding windows must begin within prefixes and within rests"


def ids(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 300, length).astype(np.int32)


def candidates() -> list[np.ndarray]:
    """Candidates of three prompts in turn, one of them twice, and two rows of their own."""
    prompts = [ids(place, length) for place, length in enumerate(PROMPTS)]
    rows = [
        np.concatenate([prompt, ids(100 * answer + place, length)])
        for answer, length in enumerate(ANSWERS)
        for place, prompt in enumerate(prompts)
    ]
    return [ids(7, 40), *rows, rows[2].copy(), ids(8, 3)]


def groups(rows: Sequence[np.ndarray]) -> set[tuple[int, tuple[int, ...]]]:
    return {(prefix.length, prefix.rows) for prefix in shared_prefixes(rows)}


def test_candidates_are_grouped_by_their_prompt() -> None:
    found = {prefix.length: prefix.rows for prefix in shared_prefixes(candidates())}
    assert found.keys() == set(PROMPTS)
    for place, length in enumerate(PROMPTS):
        its = [1 + place + len(PROMPTS) * answer for answer in range(len(ANSWERS))]
        assert found[length] == (*its, *([19] if place == 2 else []))


def test_a_group_within_a_group_is_taken_where_it_saves_more() -> None:
    system, long = ids(1, 20), ids(2, 60)
    inner = [np.concatenate([system, long, ids(place, 4)]) for place in range(10, 13)]
    outer = [np.concatenate([system, ids(place, 30)]) for place in range(20, 22)]
    # All by the system prompt: 4 x 20 saved. The three by 80 and the two by 20: 180.
    assert groups([*inner, *outer]) == {(80, (0, 1, 2)), (20, (3, 4))}


def test_a_row_keeps_its_last_token_when_it_is_the_whole_prefix_of_another() -> None:
    row = ids(1, 30)
    assert groups([row, np.concatenate([row, ids(2, 5)]), row]) == {(29, (0, 1, 2))}


def test_short_beginnings_are_not_shared() -> None:
    begin = ids(1, MIN_PREFIX_TOKENS - 1)
    assert not shared_prefixes([np.concatenate([begin, ids(place, 9)]) for place in (2, 3, 4)])


def test_many_rows_that_each_begin_the_next_are_grouped_without_recursion() -> None:
    """The shorter half would cut the prefix of the longer one, and has one of its own."""
    row = ids(1, 3000)
    long, *_ = shared_prefixes([row[: 1000 + place] for place in range(2000)])
    assert long == SharedPrefix(1499, tuple(range(500, 2000)))


def test_rows_are_computed_whole_where_reuse_saves_little() -> None:
    prompt = ids(1, 20)
    assert plan_reuse([np.concatenate([prompt, ids(place, 100)]) for place in range(8)]) is None
    assert plan_reuse([ids(place, 100) for place in range(8)]) is None
    assert plan_reuse([np.concatenate([ids(1, 100), ids(place, 20)]) for place in range(8)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_logits_are_those_of_each_row_alone(tmp_path: Path, kind: str, dtype: Dtype) -> None:
    """Every position's, of every kind of model; 1e-5 in float32, for logits of order 1."""
    model = load_classifier(write_classifier(tmp_path, kind), dtype=dtype)
    logits, rows = PositionLogits.examine(model), candidates()
    assert logits.reuses_prefixes
    plan = plan_reuse(rows)
    assert plan is not None
    assert plan.others == (0, 20)
    found = logits.of(rows)
    room = 1e-5 if dtype == "float32" else BATCH_TOLERANCE[dtype]
    for row, its in zip(rows, found, strict=True):
        [alone] = logits.whole([row])
        assert its.shape == (len(row), 1)
        np.testing.assert_allclose(its, alone, rtol=0, atol=room)


def test_a_prefix_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_classifier(write_classifier(tmp_path, "llama"))
    logits = PositionLogits.examine(model)
    seen: list[tuple[int, ...]] = []
    hidden = prefix_reuse.backbone_hidden

    def counting(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        return hidden(model, ids, **options)

    monkeypatch.setattr(prefix_reuse, "backbone_hidden", counting)
    logits.of([np.concatenate([ids(1, 70), ids(place, 10)]) for place in range(16)])
    assert seen == [(1, 70), (16, 10)]


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}], ids=["dynamic"]
)
def test_models_whose_positions_depend_on_the_batch_reuse_nothing(
    tmp_path: Path, rope: dict[str, Any]
) -> None:
    folder = write_classifier(tmp_path, "llama", rope_parameters=rope)
    assert not PositionLogits.examine(load_classifier(folder)).reuses_prefixes


def test_a_model_that_fails_the_probe_reuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned positions, of which the backbone ignores those that it is told."""
    model = load_classifier(write_classifier(tmp_path, "gpt2"))
    assert PositionLogits.examine(model).reuses_prefixes
    forward = model.transformer.forward

    def ignoring(
        input_ids: Any, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        return forward(
            input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **options
        )

    monkeypatch.setattr(model.transformer, "forward", ignoring)
    assert not PositionLogits.examine(model).reuses_prefixes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral", "gpt2", "modernbert", "bert"])
def test_scores_stay_within_the_published_tolerance(
    tmp_path: Path, kind: str, dtype: Dtype
) -> None:
    """An item alone, beside others in any company, and as one of several candidates."""
    config = RewardConfig.model_validate(
        {"model": write_classifier(tmp_path, kind), "dtype": dtype}
    )
    model = ClassifierModel.load(config.frozen(), config.limits)
    rows = candidates()
    jobs = [ScoreJob(row, len(row)) for row in rows]
    alone = np.array([model.compute([job])[0].score for job in jobs])
    scale = 10 / np.abs(alone).max()  # the tolerance is for scores within +-10
    tolerance = model.facts.batch_tolerance
    assert tolerance == BATCH_TOLERANCE[dtype]
    for order in (range(len(jobs)), np.random.default_rng(0).permutation(len(jobs))[:9]):
        found = np.array([each.score for each in model.compute([jobs[place] for place in order])])
        assert np.abs(found - alone[list(order)]).max() * scale <= tolerance


def test_the_tolerance_of_several_heads_is_that_of_their_sum(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, "llama", labels=("kind", "true"))
    config = RewardConfig.model_validate({"model": folder, "heads": {"kind": 2.0, "true": -1.0}})
    model = ClassifierModel.load(config.frozen(), config.limits, config.heads)
    assert model.facts.batch_tolerance == pytest.approx(3 * BATCH_TOLERANCE["float32"])
