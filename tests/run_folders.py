"""Run folders made of figures that a test chooses, as a trainer would have written them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = {"seed": 0, "total_steps": 40, "kl": {"coefficient": 0.1}, "prompts": "prompts.jsonl"}
WORDS = ("I", " cannot", " help", " with", " that", ".\n", "", "é", "<|end|>")


def write_run(
    path: Path,
    steps: Mapping[str, Sequence[float]],
    *,
    evaluations: Mapping[str, Sequence[float]] | None = None,
    every: int = 1,
    num_samples: int = 0,
    starts: int = 1,
    is_complete: bool = True,
    **config: Any,
) -> Path:
    """A folder whose figures are ``steps``, by key, from step 1 on, and ``evaluations``, from step
    0 on every ``every`` steps; ``config`` are keys that differ from CONFIG."""
    path.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for index in range(max(map(len, steps.values()), default=0)):
        figures = {key: values[index] for key, values in steps.items()}
        rows.append({"step": index + 1, "weights_version": index + 2, "step_s": 0.5, **figures})
    for index in range(max(map(len, (evaluations or {}).values()), default=0)):
        figures = {key: values[index] for key, values in (evaluations or {}).items()}
        rows.append({"step": index * every, **figures})
    rows.sort(key=lambda row: (row["step"], "step_s" not in row))
    _write_lines(path / "metrics.jsonl", rows)
    last = max((row["step"] for row in rows if "step_s" in row), default=0)
    if num_samples:
        samples = [_sample(step, n) for step in range(1, last + 1) for n in range(num_samples)]
        _write_lines(path / "samples.jsonl", samples)
    _write(path / "run.json", {"run_id": path.name, "fence": starts})
    _write(path / "config.json", {**CONFIG, "out": str(path), **config})
    _write(path / "environment.json", [_start(config) for _ in range(starts)])
    if is_complete:
        _write(path / "report.json", {"is_complete": True, "digests": {"policy": "sha256:ab"}})
    return path


def _sample(step: int, number: int) -> dict[str, Any]:
    count = len(WORDS)
    kl = [0.4 - 0.1 * index for index in range(count)]
    return {
        "step": step,
        "policy_digest": f"sha256:{step:064x}",
        "prompt_id": number + 1,
        "prompt": f"<|user|>May I & <b>{number}</b>?<|assistant|>",
        "response": "".join(WORDS[:-1]),
        "prompt_token_ids": [1, 2],
        "response_token_ids": list(range(count)),
        "response_tokens": list(WORDS),
        "finish_reason": "stop",
        "score": 0.75 + number,
        "uncalibrated_score": 0.75 + number,
        "log_probs": [-0.5] * count,
        "kl": kl,
        "rewards": [-0.1 * value for value in kl[:-1]] + [0.75 + number],
        "weights_versions": [[0, count, step]],
        "reward_revision": "sha256:cd",
        "reference_revision": "sha256:ef",
    }


def _start(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "started_at": "2026-01-02T03:04:05+00:00",
        "from_step": 0,
        "seen_step": 0,
        "host": "a-host",
        "command": ["kleash", "ppo"],
        "software": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"cpu": "a processor", "gpus": []},
        "variables": {},
        "seeds": {"seed": config.get("seed", 0)},
        "digests": {"sft_checkpoint": "sha256:12"},
        "lineage": {"lineage_id": "34", "parent": "runs/sft", "reward_model": None},
    }


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
