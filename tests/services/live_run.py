"""A run without models: a real Control and service, whose steps end when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.services.doubler import free_port

from kleash.ppo.control import Control, RunState, SavedCheckpoint, Snapshot
from kleash.ppo.service import TrainerService
from kleash.rpc.server import BackgroundServer, ServerConfig

PHASES = ("generate", "score", "old_log_probs", "update", "publish")


def figures_of(step: int, **more: float) -> dict[str, float]:
    """A line of metrics.jsonl."""
    return {
        "step": step,
        "weights_version": step,
        "step_s": 1.5,
        "score_mean": step / 4,
        "score_std": 0.5,
        "kl_per_sequence": step / 8,
        "reward_mean": step / 5,
        "entropy": 2.0,
        "clip_fraction": 0.1,
        "response_length_mean": 8.0,
        "kl_coefficient": 0.05,
        **{f"time_{phase}_s": 0.3 for phase in PHASES},
        **more,
    }


def sample_of(step: int, tokens: tuple[str, ...] = ("3 plus", " 4", " is 7")) -> dict[str, Any]:
    """A line of samples.jsonl, as far as the live view reads it."""
    return {
        "step": step,
        "prompt_id": "p1",
        "prompt": "What is 3 plus 4?",
        "response": "".join(tokens),
        "response_tokens": list(tokens),
        "kl": [0.5, -0.25, 0.125],
        "rewards": [-0.025, 0.0125, 1.0],
        "score": 1.0,
        "finish_reason": "stop",
    }


class LiveRun:
    """``advance`` lets steps end; the loop obeys Control as the trainer's does."""

    def __init__(self, *, step: int = 3, total_steps: int = 1000, run_id: str = "a-run") -> None:
        self.control = Control()
        self.step = step
        self._total_steps = total_steps
        self._permits = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.control.begin(
            Snapshot(
                run_id=run_id,
                step=step,
                total_steps=total_steps,
                weights_version=step,
                config_json='{"model": "runs/sft", "batch_size": 4, "kl": '
                '{"controller": "fixed", "coefficient": 0.05, "target": null}}',
            ),
            [figures_of(each) for each in range(1, step + 1)],
        )
        self.control.samples_kept([sample_of(step)])
        self._thread.start()

    def advance(self, num_steps: int = 1) -> None:
        """That many more steps end, unless the run is told otherwise."""
        self._permits.release(num_steps)

    def end(self) -> None:
        """The run is stopped, at once."""
        self.control.stop()
        self.advance()
        self._thread.join()

    def _save(self) -> SavedCheckpoint:
        self.control.checkpoint_saved(self.step)
        return SavedCheckpoint(Path(f"/runs/a/checkpoints/step-{self.step:06d}"), self.step)

    def _loop(self) -> None:
        while self.step < self._total_steps and self.control.may_continue(self._save):
            self._permits.acquire()
            self.step += 1
            self.control.samples_kept([sample_of(self.step)])
            self.control.step_done(figures_of(self.step))
        is_complete = self.step == self._total_steps
        self.control.end(RunState.COMPLETED if is_complete else RunState.STOPPING)


@contextmanager
def serving_run(run: LiveRun, *, http_port: int = 0, **options: Any) -> Iterator[BackgroundServer]:
    """The trainer's service of ``run``, with an HTTP port."""
    config = ServerConfig(http_port=http_port or free_port(), drain_grace_s=1.0, **options)
    with BackgroundServer([TrainerService(run.control)], config) as server:
        yield server
