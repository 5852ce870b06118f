"""Runs that differ only in their seed belong together; figures of a group are bands over seeds.

Plain floats, no I/O.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kleash.evaluate.run_data import RunData
from kleash.sinks.sink import flattened

UNRELATED = (
    "seed", "out", "run_id", "resume", "server", "sinks", "samples", "checkpoint", "num_threads",
    "publish", "services.policy", "services.reward", "services.reference", "services.discovery",
    "services.wait_s", "services.generate_timeout_s", "services.score_timeout_s", "tracing",
    "record",
)  # fmt: skip
"""Keys and sections of the configuration that say where a run computes and what it keeps, not what:
runs that differ in these alone are of one group."""

FINAL_FRACTION = 0.1
"""Share of the last rows whose mean is a final figure: one step alone is noise."""


class Point(NamedTuple):
    """A figure over the runs of a group that have it."""

    step: float
    mean: float
    low: float
    high: float


class Spread(NamedTuple):
    """One figure of several runs."""

    mean: float
    deviation: float | None
    """Standard deviation over runs, with n - 1; None for a single run."""
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Group:
    """Runs of one configuration."""

    label: str
    """What sets it apart from the other groups."""
    runs: tuple[RunData, ...]

    @property
    def seeds(self) -> list[int | None]:
        """Of the runs, in their order."""
        return [run.seed for run in self.runs]


def group_runs(runs: Sequence[RunData]) -> list[Group]:
    """Groups in the order of their first run."""
    kinds: dict[str, list[RunData]] = {}
    for run in runs:
        key = json.dumps(_comparable(run.config), sort_keys=True)
        kinds.setdefault(key, []).append(run)
    groups = [tuple(sorted(members, key=_by_seed)) for members in kinds.values()]
    differences = differing_keys([members[0] for members in groups])
    return [
        Group(_label(members, differences, is_alone=len(groups) == 1), members)
        for members in groups
    ]


def differing_keys(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Keys in which the runs differ, unrelated ones left out, with each run's value."""
    configs = [_comparable(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: each for key, each in values.items() if any(it != each[0] for it in each)}


def band(series: Sequence[Mapping[int, float]]) -> list[Point]:
    """Mean, lowest and highest of the runs at each step that any of them has.

    Values that are not finite are left out; a step at which no run has a finite one is, too.
    Example: {1: 1.0, 2: 2.0} and {1: 3.0} give (1, 2.0, 1.0, 3.0) and (2, 2.0, 2.0, 2.0).
    """
    points = []
    for step in sorted({step for each in series for step in each}):
        values = [each[step] for each in series if step in each and math.isfinite(each[step])]
        if values:
            points.append(Point(step, sum(values) / len(values), min(values), max(values)))
    return points


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` points: neighbours become one with the mean of their steps and means, and
    the lowest and the highest of all."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        Point(
            sum(point.step for point in part) / len(part),
            sum(point.mean for point in part) / len(part),
            min(point.low for point in part),
            max(point.high for point in part),
        )
        for part in parts
    ]


def final_figure(series: Mapping[int, float]) -> float | None:
    """Mean over the last tenth of the rows, at least one; None without a finite one."""
    steps = sorted(step for step, value in series.items() if math.isfinite(value))
    last = steps[-max(1, round(FINAL_FRACTION * len(steps))) :] if steps else []
    return sum(series[step] for step in last) / len(last) if last else None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean, standard deviation and range; None without a value.

    Example: 1, 2 and 6 give mean 3, deviation sqrt(7) = 2.6458, range 1 to 6.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    n, mean = len(known), sum(known) / len(known)
    deviation = math.sqrt(sum((it - mean) ** 2 for it in known) / (n - 1)) if n > 1 else None
    return Spread(mean, deviation, min(known), max(known), n)


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flattened(config)
        if not any(key == name or key.startswith(f"{name}.") for name in UNRELATED)
    }


def _by_seed(run: RunData) -> tuple[float, str]:
    return (math.inf if run.seed is None else run.seed, run.name)


def _label(
    members: Sequence[RunData], differences: Mapping[str, Sequence[Any]], *, is_alone: bool
) -> str:
    if is_alone or not differences:
        return members[0].name if len(members) == 1 else f"{len(members)} seeds"
    config = _comparable(members[0].config)
    parts = [f"{key}={_short(config.get(key))}" for key in list(differences)[:3]]
    more = len(differences) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more else "")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 32 else f"…{text[-31:]}"
