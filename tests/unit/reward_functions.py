"""Python functions as reward models, made from their source."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward

Load = Callable[..., LocalReward]
"""Serves a function whose source is given, with settings of its section."""


@contextmanager
def loading(folder: Path) -> Iterator[Load]:
    """Their source goes to judge.py in ``folder``; they are closed at the end."""
    made: list[LocalReward] = []

    def load_source(source: str, **settings: Any) -> LocalReward:
        (folder / "judge.py").write_text(textwrap.dedent(source))
        keys = {"function": "judge:score", "function_path": [folder]} | settings
        made.append(LocalReward.load(RewardConfig.model_validate(keys)))
        return made[-1]

    yield load_source
    for each in made:
        each.close()


def scores(local: LocalReward, *texts: str) -> list[float]:
    """Of each text."""
    return [each.score for each in local.score_texts(texts)]


def wait_for(is_true: Callable[[], bool]) -> None:
    """For what another process does; ten seconds at most."""
    for _ in range(1000):
        if is_true():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")
