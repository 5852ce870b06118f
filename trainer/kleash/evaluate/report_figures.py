"""Which figures the report of runs draws and compares, in the order of the page."""

from __future__ import annotations

from typing import NamedTuple

from kleash.ppo.figure import Figure
from kleash.ppo.figures import EVALUATION, STEP

DEFINED = {each.name: each for section in (*STEP, EVALUATION) for each in section.figures}


class Drawn(NamedTuple):
    """A figure as the page calls it; what it means is defined in kleash.ppo.figures."""

    key: str
    """In metrics.jsonl."""
    title: str
    is_setting: bool = False
    """Drawn only where it changes in the course of a run."""

    @property
    def defined(self) -> Figure:
        """Unit, formula and remedy."""
        is_judge_name = self.key.startswith("evaluation/judge/")
        return DEFINED["evaluation/judge/NAME" if is_judge_name else self.key]

    @property
    def unit(self) -> str:
        """Without what it says about the range."""
        return self.defined.unit.partition(",")[0]

    @property
    def axis(self) -> str:
        """The unit as an axis says it."""
        return "" if self.unit == "1" else self.unit


class Chapter(NamedTuple):
    """Charts that are read together."""

    title: str
    figures: tuple[Drawn, ...]


CHAPTERS = (
    Chapter(
        "Reward and leash",
        (
            Drawn("score_mean", "Score"),
            Drawn("reward_mean", "Reward: score minus KL penalty"),
            Drawn("kl_per_sequence", "KL from the reference"),
            Drawn("kl_coefficient", "KL coefficient β", is_setting=True),
        ),
    ),
    Chapter(
        "Held-out prompts",
        (
            Drawn("evaluation/score_mean", "Score"),
            Drawn("evaluation/kl_per_sequence", "KL from the reference"),
            Drawn("evaluation/response_length_mean", "Response length"),
            Drawn("evaluation/stop_fraction", "Responses that stop"),
        ),
    ),
    Chapter(
        "Responses",
        (
            Drawn("response_length_mean", "Response length"),
            Drawn("stop_fraction", "Responses that stop"),
            Drawn("entropy", "Entropy"),
        ),
    ),
    Chapter(
        "Update",
        (
            Drawn("approx_kl", "Approximate KL of the update"),
            Drawn("clip_fraction", "Clipped tokens"),
            Drawn("explained_variance", "Explained variance of values"),
            Drawn("value_loss", "Value loss"),
            Drawn("value_clip_fraction", "Clipped values"),
            Drawn("policy_grad_norm", "Gradient norm of the policy"),
            Drawn("value_grad_norm", "Gradient norm of the value network"),
            Drawn("behaviour_gap_max", "Gap between sampler and trainer"),
            Drawn("learning_rate", "Learning rate of the policy"),
        ),
    ),
    Chapter(
        "Time and weights",
        (
            Drawn("step_s", "Step"),
            Drawn("time_generate_s", "Generate"),
            Drawn("time_update_s", "Update"),
            Drawn("time_publish_s", "Publish"),
            Drawn("publish_bytes", "Bytes of a version"),
            Drawn("publish_changed_fraction", "Changed elements"),
        ),
    ),
)

JUDGE_CHAPTER = "Held-out prompts"
"""The judge's figures come first there."""

COMPARED = (
    Drawn("score_mean", "Score"),
    Drawn("reward_mean", "Reward"),
    Drawn("kl_per_sequence", "KL"),
    Drawn("evaluation/score_mean", "Held-out score"),
    Drawn("evaluation/kl_per_sequence", "Held-out KL"),
    Drawn("response_length_mean", "Response length"),
    Drawn("stop_fraction", "Responses that stop"),
    Drawn("entropy", "Entropy"),
    Drawn("explained_variance", "Explained variance"),
    Drawn("step_s", "Step time"),
)


def judge_figure(key: str) -> Drawn:
    """A figure of the judge's."""
    name = key.removeprefix("evaluation/judge").removeprefix("/")
    return Drawn(key, f"Judge: {name}" if name else "Judge")
