"""Figures of micro-batches and minibatches together: sums, means, and maxima of names in _max."""

from __future__ import annotations

from collections.abc import Mapping


class Averages:
    """Collects dictionaries of figures with the same keys.

    Example: after add({"a": 1, "b_max": 3}) and add({"a": 2, "b_max": 2}), sums() is
    {"a": 3, "b_max": 3} and means() is {"a": 1.5, "b_max": 3}.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        """One more micro-batch or minibatch."""
        for name, value in figures.items():
            self._values.setdefault(name, []).append(value)

    def merge(self, other: Averages) -> None:
        """Everything that ``other`` collected."""
        for name, values in other._values.items():
            self._values.setdefault(name, []).extend(values)

    def sums(self) -> dict[str, float]:
        """Over micro-batches, each of which is already divided by the tokens of the minibatch."""
        return {
            name: max(v) if name.endswith("_max") else sum(v) for name, v in self._values.items()
        }

    def means(self) -> dict[str, float]:
        """Over minibatches."""
        return {
            name: max(v) if name.endswith("_max") else sum(v) / len(v)
            for name, v in self._values.items()
        }
