"""Which figures the report of runs draws and compares, in the order of the page."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """A key of metrics.jsonl; docs/metrics.md says what it means."""

    key: str
    title: str
    unit: str
    is_setting: bool = False
    """Drawn only where it changes in the course of a run."""

    @property
    def axis(self) -> str:
        """The unit as an axis says it."""
        return "" if self.unit == "1" else self.unit


class Chapter(NamedTuple):
    """Charts that are read together."""

    title: str
    figures: tuple[Figure, ...]


CHAPTERS = (
    Chapter(
        "Reward and leash",
        (
            Figure("score_mean", "Score", "normalised score"),
            Figure("reward_mean", "Reward: score minus KL penalty", "normalised score"),
            Figure("kl_per_sequence", "KL from the reference", "nats a response"),
            Figure("kl_coefficient", "KL coefficient β", "1", is_setting=True),
        ),
    ),
    Chapter(
        "Held-out prompts",
        (
            Figure("evaluation/score_mean", "Score", "normalised score"),
            Figure("evaluation/kl_per_sequence", "KL from the reference", "nats a response"),
            Figure("evaluation/response_length_mean", "Response length", "tokens"),
            Figure("evaluation/stop_fraction", "Responses that stop", "fraction"),
        ),
    ),
    Chapter(
        "Responses",
        (
            Figure("response_length_mean", "Response length", "tokens"),
            Figure("stop_fraction", "Responses that stop", "fraction"),
            Figure("entropy", "Entropy", "nats a token"),
        ),
    ),
    Chapter(
        "Update",
        (
            Figure("approx_kl", "Approximate KL of the update", "nats a token"),
            Figure("clip_fraction", "Clipped tokens", "fraction"),
            Figure("explained_variance", "Explained variance of values", "fraction"),
            Figure("value_loss", "Value loss", "squared score"),
            Figure("value_clip_fraction", "Clipped values", "fraction"),
            Figure("policy_grad_norm", "Gradient norm of the policy", "1"),
            Figure("value_grad_norm", "Gradient norm of the value network", "1"),
            Figure("behaviour_gap_max", "Gap between sampler and trainer", "nats"),
            Figure("learning_rate", "Learning rate of the policy", "1"),
        ),
    ),
    Chapter(
        "Time and weights",
        (
            Figure("step_s", "Step", "s"),
            Figure("time_generate_s", "Generate", "s"),
            Figure("time_update_s", "Update", "s"),
            Figure("time_publish_s", "Publish", "s"),
            Figure("publish_bytes", "Bytes of a version", "bytes"),
            Figure("publish_changed_fraction", "Changed elements", "fraction"),
        ),
    ),
)

JUDGE_CHAPTER = "Held-out prompts"
"""The judge's figures come first there."""

COMPARED = (
    Figure("score_mean", "Score", "normalised score"),
    Figure("reward_mean", "Reward", "normalised score"),
    Figure("kl_per_sequence", "KL", "nats a response"),
    Figure("evaluation/score_mean", "Held-out score", "normalised score"),
    Figure("evaluation/kl_per_sequence", "Held-out KL", "nats a response"),
    Figure("response_length_mean", "Response length", "tokens"),
    Figure("stop_fraction", "Responses that stop", "fraction"),
    Figure("entropy", "Entropy", "nats a token"),
    Figure("explained_variance", "Explained variance", "fraction"),
    Figure("step_s", "Step time", "s"),
)


def judge_figure(key: str) -> Figure:
    """A figure of the judge's, in the judge's unit."""
    name = key.removeprefix("evaluation/judge").removeprefix("/")
    return Figure(key, f"Judge: {name}" if name else "Judge", "the judge's")
