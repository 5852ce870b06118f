"""The reward model that a run is scored by, and how scores of a new one keep the scale of the old.

When a run adopts a new reward model, both models have scored the same responses, the probes: the
newest of the run. An affine map gives the new scores of the probes the mean and the standard
deviation of the old ones (linear equating: Kolen and Brennan, Test Equating, Scaling, and Linking,
chapter 2). Least squares would be the better guess of each old score and the worse scale: its slope
is correlation * std_old / std_new, so the spread shrinks by the correlation, and the KL penalty,
which stays as it is, would weigh 1 / correlation as much as before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kleash.base.errors import KleashError
from kleash.lm.sequences import TokenSequence

logger = logging.getLogger(__name__)

FEWEST_PROBES = 8
"""Mean and deviation of fewer say little; the new model's scores are then taken as they are."""


class CalibrationError(KleashError):
    """No map gives the scores of a new model the scale of the old one's."""


@dataclass(frozen=True)
class Calibration:
    """``scale * score + shift``; of the model that a run began with, the score itself."""

    scale: float = 1.0
    shift: float = 0.0

    def apply(self, score: float) -> float:
        """A normalised score of the reward model on the scale of the run."""
        return self.scale * score + self.shift


@dataclass(frozen=True, eq=False)
class Probe:
    """A response of the run and its score."""

    prompt_id: str
    sequence: TokenSequence
    score: float
    """On the scale of the run."""


@dataclass(frozen=True, eq=False)
class RewardState:
    """The reward model of a run as it is now; part of its checkpoints."""

    revision: str
    """Digest of the model."""
    calibration: Calibration = Calibration()
    probes: tuple[Probe, ...] = ()
    """Newest last; none without services.calibration."""

    def with_probes(self, probes: Iterable[Probe], limit: int) -> RewardState:
        """Keep these too, the newest ``limit`` in all."""
        return RewardState(
            self.revision, self.calibration, (*self.probes, *probes)[-limit:] if limit else ()
        )

    def followed_by(self, revision: str, scores: Sequence[float]) -> RewardState:
        """The state with a new model, whose scores of the probes, in order, are ``scores``.

        The old scores are on the scale of the run, whatever models gave them: so is the new model,
        however many came before. Raises CalibrationError.
        """
        if len(scores) < FEWEST_PROBES:
            logger.warning(
                "reward model %s is not calibrated: the run has %d responses to compare it on, and "
                "needs %d",
                revision,
                len(scores),
                FEWEST_PROBES,
            )
            return RewardState(revision)
        new = np.array(scores, dtype=np.float64)
        calibration = fit(np.array([probe.score for probe in self.probes]), new, revision)
        probes = tuple(
            Probe(probe.prompt_id, probe.sequence, calibration.apply(score))
            for probe, score in zip(self.probes, scores, strict=True)
        )
        return RewardState(revision, calibration, probes)


def probes_to_json(probes: Iterable[Probe]) -> list[dict[str, Any]]:
    """The probes as JSON, exact."""
    return [
        {
            "prompt_id": probe.prompt_id,
            "ids": probe.sequence.ids.tolist(),
            "response_start": probe.sequence.response_start,
            "score": probe.score,
        }
        for probe in probes
    ]


def probes_from_json(rows: Iterable[dict[str, Any]]) -> tuple[Probe, ...]:
    """What ``probes_to_json`` made."""
    return tuple(
        Probe(
            row["prompt_id"],
            TokenSequence(np.array(row["ids"], dtype=np.int32), row["response_start"]),
            row["score"],
        )
        for row in rows
    )


def fit(old: np.ndarray, new: np.ndarray, revision: str) -> Calibration:
    """The map that gives ``new`` the mean and the standard deviation of ``old``.

    Both are float64, one score for each of the same responses. Raises CalibrationError where the
    new scores do not vary, or fall where the old ones rise.
    """
    remedy = (
        "serve another model, or the one before, and resume; or resume with "
        "services.calibration=none to take its scores as they are"
    )
    for name, scores in (("it", new), ("the model before", old)):
        if not scores.std() > 0:
            raise CalibrationError(
                f"reward model {revision} cannot be calibrated: {name} gives all {len(scores)} "
                f"responses of the run that were kept the score {scores[0]:g}; {remedy}."
            )
    correlation = float(np.corrcoef(old, new)[0, 1])
    if not correlation > 0:
        raise CalibrationError(
            f"reward model {revision} cannot be calibrated: on {len(new)} responses of the run its "
            f"scores fall where those of the model before rise (correlation {correlation:.2f}), so "
            f"it would undo what was learned; {remedy}."
        )
    scale = float(old.std() / new.std())
    shift = float(old.mean() - scale * new.mean())
    logger.info(
        "reward model %s is calibrated on %d responses: %.4g * score + %.4g (correlation %.3f)",
        revision,
        len(new),
        scale,
        shift,
        correlation,
    )
    return Calibration(scale, shift)
