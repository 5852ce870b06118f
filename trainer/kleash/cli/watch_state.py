"""What is known of a watched run: its figures, its pace, and sentences about where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kleash.trainer.v1 import trainer_pb2

RATE_STEPS = 20
"""Newest steps over which the time of a step is averaged."""
MAX_STEPS = 2000
"""Newest steps that are kept."""

STATES = {
    trainer_pb2.RUN_STATE_STARTING: "starting",
    trainer_pb2.RUN_STATE_RUNNING: "running",
    trainer_pb2.RUN_STATE_PAUSED: "paused",
    trainer_pb2.RUN_STATE_STOPPING: "stopping",
    trainer_pb2.RUN_STATE_COMPLETED: "complete",
    trainer_pb2.RUN_STATE_FAILED: "failed",
}


@dataclass
class RunView:
    """Changes as the trainer tells more."""

    run: trainer_pb2.GetRunResponse = field(default_factory=trainer_pb2.GetRunResponse)
    steps: list[trainer_pb2.StepMetrics] = field(default_factory=list)
    is_over: bool = False
    is_away: bool = False

    def take_run(self, run: trainer_pb2.GetRunResponse) -> None:
        """The trainer said what it does."""
        self.run = run

    def take_step(self, metrics: trainer_pb2.StepMetrics) -> None:
        """A step has ended."""
        self.steps.append(metrics)
        del self.steps[:-MAX_STEPS]
        if metrics.step > self.run.step:
            self.run.step, self.run.weights_version = metrics.step, metrics.weights_version

    def cut_back(self, step: int) -> None:
        """The trainer goes on after ``step``: what came later is done again."""
        self.steps = [each for each in self.steps if each.step <= step]

    def series(self, name: str) -> list[float]:
        """A figure of every step that has it."""
        return [each.values[name] for each in self.steps if name in each.values]

    @property
    def state(self) -> str:
        """A word."""
        if self.is_away:
            return "not reached"
        if self.is_over and self.run.state == trainer_pb2.RUN_STATE_STOPPING:
            return "stopped"
        return STATES.get(self.run.state, "starting")

    @property
    def step_s(self) -> float | None:
        """Mean time of the newest steps, seconds."""
        newest = [each.step_s for each in self.steps[-RATE_STEPS:]]
        return sum(newest) / len(newest) if newest else None

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step, at that pace."""
        if self.step_s is None or self.is_over:
            return None
        return (self.run.total_steps - self.run.step) * self.step_s


def describe_state(run: trainer_pb2.GetRunResponse) -> str:
    """ "paused after step 12 of 100"."""
    word = STATES.get(run.state, "starting")
    if not run.total_steps:
        return word
    link = "at" if run.state == trainer_pb2.RUN_STATE_RUNNING else "after"
    told = f"{word} {link} step {run.step} of {run.total_steps}"
    return f"{told}: {run.error_message}" if run.error_message else told


def duration(seconds: float | None) -> str:
    """ "4.8 s", "14 min", "3 h"."""
    if seconds is None:
        return "?"
    if seconds < 99.5:
        decimals = 2 if seconds < 0.995 else 1 if seconds < 9.95 else 0
        return f"{seconds:.{decimals}f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{hours} h" if hours < 72 else f"{round(hours / 24)} days"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as blocks of eight heights, in at most ``width`` of them; means where it is long.

    A value that is not finite is a "!".
    """
    size = -(-len(values) // width) if values else 1
    # Groups count from the end, so that the newest value never moves to another one.
    ends = range(len(values), 0, -size)
    means = [sum(part) / len(part) for part in (values[max(0, end - size) : end] for end in ends)]
    means.reverse()
    finite = [each for each in means if abs(each) < float("inf")]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(
        "▁▂▃▄▅▆▇█"[round((each - low) * scale) if scale else 3] if abs(each) < float("inf") else "!"
        for each in means
    )
