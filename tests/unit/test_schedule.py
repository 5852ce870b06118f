"""Learning-rate schedules and the optimizer of all stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kleash.lm.optimizer import adamw
from kleash.lm.schedule import Schedule, set_learning_rate

pytestmark = pytest.mark.unit


def test_schedules() -> None:
    def factors(schedule: Schedule) -> list[float]:
        return [schedule.factor(step) for step in range(schedule.num_steps)]

    assert factors(Schedule("constant", 3)) == [1, 1, 1]
    assert factors(Schedule("linear", 4)) == [1, 0.75, 0.5, 0.25]
    assert factors(Schedule("linear", 6, 1 / 3)) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert factors(Schedule("cosine", 4)) == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert factors(Schedule("linear", 2, final_fraction=0.1)) == [1, pytest.approx(0.55)]
    assert factors(Schedule("constant", 4, 0.5)) == [0.5, 1, 1, 1]
    assert Schedule("cosine", 4, final_fraction=0.1).factor(4) == pytest.approx(0.1)
    assert Schedule("linear", 4).factor(9) == 0
    assert factors(Schedule("linear", 1, 0.9)) == [1]


@pytest.mark.parametrize(
    "wrong", [{"num_steps": 0}, {"warmup_fraction": 1.0}, {"final_fraction": 2}]
)
def test_impossible_schedules(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Schedule(**{"kind": "linear", "num_steps": 3, **wrong})


def test_weight_decay_is_for_matrices_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = adamw(model, learning_rate=0.1, weight_decay=0.01)
    set_learning_rate(optimizer, 0.5)
    decays = {
        parameter: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected = {p: 0.01 if p.dim() == 2 else 0.0 for p in model.parameters()}
    assert decays == expected
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert optimizer.defaults["eps"] == 1e-5
