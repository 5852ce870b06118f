"""How far a stage is, from the lines that it prints: what ``kleash.cli.progress`` writes in a pod.

    PPO: 12/100  score 0.512  kl 3.1  reward 0.35  95 s, 700 s left

Reading them needs no more than the right to read logs and works for every stage alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

LINES_TO_READ = 60
"""Last lines of a log that are searched: progress comes every 15 s, among other messages."""

_LINE = re.compile(
    r"^(?P<task>[A-Za-z][^:]{0,40}): (?P<done>\d+)/(?P<total>\d+)"
    r"(?P<figures>(?:  [a-z]\w* -?[\w.+-]+)*)\s*(?:-?\d+ s, (?P<left>-?\d+) s left)?\s*$"
)
_STOP = re.compile(r"^ppo: stopped after step (?P<done>\d+) of (?P<total>\d+)\b")
_FIGURE = re.compile(r"([a-z]\w*) (-?[\w.+-]+)")


@dataclass(frozen=True)
class StageProgress:
    """Where a stage's task is."""

    task: str
    done: int
    total: int
    figures: dict[str, str] = field(default_factory=dict)
    """Loss, score, KL and so on, as printed."""
    left_s: int | None = None
    """Seconds left, by the stage's own estimate."""

    @property
    def text(self) -> str:
        """For people."""
        figures = "".join(f"  {name} {value}" for name, value in self.figures.items())
        left = f"  {self.left_s} s left" if self.left_s and self.done < self.total else ""
        return f"{self.task} {self.done}/{self.total}{figures}{left}"


def read_progress(log: str) -> StageProgress | None:
    """The newest progress in the end of a log; None when there is none."""
    for line in reversed(log.splitlines()):
        if match := _LINE.match(line):
            left = match["left"]
            return StageProgress(
                match["task"],
                int(match["done"]),
                int(match["total"]),
                dict(_FIGURE.findall(match["figures"])),
                None if left is None else int(left),
            )
    return None


def read_stop(log: str) -> StageProgress | None:
    """Where a trainer was that somebody told to stop; None when it was not, or the log is gone."""
    for line in reversed(log.splitlines()):
        if match := _STOP.match(line):
            return StageProgress("PPO", int(match["done"]), int(match["total"]))
    return None
