"""Responses of samples.jsonl that the report shows, with the figures of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kleash.evaluate.run_data import RunData

MOST_STEPS = 6
"""Of a run from which responses are shown: the first, the last and some in between."""
MOST_TOKENS = 30_000
"""Of all responses together: the page stays below 2 MB."""
SCALE_QUANTILE = 0.98
"""Values beyond it have the full colour."""


def choose_samples(runs: Sequence[RunData], num_samples: int) -> dict[str, Any]:
    """``num_samples`` of each run, from steps spread over it; the first ones of a step, as they
    were kept: none is chosen for its score."""
    shown: list[dict[str, Any]] = []
    num_tokens = 0
    for index, run in enumerate(runs):
        steps = _spread_out(sorted({row["step"] for row in run.samples}))
        for position, step in enumerate(steps):
            of_step = [row for row in run.samples if row["step"] == step]
            # The remainder of a division goes to the last steps, which are read first.
            share = (num_samples + position) // len(steps)
            for row in of_step[:share]:
                num_tokens += len(row["response_token_ids"])
                if num_tokens <= MOST_TOKENS:
                    shown.append(_describe(row, index))
    return {
        "runs": [run.name for run in runs],
        "rows": shown,
        "num_kept": sum(len(run.samples) for run in runs),
        "scales": {key: _scale(shown, key) for key in ("rewards", "kl")},
    }


def _describe(row: dict[str, Any], run: int) -> dict[str, Any]:
    ids = row["response_token_ids"]
    return {
        "run": run,
        "step": row["step"],
        "prompt_id": str(row["prompt_id"]),
        "prompt": row["prompt"],
        # Runs before tokens had texts have their numbers.
        "tokens": row.get("response_tokens") or [f"⟨{number}⟩" for number in ids],
        "score": row["score"],
        "finish": row["finish_reason"],
        "rewards": row["rewards"],
        "kl": row["kl"],
        "log_probs": row["log_probs"],
        "versions": row["weights_versions"],
    }


def _spread_out(steps: Sequence[int]) -> list[int]:
    if len(steps) <= MOST_STEPS:
        return list(steps)
    last = MOST_STEPS - 1
    return [steps[round(index * (len(steps) - 1) / last)] for index in range(MOST_STEPS)]


def _scale(rows: Sequence[dict[str, Any]], key: str) -> float:
    """The absolute value that has the full colour; 1 where there is none."""
    values = sorted(abs(value) for row in rows for value in row[key])
    if not values or not values[-1]:
        return 1.0
    return values[min(int(SCALE_QUANTILE * len(values)), len(values) - 1)] or values[-1]
