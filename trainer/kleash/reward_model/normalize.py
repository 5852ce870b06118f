"""The normalization of a trained reward model: reference responses score mean 0, std 1.

Without it the raw score has an arbitrary offset and scale, and neither the penalty for a missing
end token nor the KL coefficient of PPO has a stable meaning (Ziegler et al. 2019, Stiennon et al.
2020).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from kleash.base.errors import DataError
from kleash.lm.heads import Normalization

Mode = Literal["mean_std", "mean"]


def measure_normalization(scores: np.ndarray, mode: Mode) -> Normalization:
    """(mean, std) of the raw scores (R,) of reference responses; std 1 in mode ``mean``.

    Raises DataError when mode ``mean_std`` finds no spread to divide by.
    """
    raw = np.asarray(scores, dtype=np.float64)
    mean = float(raw.mean())
    if mode == "mean":
        return Normalization(mean, 1.0)
    std = float(raw.std())
    # A spread at the size of float32 rounding would blow rounding errors up to scores.
    if std <= 1e-6 * max(abs(mean), 1.0):
        raise DataError(
            f"the {len(raw)} reference responses all score {mean:.4g}, without a spread to "
            "normalize by; give more reference data or set --normalization=mean."
        )
    return Normalization(mean, std)
