"""Grouping of runs and statistics over seeds, by numbers worked out by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from tests.run_folders import write_run

from kleash.base.config import describe_config
from kleash.evaluate.band_chart import MINUS, Axis, nice_step, number
from kleash.evaluate.run_data import read_runs
from kleash.evaluate.run_groups import (
    UNRELATED,
    Point,
    band,
    differing_keys,
    final_figure,
    group_runs,
    spread,
    thinned,
)
from kleash.ppo.config import PPOConfig

pytestmark = pytest.mark.unit


def test_band_is_of_the_runs_that_have_the_step() -> None:
    assert band([{1: 1.0, 2: 2.0}, {1: 3.0}, {1: 8.0, 3: 5.0}]) == [
        Point(1, 4.0, 1.0, 8.0),
        Point(2, 2.0, 2.0, 2.0),
        Point(3, 5.0, 5.0, 5.0),
    ]


def test_band_leaves_out_what_is_not_finite() -> None:
    assert band([{1: math.nan, 2: math.inf}, {1: 3.0}]) == [Point(1, 3.0, 3.0, 3.0)]
    assert band([{}]) == []


def test_spread_of_seeds() -> None:
    """(1 - 3)^2 + (2 - 3)^2 + (6 - 3)^2 = 14, over n - 1 = 2."""
    assert spread([1.0, 2.0, 6.0, None]) == (3.0, math.sqrt(7), 1.0, 6.0, 3)
    assert spread([2.0]) == (2.0, None, 2.0, 2.0, 1)
    assert spread([None]) is None


def test_final_figure_is_the_mean_of_the_last_tenth() -> None:
    assert final_figure({step: float(step) for step in range(1, 21)}) == 19.5
    assert final_figure({1: 4.0, 2: 6.0}) == 6.0
    assert final_figure({1: 4.0, 2: math.nan}) == 4.0
    assert final_figure({}) is None


def test_neighbours_are_thinned_to_their_mean_and_their_whole_range() -> None:
    points = [Point(step, 10.0 * step, step, 20.0 * step) for step in range(1, 6)]
    assert thinned(points, 5) == points
    assert thinned(points, 3) == [
        Point(1.5, 15.0, 1, 40.0),
        Point(3.5, 35.0, 3, 80.0),
        Point(5.0, 50.0, 5, 100.0),
    ]


def test_runs_that_differ_in_seed_and_place_alone_are_a_group(tmp_path: Path) -> None:
    figures = {"score_mean": [0.0, 1.0]}
    write_run(tmp_path / "b1", figures, seed=1, server={"port": 5}, run_id="x")
    write_run(tmp_path / "b0", figures, seed=0, num_threads=3)
    write_run(tmp_path / "loose", figures, seed=0, kl={"coefficient": 0.01})
    runs = read_runs([tmp_path / name for name in ("b1", "loose", "b0")])
    groups = group_runs(runs)
    assert [[run.name for run in group.runs] for group in groups] == [["b0", "b1"], ["loose"]]
    assert [group.label for group in groups] == ["kl.coefficient=0.1", "kl.coefficient=0.01"]
    assert groups[0].seeds == [0, 1]
    assert differing_keys([groups[0].runs[0], groups[1].runs[0]]) == {"kl.coefficient": [0.1, 0.01]}


def test_keys_that_are_left_out_exist() -> None:
    keys = {key for key, *_ in describe_config(PPOConfig)}
    known = keys | {key[: place.start()] for key in keys for place in re.finditer(r"\.", key)}
    assert [name for name in UNRELATED if name not in known] == []


def test_one_group_is_called_by_its_run_or_its_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"r{seed}", {"score_mean": [0.0]}, seed=seed)
    runs = read_runs([tmp_path / "r0", tmp_path / "r1"])
    assert [group.label for group in group_runs(runs)] == ["2 seeds"]
    assert [group.label for group in group_runs(runs[:1])] == ["r0"]


@pytest.mark.parametrize(
    ("size", "step"), [(0.13, 0.2), (1.0, 1.0), (1.1, 2.0), (4.0, 5.0), (51.0, 100.0), (2e-9, 2e-9)]
)
def test_steps_between_ticks_are_round(size: float, step: float) -> None:
    assert nice_step(size) == pytest.approx(step)


def test_ticks_lie_in_the_range() -> None:
    assert Axis(-0.3, 1.1, 0, 100).ticks() == [0.0, 0.5, 1.0]
    assert Axis(1, 40, 0, 100).ticks() == [10.0, 20.0, 30.0, 40.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.0, "3"),
        (-0.5, f"{MINUS}0.5"),
        (0.123456, "0.1235"),
        (-2.98e-8, f"{MINUS}2.98e{MINUS}8"),
        (1e6, "1e6"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
