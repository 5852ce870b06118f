"""Held-out prompts answered by the policy service with a fixed seed; training stays as it was."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleash.base import tracing
from kleash.base.errors import ConfigError
from kleash.data.prompts import PromptRecord, load_prompts
from kleash.ppo.config import PPOConfig
from kleash.ppo.randomness import sampling_seed
from kleash.ppo.rollout import Collector, Sample
from kleash.ppo.run_folder import write_whole
from kleash.ppo.telemetry import export_evaluation

Judge = Callable[[PromptRecord, str], float | Mapping[str, float]]
"""Scores a response by something else than the reward model."""


@dataclass(frozen=True, eq=False)
class Evaluator:
    """The held-out prompts and how their responses are judged."""

    prompts: Sequence[PromptRecord]
    tokenizer: Any
    seed: int
    judge: Judge | None = None

    @tracing.measured("evaluation")
    def evaluate(
        self, collector: Collector, *, step: int, weights_version: int, folder: Path
    ) -> dict[str, float]:
        """Answer every prompt, keep the samples in ``folder``, return the figures."""
        # Step 0 of the sampling seeds belongs to evaluation: the same random numbers every time.
        seed = sampling_seed(self.seed, 0)
        rollout = collector.collect(
            self.prompts, seed=seed, weights_version=weights_version, begins_step=False
        )
        rows = [self._describe(sample) for sample in rollout.samples]
        folder.mkdir(exist_ok=True)
        write_whole(
            folder / f"step-{step:06d}.jsonl",
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        )
        figures = {
            "evaluation/score_mean": _mean([row["score"] for row in rows]),
            "evaluation/kl_per_sequence": _mean([row["kl"] for row in rows]),
            "evaluation/response_length_mean": _mean([row["response_length"] for row in rows]),
            "evaluation/stop_fraction": _mean([float(row["is_stopped"]) for row in rows]),
        }
        # A judge may give other figures for other prompts: each is averaged where it was given.
        for name in dict.fromkeys(name for row in rows for name in row["judge"]):
            key = f"evaluation/judge/{name}" if name else "evaluation/judge"
            figures[key] = _mean([row["judge"][name] for row in rows if name in row["judge"]])
        export_evaluation(figures)
        return figures

    def _describe(self, sample: Sample) -> dict[str, Any]:
        response = self.tokenizer.decode(
            sample.sequence.ids[sample.sequence.response_start :].tolist(), skip_special_tokens=True
        )
        return {
            "prompt_id": sample.record.prompt_id,
            "prompt": sample.record.text,
            "response": response,
            "score": sample.score,
            "kl": float(
                (sample.behaviour_log_probs.astype(float) - sample.reference_log_probs).sum()
            ),
            "response_length": sample.sequence.response_length,
            "is_stopped": sample.is_stopped,
            "judge": self._judge(sample.record, response),
            "weights_version": sample.weights_version,
            "reward_revision": sample.reward_revision,
            "reference_revision": sample.reference_revision,
        }

    def _judge(self, record: PromptRecord, response: str) -> dict[str, float]:
        """Figures by name; a judge that returns one number gives it the empty name."""
        if self.judge is None:
            return {}
        verdict = self.judge(record, response)
        figures = dict(verdict) if isinstance(verdict, Mapping) else {"": float(verdict)}
        if not all(math.isfinite(value) for value in figures.values()):
            raise ConfigError(
                f"the judge gave {figures} to the response to prompt {record.prompt_id!r}; it must "
                "give finite numbers."
            )
        return figures


def make_evaluator(config: PPOConfig, tokenizer: Any) -> Evaluator | None:
    """The evaluations that the run wants, if any. Raises UserError for unusable prompts."""
    if config.evaluation.prompts is None:
        return None
    prompts = load_prompts(
        config.evaluation.prompts,
        tokenizer,
        max_tokens=config.max_prompt_tokens,
        skip_bad=config.skip_bad,
    )
    judge = load_judge(config.evaluation.judge) if config.evaluation.judge else None
    return Evaluator(prompts[: config.evaluation.num_prompts], tokenizer, config.seed, judge)


def load_judge(name: str) -> Judge:
    """Import ``module:function``."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"evaluation.judge is {name!r}, which cannot be imported: {error}."
        ) from None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
