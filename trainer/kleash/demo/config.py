"""Configuration of ``kleash demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from kleash.base.config import Config, RunId
from kleash.demo.settings import QUICK, DemoSettings

StageName = Literal["world", "base", "sft", "candidates", "comparisons", "reward_model", "ppo"]


class DemoConfig(Config):
    """The demo."""

    out: Path = Path("runs/demo")
    """Folder for everything."""
    run_id: RunId = None
    """Name of the run, recorded in the kleash.json of every model; null: PPO makes one."""
    until: StageName | None = None
    """Last stage to do, with everything before it; null: all of them, and the report."""
    resume: bool = False
    """Go on with an earlier run of the same seed and sizes in out where it stopped, and do nothing
    when it is done; false moves an earlier run aside."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Decides the world, the models' first weights and every draw."""
    quick: bool = False
    """Far smaller everything: shows that it works within a minute, with poor results."""
    num_threads: int = pydantic.Field(default=1, ge=0)
    """Threads of each process; 0 leaves torch's own choice. With 1 the results do not depend on the
    number of cores; the longest stage runs four processes side by side in any case."""
    settings: DemoSettings | None = None
    """Sizes and hyper-parameters in place of the built-in ones."""

    @property
    def chosen_settings(self) -> DemoSettings:
        """What is computed."""
        return self.settings or (QUICK if self.quick else DemoSettings())
