"""Every figure that a run writes, in one place; docs/metrics.md is made of it.

What a figure means is where it is defined, in rollout_figures.py, update_figures.py and
evaluation_figures.py.
"""

from __future__ import annotations

from kleash.ppo.evaluation_figures import EVALUATION, EVALUATION_SAMPLE, SAMPLE
from kleash.ppo.rollout_figures import REWARD_MODEL, ROLLOUT, WHICH_STEP
from kleash.ppo.update_figures import FIRST_MINIBATCH, TIME, UPDATE

STEP = (WHICH_STEP, ROLLOUT, REWARD_MODEL, UPDATE, FIRST_MINIBATCH, TIME)
"""Of a line of metrics.jsonl about a step, in the order of docs/metrics.md."""

__all__ = ["EVALUATION", "EVALUATION_SAMPLE", "SAMPLE", "STEP"]
