"""Learning-rate schedules of all three stages: pure functions of the step, free of state.

Steps are optimizer steps, counted from 0. With n steps and no warm-up the first step has the full
rate and the last one 1/n of it (linear): Ziegler et al. 2019, Stiennon et al. 2020, InstructGPT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

ScheduleKind = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then linear, cosine or no decay over ``num_steps`` optimizer steps.

    Example: Schedule("linear", num_steps=6, warmup_fraction=1/3) has the factors
    1/2, 1, 1, 3/4, 1/2, 1/4.
    """

    kind: ScheduleKind
    num_steps: int
    warmup_fraction: float = 0.0
    """Share of the steps over which the rate rises linearly to its peak."""
    final_fraction: float = 0.0
    """What is left of the peak at the end of the decay; InstructGPT's reward model ends at 0.1."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"a schedule needs at least one step; num_steps is {self.num_steps}.")
        if not (0 <= self.warmup_fraction < 1 and 0 <= self.final_fraction <= 1):
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} must be in [0, 1) and final_fraction "
                f"{self.final_fraction} in [0, 1]."
            )

    @property
    def num_warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return round(self.warmup_fraction * self.num_steps)

    def factor(self, step: int) -> float:
        """Share of the peak rate at ``step``; ``final_fraction`` from ``num_steps`` on."""
        warmup = self.num_warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        if self.kind == "constant":
            return 1.0
        done = min((step - warmup) / max(self.num_steps - warmup, 1), 1.0)
        left = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.final_fraction + (1.0 - self.final_fraction) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use ``learning_rate`` for every parameter group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
