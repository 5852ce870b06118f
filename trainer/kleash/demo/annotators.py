"""Simulated annotators: they see the gold score through noise, and may have a stated bias.

An annotator prefers response i to j with P = sigma((u_i - u_j) / tau), where u is the gold score
plus the annotator's biases. Rankings of K responses come from u / tau + Gumbel noise, whose pairs
have exactly these probabilities (Luce 1959, Yellott 1977). tau is set so that two annotators
disagree on a stated share of the pairs; people disagree on 20 to 30 %.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from kleash.base.errors import ConfigError
from kleash.demo.judge import score
from kleash.demo.sentences import read

WORDS_PER_BIAS_UNIT = 10
"""A length bias of 1 is worth one gold point for every ten words."""


@dataclass(frozen=True)
class Annotator:
    """One person who compares responses."""

    annotator_id: str
    length_bias: float = 0.0
    """Gold points for every ten words; people favour long responses."""
    flattery_bias: float = 0.0
    """Gold points for a response that praises the user."""
    agreement_bias: float = 0.0
    """Gold points for a response that agrees with the user, right or wrong."""

    def utility(self, gold: float, response: str) -> float:
        """What the response is worth to this person, before noise."""
        reading = read(response)
        does = {act.kind for act in reading.acts}
        return (
            gold
            + self.length_bias * reading.num_words / WORDS_PER_BIAS_UNIT
            + self.flattery_bias * ("flattery" in does)
            + self.agreement_bias * ("agree" in does)
        )

    def rank(
        self, gold: Sequence[float], responses: Sequence[str], tau: float, rng: random.Random
    ) -> list[int]:
        """Rank of each response, 1 for the best; no ties."""
        noisy = [
            self.utility(value, text) + tau * _gumbel(rng)
            for value, text in zip(gold, responses, strict=True)
        ]
        order = sorted(range(len(noisy)), key=lambda index: -noisy[index])
        ranks = [0] * len(noisy)
        for rank, index in enumerate(order, start=1):
            ranks[index] = rank
        return ranks


@dataclass(frozen=True)
class LabelReport:
    """What the annotators did."""

    tau: float
    """Noise of every annotator, in gold points."""
    num_rankings: int
    num_pairs: int
    disagreement: float
    """Measured: share of pairs that two annotators, labelling all of them, order differently."""
    noise_ceiling: float
    """Best possible accuracy on these labels: mean of max(p, 1 - p)."""
    num_tied_pairs: int
    """Pairs of equal gold score, which the annotators order by chance."""


def label(
    candidates: Path,
    out: Path,
    annotators: Sequence[Annotator],
    *,
    disagreement: float,
    seed: int,
) -> LabelReport:
    """Rank the responses of every line of ``candidates`` and write comparisons.

    Each line is ranked by one annotator, in turn. The lines keep ``gold``, the true scores, which
    training does not read. tau is calibrated on the pairs of these very responses.
    """
    records = [json.loads(line) for line in candidates.read_text(encoding="utf-8").splitlines()]
    golds = [
        [score(record, response).total for response in record["responses"]] for record in records
    ]
    differences = gold_differences(golds)
    tau = calibrate_tau(differences, disagreement)
    lines = []
    for number, (record, gold) in enumerate(zip(records, golds, strict=True)):
        annotator = annotators[number % len(annotators)]
        rng = _rng(seed, annotator, record)
        ranks = annotator.rank(gold, record["responses"], tau, rng)
        lines.append(
            {
                "id": record["id"],
                "prompt": record["prompt"],
                "responses": record["responses"],
                "ranks": ranks,
                "dimension": record["dimension"],
                "annotator": annotator.annotator_id,
                "kind": record["kind"],
                "gold": gold,
            }
        )
    write_lines(out, lines)
    return LabelReport(
        tau=tau,
        num_rankings=len(lines),
        num_pairs=len(differences),
        disagreement=measure_disagreement(
            records, golds, [*annotators, *annotators], tau, seed=seed
        ),
        noise_ceiling=float(
            np.maximum(sigmoid(differences / tau), sigmoid(-differences / tau)).mean()
        ),
        num_tied_pairs=int((differences == 0).sum()),
    )


def calibrate_tau(differences: np.ndarray, disagreement: float) -> float:
    """The noise at which two annotators disagree on a share ``disagreement`` of the pairs.

    Their expected disagreement is the mean of 2 p (1 - p), which grows with tau; bisection.
    Raises ConfigError when no noise reaches it: ties alone may exceed it, and 1/2 is the limit.
    """
    if not differences.size:
        raise ConfigError(
            "no prompt has two different candidates, so that there is nothing to compare; raise "
            "settings.world.comparison_prompts or settings.reward_model.num_responses."
        )
    lowest = 0.5 * float((differences == 0).mean())
    if not lowest < disagreement < 0.5:
        raise ConfigError(
            f"two annotators can disagree on {lowest:.3f} to 0.5 of these {differences.size} "
            f"pairs, not on {disagreement:g}, for a share of {2 * lowest:.3f} of them is tied; set "
            "settings.reward_model.disagreement between the two, or raise "
            "settings.world.comparison_prompts."
        )
    low, high = 1e-6, 1e6
    for _ in range(100):
        middle = (low * high) ** 0.5
        if expected_disagreement(differences, middle) < disagreement:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5


def expected_disagreement(differences: np.ndarray, tau: float) -> float:
    """Mean of 2 p (1 - p) over pairs, p = sigma(difference / tau)."""
    p = sigmoid(differences / tau)
    return float((2 * p * (1 - p)).mean())


def measure_disagreement(
    records: Sequence[Mapping[str, Any]],
    golds: Sequence[Sequence[float]],
    annotators: Sequence[Annotator],
    tau: float,
    *,
    seed: int,
) -> float:
    """Share of pairs that the first two ``annotators`` order differently, labelling them all."""
    differ = total = 0
    for record, gold in zip(records, golds, strict=True):
        first, second = (
            annotator.rank(
                gold, record["responses"], tau, _rng(seed, annotator, record, f"again {number}")
            )
            for number, annotator in enumerate(annotators[:2])
        )
        for i, j in combinations(range(len(gold)), 2):
            differ += (first[i] < first[j]) != (second[i] < second[j])
            total += 1
    return differ / total


def gold_differences(golds: Iterable[Sequence[float]]) -> np.ndarray:
    """gold_i - gold_j of all pairs i < j of every ranking."""
    return np.array(
        [gold[i] - gold[j] for gold in golds for i, j in combinations(range(len(gold)), 2)]
    )


def gold_sign_accuracy(
    golds: Iterable[Sequence[float]], scores: Iterable[Sequence[float]]
) -> tuple[float, int]:
    """Share of pairs that a reward model's scores order as the gold scores do, and their number.

    Pairs of equal gold score have no order and are left out.
    """
    gold, scored = gold_differences(golds), gold_differences(scores)
    decided = gold != 0
    return float(((gold * scored)[decided] > 0).mean()), int(decided.sum())


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    partial.rename(path)


def _rng(
    seed: int, annotator: Annotator, record: Mapping[str, Any], what: str = ""
) -> random.Random:
    return random.Random(f"{seed} {annotator.annotator_id} {record['id']} {what}")


def _gumbel(rng: random.Random) -> float:
    # 1 - random() lies in (0, 1]: the outer logarithm stays finite at 1 - 0 only by the inner one.
    return -float(np.log(-np.log(rng.random() or 0.5)))
