"""The KL coefficient beta over a run: fixed, or steered towards a target KL.

KL means nats per sequence (the sum over response tokens, averaged over the sequences of the rollout
just used), not nats per token: a target of 6 is six nats per response.
"""

from __future__ import annotations


class FixedKL:
    """A constant coefficient. It has no state: the configuration alone decides it."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def update(self, kl_per_sequence: float, num_episodes: int) -> None:
        """Nothing to steer; here so that the loop need not ask which controller it has."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if state:
            raise ValueError(
                f"the checkpoint was written with an adaptive KL coefficient ({state}), this run "
                f"has a fixed one ({self.coefficient}); resume with the checkpoint's controller."
            )


class AdaptiveKL:
    """Ziegler et al. 2019, section 2.2: a proportional controller in log space.

    error = clip(KL / target - 1, -0.2, 0.2); coefficient *= 1 + error * num_episodes / horizon.
    With 512 episodes a step and horizon 10 000 the coefficient moves at most 1 % a step: a run of
    few steps or small batches needs a shorter horizon. One update never moves it by more than a
    fifth, or a batch larger than the horizon would make it negative.
    https://arxiv.org/abs/1909.08593
    """

    MAX_ERROR = 0.2
    """One wild rollout must not throw the coefficient; the paper's bound."""

    def __init__(self, coefficient: float, target: float, horizon: float) -> None:
        if coefficient <= 0 or target <= 0 or horizon <= 0:
            raise ValueError(
                f"an adaptive KL coefficient needs positive numbers; coefficient is {coefficient}, "
                f"target {target}, horizon {horizon}."
            )
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl_per_sequence: float, num_episodes: int) -> None:
        """Call after the PPO step with the KL of the rollout it used."""
        error = kl_per_sequence / self.target - 1
        error = min(max(error, -self.MAX_ERROR), self.MAX_ERROR)
        self.coefficient *= 1 + error * min(num_episodes / self.horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if "coefficient" not in state:
            raise ValueError(
                "the checkpoint was written with a fixed KL coefficient, this run has an adaptive "
                "one; resume with the checkpoint's controller."
            )
        self.coefficient = state["coefficient"]
