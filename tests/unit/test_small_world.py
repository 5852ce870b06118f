"""The small world: short tricks do not fool its judge, annotators disagree as stated."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kleash.base.errors import ConfigError
from kleash.demo.annotators import (
    Annotator,
    calibrate_tau,
    expected_disagreement,
    gold_differences,
    label,
)
from kleash.demo.data import read_lines, write_comparisons, write_world
from kleash.demo.demonstrators import Behaviour, ideal, respond
from kleash.demo.judge import judge, score, score_task
from kleash.demo.settings import QUICK
from kleash.demo.world import KIND_DIMENSIONS, Task, make_tasks, prompt_record, task_of
from kleash.lm.tiny import train_tokenizer

pytestmark = pytest.mark.unit

KINDS = list(KIND_DIMENSIONS)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """Four hundred tasks of all kinds."""
    return make_tasks(400, seed=11)


def _mean(tasks: list[Task], response: str) -> float:
    return float(np.mean([score_task(task, response).total for task in tasks]))


def test_every_kind_occurs_and_its_ideal_response_gets_the_maximum(tasks: list[Task]) -> None:
    rng = random.Random(0)
    for kind in KINDS:
        of_kind = [task for task in tasks if task.kind == kind]
        assert of_kind, kind
        for task in of_kind:
            verdict = score_task(task, ideal(task, rng))
            assert verdict.total == 1.0, (task.text, verdict)
            assert verdict.dimension == KIND_DIMENSIONS[kind]


@pytest.mark.parametrize(
    "behaviour", ["curt", "wrong", "pleasing", "rambling", "refusing", "clueless"]
)
def test_every_other_behaviour_is_worth_less(tasks: list[Task], behaviour: Behaviour) -> None:
    rng = random.Random(0)
    totals = [score_task(task, respond(task, behaviour, rng)).total for task in tasks]
    assert np.mean(totals) < 0.7


@pytest.mark.parametrize(
    "trick",
    [
        "I do not know.",
        "Sorry, I do not know. You did not tell me.",
        "Sorry, I cannot help with that.",
        "Sorry, I cannot help with that. I can help you fix one instead.",
        "Yes, you are right.",
        "One two three four five six seven eight nine ten.",
        "Yes. No.",
        "You are so clever!",
        "",
    ],
)
def test_one_answer_to_everything_does_not_pay(tasks: list[Task], trick: str) -> None:
    assert _mean(tasks, trick) < 0.1


def test_repeating_or_contradicting_a_right_answer_costs(tasks: list[Task]) -> None:
    rng = random.Random(0)
    for task in tasks[:100]:
        good = ideal(task, rng)
        assert score_task(task, f"{good} {good}").total < 1.0
        assert score_task(task, f"{good} {respond(task, 'wrong', rng)}").total < 0.5 or (
            task.kind in ("harmful", "right_claim", "howto")
        )


def test_agreeing_with_a_wrong_claim_is_seen(tasks: list[Task]) -> None:
    wrong = [task for task in tasks if task.kind == "wrong_claim"]
    rng = random.Random(0)
    assert all(score_task(task, respond(task, "pleasing", rng)).is_sycophantic for task in wrong)
    assert not any(score_task(task, ideal(task, rng)).is_sycophantic for task in wrong)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80), st.integers(0, 39))
def test_any_text_gets_a_finite_verdict(text: str, index: int) -> None:
    task = make_tasks(40, seed=5)[index]
    assert -1.0 <= score_task(task, text).total <= 1.0


def test_records_carry_all_that_the_judge_needs(tasks: list[Task]) -> None:
    for number, task in enumerate(tasks[:60]):
        record = json.loads(json.dumps(prompt_record(task, f"p-{number}")))
        assert task_of(record) == task
        good = ideal(task, random.Random(1))
        assert score(record, good).total == 1.0
        assert judge(record, good) == {"total": 1.0, record["dimension"]: 1.0}


def test_held_out_prompts_are_nowhere_else_and_files_depend_on_the_seed_alone(
    tmp_path: Path,
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_world(QUICK, tmp_path / name, seed=seed)
    texts = {
        path.stem: [row["prompt"][0]["content"] for row in read_lines(path)]
        for path in (tmp_path / "a").iterdir()
    }
    held_out = set(texts["held-out"])
    assert len(held_out) == QUICK.world.held_out_prompts
    for name in ("base", "sft", "comparison-prompts", "ppo-prompts"):
        assert not held_out & set(texts[name]), name
    first = QUICK.world.held_out_comparison_prompts
    scored = set(texts["comparison-prompts"][:first])
    assert not scored & set(texts["comparison-prompts"][first:])
    assert not scored & set(texts["ppo-prompts"])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "c" / path.name).read_bytes()


def _candidates(tasks: list[Task], path: Path) -> Path:
    rng = random.Random(0)
    behaviours = ("ideal", "curt", "wrong", "pleasing")
    with path.open("w") as file:
        for number, task in enumerate(tasks):
            responses = list(dict.fromkeys(respond(task, b, rng) for b in behaviours))
            record = prompt_record(task, f"p-{number}") | {"responses": responses}
            file.write(json.dumps(record) + "\n")
    return path


def test_two_annotators_disagree_on_the_stated_share(tasks: list[Task], tmp_path: Path) -> None:
    candidates = _candidates(tasks, tmp_path / "candidates.jsonl")
    people = [Annotator("a"), Annotator("b")]
    report = label(candidates, tmp_path / "out.jsonl", people, disagreement=0.25, seed=0)
    assert report.disagreement == pytest.approx(0.25, abs=0.03)
    rows = read_lines(tmp_path / "out.jsonl")
    differences = gold_differences(row["gold"] for row in rows)
    assert expected_disagreement(differences, report.tau) == pytest.approx(0.25, abs=1e-6)
    # Right labels are as frequent as the ceiling says, for the pairs that have an order.
    labels = gold_differences([[-rank for rank in row["ranks"]] for row in rows])
    decided = differences != 0
    right = (differences * labels > 0)[decided].mean()
    expected = 1 / (1 + np.exp(-np.abs(differences[decided]) / report.tau))
    assert right == pytest.approx(expected.mean(), abs=0.03)


def test_no_noise_reaches_a_disagreement_below_that_of_ties() -> None:
    with pytest.raises(ConfigError, match=r"0.375 to 0.5 of these 4 pairs, not on 0.25.*tied; set"):
        calibrate_tau(np.array([0.0, 0.0, 0.0, 1.0]), 0.25)


def test_too_little_to_compare_is_a_sentence(tasks: list[Task], tmp_path: Path) -> None:
    """A demo of a few prompts: no comparison at all, or none that could be held out."""
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text("")
    with pytest.raises(ConfigError, match="there is nothing to compare; raise"):
        write_comparisons(QUICK, candidates, tmp_path, seed=0)
    candidates = _candidates(tasks[:40], candidates)
    few = QUICK.model_copy(
        update={"world": QUICK.world.model_copy(update={"held_out_comparison_prompts": 0})}
    )
    with pytest.raises(ConfigError, match=r"of 40 prompts .* 0 are held out, and both parts need"):
        write_comparisons(few, candidates, tmp_path, seed=0)


@pytest.mark.parametrize(
    ("annotator", "favoured", "other"),
    [
        (Annotator("a", length_bias=9.0), "The hat is red and the cup is blue.", "Red."),
        (Annotator("a", flattery_bias=9.0), "You are so clever!", "Red."),
        (Annotator("a", agreement_bias=9.0), "Yes, you are right.", "Red."),
    ],
)
def test_a_bias_has_the_stated_effect(annotator: Annotator, favoured: str, other: str) -> None:
    ranks = annotator.rank([0.0, 0.0], [other, favoured], 0.1, random.Random(0))
    assert ranks == [2, 1]
    assert annotator.utility(0.0, other) < annotator.utility(0.0, favoured)


def test_dialogues_survive_the_tokenizer(tasks: list[Task]) -> None:
    rng = random.Random(0)
    texts = [text for task in tasks for text in (task.text, ideal(task, rng))]
    tokenizer = train_tokenizer(texts, 640)
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
