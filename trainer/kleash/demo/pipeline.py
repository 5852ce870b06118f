"""``kleash demo``: the three stages on the small world, from nothing to a report.

    world ─► base model ─► SFT ─► candidates ─► annotators ─► reward model ─► PPO ─► evaluation

Every stage is the one that users call, on files in the formats that users bring. PPO runs as
``kleash up`` does: three services and the trainer as processes of their own, over gRPC.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pydantic

from kleash.base.config import Config
from kleash.base.errors import KleashError
from kleash.base.progress import Progress
from kleash.demo.settings import QUICK, DemoSettings

logger = logging.getLogger(__name__)


class DemoConfig(Config):
    """The demo."""

    out: Path = Path("runs/demo")
    """Folder for everything; an earlier run there is moved aside."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Decides the world, the models' first weights and every draw."""
    quick: bool = False
    """Far smaller everything: shows that it works within a minute, with poor results."""
    num_threads: int = pydantic.Field(default=1, ge=0)
    """Threads of each process; 0 leaves torch's own choice. With 1 the results do not depend on the
    number of cores; the longest stage runs four processes side by side in any case."""
    settings: DemoSettings | None = None
    """Sizes and hyper-parameters in place of the built-in ones."""

    @property
    def chosen_settings(self) -> DemoSettings:
        """What is computed."""
        return self.settings or (QUICK if self.quick else DemoSettings())


class DemoError(KleashError):
    """A stage of the demo failed."""


class Demo:
    """One run of the demo; each method is a stage that reads and writes files in ``config.out``."""

    def __init__(self, config: DemoConfig, progress: Progress) -> None:
        self.config = config
        self.settings = config.chosen_settings
        self.progress = progress
        self.out = config.out
        self.data = config.out / "data"
        self.wall_seconds: dict[str, float] = {}
        self.stages: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """Every stage in turn; returns the content of report.json."""
        started = time.monotonic()
        _move_aside(self.out)
        self.out.mkdir(parents=True)
        for stage in (
            self.world,
            self.base,
            self.sft,
            self.candidates,
            self.comparisons,
            self.reward_model,
            self.ppo,
        ):
            with self._timed(stage.__name__):
                stage()
        from kleash.demo.results import evaluate, write_report

        with self._timed("evaluation"):
            evaluation = evaluate(self)
        self.wall_seconds["total"] = round(time.monotonic() - started, 1)
        return write_report(self, evaluation)

    def world(self) -> None:
        """Write the data files."""
        from kleash.demo.data import write_world

        write_world(self.settings, self.data, seed=self.config.seed)

    def base(self) -> None:
        """Train the tokenizer and the base model."""
        from kleash.demo.base import train_base

        report = train_base(
            self.settings,
            self.data / "base.jsonl",
            self.out / "base",
            seed=self.config.seed,
            num_threads=self.config.num_threads,
            progress=self.progress,
        )
        self.stages["base"] = {"loss": report.loss_last, "steps": report.steps}

    def sft(self) -> None:
        """Stage 1."""
        from kleash.sft.config import SFTConfig
        from kleash.sft.train import train

        sft = self.settings.sft
        report = train(
            SFTConfig(
                model=self.out / "base",
                data=str(self.data / "sft.jsonl"),
                out=self.out / "sft",
                learning_rate=sft.learning_rate,
                batch_size=sft.batch_size,
                epochs=sft.epochs,
                loss_on_prompt=sft.loss_on_prompt,
                evaluation_fraction=0.05,
                seed=self.config.seed,
                num_threads=self.config.num_threads,
            ),
            self.progress,
        )
        self.stages["sft"] = {
            "loss": report.loss_last,
            "loss_first": report.loss_first,
            "steps": report.steps,
            "evaluation_loss": report.evaluation_loss,
        }

    def candidates(self) -> None:
        """Several responses to each comparison prompt."""
        from kleash.reward_model.candidates import CandidatesConfig, run

        run(
            CandidatesConfig(
                model=self.out / "sft",
                data=str(self.data / "comparison-prompts.jsonl"),
                out=self.data / "candidates.jsonl",
                num_responses=self.settings.reward_model.num_responses,
                max_new_tokens=self.settings.max_new_tokens,
                max_slots=128,
                seed=self.config.seed,
                num_threads=self.config.num_threads,
            ),
            self.progress,
        )

    def comparisons(self) -> None:
        """Annotators rank them."""
        from kleash.demo.data import write_comparisons

        figures = write_comparisons(
            self.settings, self.data / "candidates.jsonl", self.data, seed=self.config.seed
        )
        self.stages["comparisons"] = figures

    def reward_model(self) -> None:
        """Stage 2."""
        from kleash.reward_model.config import RewardModelConfig
        from kleash.reward_model.train import train

        sizes = self.settings.reward_model
        report = train(
            RewardModelConfig(
                model=self.out / "sft",
                data=str(self.data / "comparisons.jsonl"),
                out=self.out / "reward-model",
                evaluation_data=str(self.data / "held-out-comparisons.jsonl"),
                learning_rate=sizes.learning_rate,
                batch_size=sizes.batch_size,
                seed=self.config.seed,
                num_threads=self.config.num_threads,
            ),
            self.progress,
        )
        assert report.held_out is not None
        held_out = asdict(report.held_out)
        self.stages["reward_model"] = {
            "accuracy": held_out.pop("accuracy"),
            "accuracy_ci95": list(held_out.pop("accuracy_ci95")),
            "label_noise_ceiling": self.stages["comparisons"]["label_noise_ceiling"],
            "annotator_disagreement": self.stages["comparisons"]["annotator_disagreement"],
            **{
                key: held_out[key]
                for key in (
                    "loss",
                    "mean_margin",
                    "expected_calibration_error",
                    "calibration",
                    "score_length_correlation",
                    "num_pairs",
                )
            },
        }

    def ppo(self) -> None:
        """Stage 3, as ``kleash up``."""
        from kleash.up.run import run

        status = run(self._up_config(), self.progress)
        if status != 0:
            raise DemoError(f"PPO ended with status {status}; see {self.out / 'ppo' / 'logs'}.")
        report = json.loads((self.out / "ppo" / "report.json").read_text(encoding="utf-8"))
        keys = (
            "steps",
            "kl_per_sequence_nats",
            "reward_mean_first",
            "reward_mean_last",
            "score_mean_first",
            "score_mean_last",
            "step_s_mean",
            "samples_per_s_mean",
        )
        self.stages["ppo"] = {key: report[key] for key in keys}

    def _up_config(self) -> Any:
        from kleash.up.config import UpConfig

        ppo, threads = self.settings.ppo, self.config.num_threads
        policy = {"max_running_sequences": max(ppo.batch_size, 1)}
        return UpConfig.model_validate(
            {
                "ppo": {
                    "out": self.out / "ppo",
                    "prompts": str(self.data / "ppo-prompts.jsonl"),
                    "model": self.out / "sft",
                    "reward_model": self.out / "reward-model",
                    "seed": self.config.seed,
                    "total_steps": ppo.total_steps,
                    "batch_size": ppo.batch_size,
                    "max_prompt_tokens": self.settings.model.max_positions
                    - self.settings.max_new_tokens,
                    "sampling": {"max_new_tokens": self.settings.max_new_tokens},
                    "algorithm": {"epochs": ppo.epochs, "minibatches": ppo.minibatches},
                    "kl": {"coefficient": ppo.kl_coefficient},
                    "policy": {"learning_rate": ppo.learning_rate},
                    "value": {"learning_rate": ppo.value_learning_rate},
                    "evaluation": {
                        "prompts": str(self.data / "held-out.jsonl"),
                        "every": ppo.evaluation_every,
                        "num_prompts": ppo.evaluation_prompts,
                        "judge": "kleash.demo.judge:judge",
                    },
                    "num_threads": threads,
                },
                "policy": policy,
                "reward": {"limits": {"max_batch_tokens": 4096}},
                "reference": {"limits": {"max_batch_tokens": 4096}},
                "service_threads": threads,
            }
        )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        logger.info("demo: %s", name.replace("_", " "))
        yield
        self.progress.finish()
        self.wall_seconds[name] = round(time.monotonic() - started, 1)


def _move_aside(out: Path) -> None:
    """Keep an earlier run under the first free name OUT-N."""
    if not out.exists():
        return
    number = 1
    while (aside := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    out.rename(aside)
    logger.info("the earlier run is now %s", aside)
