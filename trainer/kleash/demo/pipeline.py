"""``kleash demo``: the three stages on the small world, from nothing to a report.

    world ─► base model ─► SFT ─► candidates ─► annotators ─► reward model ─► PPO ─► evaluation

Every stage is the one that users call, on files in the formats that users bring. PPO runs as
``kleash up`` does: three services and the trainer as processes of their own, over gRPC.

The result of every stage appears under its name when it is complete, and stays: a demo that was cut
off goes on with the next stage, and whoever waits for a model never sees half of one.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kleash.base.durable import write_whole
from kleash.base.errors import KleashError
from kleash.base.progress import Progress
from kleash.demo.config import DemoConfig
from kleash.demo.folder import RESULTS, DemoFolder, demo_folder

logger = logging.getLogger(__name__)


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

    def run(self) -> dict[str, Any] | None:
        """Every stage that is not done yet, in turn.

        Returns the content of report.json, or None after ``config.until``. Raises ConfigError when
        ``config.out`` holds something that cannot be resumed.
        """
        with demo_folder(self.config) as folder:
            self.wall_seconds = folder.wall_seconds
            for name, result in RESULTS.items():
                if (self.out / result).exists():
                    logger.info("demo: %s is complete already", name.replace("_", " "))
                else:
                    with self._timed(name, folder):
                        getattr(self, name)()
                if name == self.config.until:
                    return None
            report = self.out / "report.json"
            return json.loads(report.read_text()) if report.exists() else self._report(folder)

    def _report(self, folder: DemoFolder) -> dict[str, Any]:
        from kleash.demo.results import evaluate, write_report

        with self._timed("evaluation", folder):
            evaluation = evaluate(self)
        self.wall_seconds["total"] = round(sum(self.wall_seconds.values()), 1)
        return write_report(self, evaluation)

    def world(self) -> None:
        """Write the data files."""
        from kleash.demo.data import write_world

        partial = self.out / ".data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_world(self.settings, partial, seed=self.config.seed)
        partial.rename(self.data)

    def base(self) -> None:
        """Train the tokenizer and the base model."""
        from kleash.demo.base import train_base

        shutil.rmtree(self.out / "base-untrained", ignore_errors=True)
        train_base(
            self.settings,
            self.data / "base.jsonl",
            self.out / "base",
            seed=self.config.seed,
            num_threads=self.config.num_threads,
            progress=self.progress,
        )

    def sft(self) -> None:
        """Stage 1."""
        from kleash.sft.config import SFTConfig
        from kleash.sft.train import train

        sft = self.settings.sft
        train(
            SFTConfig(
                model=self.out / "base",
                data=str(self.data / "sft.jsonl"),
                out=self.out / "sft",
                run_id=self.config.run_id,
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
        write_whole(self.out / RESULTS["comparisons"], json.dumps(figures, indent=2) + "\n")

    def reward_model(self) -> None:
        """Stage 2."""
        from kleash.reward_model.config import RewardModelConfig
        from kleash.reward_model.train import train

        sizes = self.settings.reward_model
        train(
            RewardModelConfig(
                model=self.out / "sft",
                data=str(self.data / "comparisons.jsonl"),
                out=self.out / "reward-model",
                run_id=self.config.run_id,
                evaluation_data=str(self.data / "held-out-comparisons.jsonl"),
                learning_rate=sizes.learning_rate,
                batch_size=sizes.batch_size,
                seed=self.config.seed,
                num_threads=self.config.num_threads,
            ),
            self.progress,
        )

    def ppo(self) -> None:
        """Stage 3, as ``kleash up``."""
        from kleash.up.run import run

        status = run(self._up_config(), self.progress)
        if status != 0:
            raise DemoError(f"PPO ended with status {status}; see {self.out / 'ppo' / 'logs'}.")

    def _up_config(self) -> Any:
        from kleash.up.config import UpConfig

        ppo, threads = self.settings.ppo, self.config.num_threads
        policy = {"max_running_sequences": max(ppo.batch_size, 1)}
        return UpConfig.model_validate(
            {
                "ppo": {
                    "out": self.out / "ppo",
                    "run_id": self.config.run_id,
                    "resume": True,
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
    def _timed(self, name: str, folder: DemoFolder) -> Iterator[None]:
        started = time.monotonic()
        logger.info("demo: %s", name.replace("_", " "))
        yield
        self.progress.finish()
        self.wall_seconds[name] = round(time.monotonic() - started, 1)
        folder.save()
