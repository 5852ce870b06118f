"""Run folders as they are read by the report: also of runs that live, or that a crash has cut."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kleash.base.errors import ConfigError

State = Literal["complete", "running", "stopped"]
STATES: Mapping[State, str] = {
    "complete": "complete",
    "running": "running when the report was made",
    "stopped": "ended before its last step",
}
MARKS = ("run.json", "metrics.jsonl", "config.json")
"""Files of which a run folder has at least the first two."""


@dataclass(frozen=True, eq=False)
class RunData:
    """A run folder, read once. Rows are in the order of their steps."""

    path: Path
    name: str
    state: State
    config: Mapping[str, Any]
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl of PPO steps."""
    evaluations: list[dict[str, Any]]
    """Lines of metrics.jsonl of evaluations."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    """Entries of environment.json, oldest first."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """kleash.json of the policy, or of the newest checkpoint's; empty before there is one."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """report.json; empty before the end."""

    @property
    def seed(self) -> int | None:
        """The configuration's."""
        return self.config.get("seed")

    @property
    def last_step(self) -> int:
        """0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    def series(self, key: str) -> dict[int, float]:
        """The figure by step, from steps or evaluations; empty when the run has none."""
        rows = self.evaluations if key.startswith("evaluation/") else self.steps
        return {int(row["step"]): float(row[key]) for row in rows if row.get(key) is not None}


def read_runs(paths: Iterable[Path]) -> list[RunData]:
    """Read every folder; two of one name get their folders' names too. Raises ConfigError."""
    runs = [read_run(path) for path in dict.fromkeys(path.resolve() for path in paths)]
    if not runs:
        raise ConfigError("no run is named; give the folders of one or more runs.")
    return runs


def read_run(path: Path) -> RunData:
    """Read one folder. Raises ConfigError when it holds no run, or files that are none of a run."""
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give the --out folder of a PPO run.")
    if not all((path / name).exists() for name in MARKS[:2]):
        raise ConfigError(_no_run(path))
    rows = _read_lines(path / "metrics.jsonl")
    report = _read_object(path / "report.json")
    identity = _read_object(path / "run.json")
    return RunData(
        path=path,
        name=str(identity.get("run_id") or path.name),
        state=_state(path, report),
        config=_read_object(path / "config.json"),
        steps=[row for row in rows if "step_s" in row],
        evaluations=[row for row in rows if "step_s" not in row],
        samples=_read_lines(path / "samples.jsonl"),
        starts=_read_json(path / "environment.json", []),
        lineage=_lineage(path),
        result=report,
    )


def _no_run(path: Path) -> str:
    inside = [child for child in sorted(path.glob("*/")) if (child / "run.json").exists()]
    if inside:
        names = " ".join(str(child) for child in inside[:3])
        more = f" and {len(inside) - 3} more" if inside[3:] else ""
        return f"{path} is no run, but holds some; give {names}{more}."
    if (path / "run.json").exists():
        return f"{path} holds a run without a single step or evaluation yet; wait for its first."
    return (
        f"{path} holds no PPO run: there is no {' and no '.join(MARKS[:2])}; give the --out folder "
        "of kleash ppo or kleash up."
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Every complete line. A last one that is being written, or that a crash has cut, is left
    out."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"line {number} of {path} is no JSON object: {error}.") from None
    return rows


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from None


def _read_object(path: Path) -> dict[str, Any]:
    content = _read_json(path, {})
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def _lineage(path: Path) -> dict[str, Any]:
    checkpoints = sorted((path / "checkpoints").glob("step-*/policy/kleash.json"))
    for file in (path / "policy" / "kleash.json", *reversed(checkpoints)):
        if file.is_file():
            return _read_object(file)
    return {}


def _state(path: Path, report: Mapping[str, Any]) -> State:
    if report.get("is_complete"):
        return "complete"
    return "running" if _is_locked(path / "trainer.lock") else "stopped"


def _is_locked(path: Path) -> bool:
    """Whether a trainer of this machine holds the lock; it is not disturbed by the question."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
