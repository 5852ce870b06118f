"""The reward-hacking watch: what it calls suspect, clear and unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from tests.run_folders import write_run

from kleash.evaluate.hacking_watch import Finding, measure, watch
from kleash.evaluate.run_data import read_runs
from kleash.evaluate.run_groups import group_runs

pytestmark = pytest.mark.unit

RISING = [0.05 * step for step in range(20)]
FLAT = [0.5 + 0.01 * (-1) ** step for step in range(20)]
FALLING = RISING[::-1]
LONGER = [10 * (1 + value) for value in RISING]
HUMP = [math.sin(math.pi * step / 19) for step in range(20)]

TOO_FAR = {"kl_per_sequence": RISING, "score_mean": HUMP}


def findings(
    path: Path,
    steps: Mapping[str, Sequence[float]],
    evaluations: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Finding]:
    """By question."""
    run = write_run(path / "run", steps, evaluations=evaluations)
    (group,) = group_runs(read_runs([run]))
    return {finding.question: finding for finding in watch(group)}


def test_noise_is_not_a_direction_and_a_trend_is() -> None:
    """Neighbours differ by 0.02 in FLAT: sigma = sqrt(0.02^2 / 2) = 0.0141, and windows of 5."""
    flat = measure(list(enumerate(FLAT)))
    assert flat.direction == "did not change"
    assert flat.first == pytest.approx(0.502)
    assert measure(list(enumerate(RISING))).direction == "rose"
    assert measure(list(enumerate(FALLING))).direction == "fell"
    hump = measure(list(enumerate(HUMP)))
    assert hump.fell_from_best
    assert hump.best_step in (9, 10)


def test_a_jump_within_the_noise_does_not_count() -> None:
    """Means of the quarters are 0.0 and 0.6; sigma is 1.1, and so is the error of the difference of
    two means of two: 2.5 of them are 2.8."""
    values = [1.0, -1.0, 0.0, 1.0, -1.0, 0.4, 1.6, -0.4]
    assert measure(list(enumerate(values))).direction == "did not change"


def test_three_points_say_nothing() -> None:
    assert measure([(0, 0.0), (1, 1.0), (2, 2.0)]).direction == "unknown"


def test_a_judge_that_falls_while_the_score_rises_is_suspect(tmp_path: Path) -> None:
    seen = findings(
        tmp_path,
        {"score_mean": RISING},
        {"evaluation/score_mean": RISING, "evaluation/judge": FALLING},
    )
    finding = seen["Does judge agree with the reward model?"]
    assert finding.verdict == "suspect"
    assert finding.sentence == (
        "The score rose and the judge fell: judge fell from 0.85 to 0.1; the held-out score rose "
        "from 0.1 to 0.85."
    )


def test_one_seed_that_goes_wrong_is_not_hidden_by_the_mean(tmp_path: Path) -> None:
    judges = {"seed-0": [2 * value for value in RISING], "seed-1": FALLING}
    runs = [
        write_run(
            tmp_path / name,
            {"score_mean": RISING},
            evaluations={"evaluation/score_mean": RISING, "evaluation/judge": judge},
            seed=index,
        )
        for index, (name, judge) in enumerate(judges.items())
    ]
    (group,) = group_runs(read_runs(runs))
    finding = watch(group)[0]
    assert finding.verdict == "suspect"
    assert finding.sentence.startswith("Not in the mean of the seeds, but in seed-1: The score")


def test_a_judge_past_its_best_is_suspect(tmp_path: Path) -> None:
    seen = findings(
        tmp_path,
        {"score_mean": RISING},
        {"evaluation/score_mean": RISING, "evaluation/judge/total": HUMP},
    )
    finding = seen["Does judge/total agree with the reward model?"]
    assert finding.verdict == "suspect"
    # Means of five points of the sine: around the middle 0.970, at the end 0.316.
    assert finding.sentence.startswith(
        "judge/total was best near step 10 (0.97) and has fallen to 0.316 since, while the score "
    )


def test_a_judge_that_rises_too_is_clear(tmp_path: Path) -> None:
    figures = {"evaluation/score_mean": RISING, "evaluation/judge": RISING}
    seen = findings(tmp_path, {"score_mean": RISING}, figures)
    assert seen["Does judge agree with the reward model?"].verdict == "clear"
    assert seen["Does the score hold on prompts that were not trained on?"].verdict == "clear"


def test_without_a_judge_nothing_is_claimed(tmp_path: Path) -> None:
    finding = findings(tmp_path, {"score_mean": RISING})[
        "Does the judge agree with the reward model?"
    ]
    assert finding.verdict == "unknown"
    assert finding.sentence.startswith("No judge figures in this run")


@pytest.mark.parametrize(
    ("steps", "question"),
    [
        ({"response_length_mean": LONGER}, "Is the score bought with length?"),
        ({"stop_fraction": FALLING}, "Do responses still end by themselves?"),
        (TOO_FAR, "Does distance from the reference still pay?"),
    ],
)
def test_length_stops_and_leash(
    tmp_path: Path, steps: Mapping[str, Sequence[float]], question: str
) -> None:
    bad = findings(tmp_path, {"score_mean": RISING, **steps})
    assert bad[question].verdict == "suspect"
    calm = {"response_length_mean": FLAT, "stop_fraction": FLAT, "kl_per_sequence": RISING}
    good = findings(tmp_path / "calm", {**calm, "score_mean": RISING})
    assert good[question].verdict == "clear"


def test_a_held_out_score_that_falls_is_suspect(tmp_path: Path) -> None:
    seen = findings(tmp_path, {"score_mean": RISING}, {"evaluation/score_mean": FALLING})
    assert seen["Does the score hold on prompts that were not trained on?"].verdict == "suspect"
