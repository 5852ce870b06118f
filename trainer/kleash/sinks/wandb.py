"""Weights & Biases, online or offline.

A run keeps its id over every start. W&B does not take rows back: steps that a resumed run does
again are left out where an earlier start has logged them, so that each is there once, with its
first figures. Offline every start is a folder of its own for ``wandb sync``; all of them become one
run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from kleash.base.errors import ConfigError
from kleash.sinks.config import WandbConfig
from kleash.sinks.sink import SAMPLE_COLUMNS, End, RunDescription, sample_table


class WandbSink:
    """History by step, a table of samples, configuration and environment in the run's config."""

    def __init__(self, config: WandbConfig) -> None:
        self._config = config
        self._run: Any = None
        self._known_step = 0
        """Rows up to this step are in the run already."""

    def begin(self, run: RunDescription) -> None:
        """Open the run, or go on with it."""
        import wandb

        config = self._config
        if config.mode == "online" and not (os.environ.get("WANDB_API_KEY") or _is_logged_in()):
            # wandb would ask for it at the terminal, and wait.
            raise ConfigError(
                "W&B has no key; set WANDB_API_KEY, run wandb login, or set sinks.wandb.mode to "
                "offline."
            )
        was_used = any((run.out / "wandb").glob(f"*run-*-{run.run_id}*"))
        if run.is_resumed and was_used:
            self._known_step = run.seen_step
        self._run = wandb.init(
            id=run.run_id,
            name=run.run_id,
            project=config.project,
            entity=config.entity,
            group=config.group,
            job_type=run.stage,
            dir=run.out,
            mode=config.mode,
            resume="allow" if config.mode == "online" else None,
            config={**run.config, "environment": dict(run.environment)},
            # What W&B would find out about machine and command line is in environment.json.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
            ),
        )

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of the row of this step; an evaluation adds to it."""
        if step > self._known_step or not self._known_step:
            self._run.log(dict(figures), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table in the row of this step."""
        import wandb

        if step > self._known_step:
            data: Any = sample_table(rows)
            table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=data)
            self._run.log({"samples": table}, step=step)

    def end(self, state: End) -> None:
        """Write what is left; a failed run gets an exit code of 1."""
        self._run.summary["state"] = state
        self._run.finish(exit_code=1 if state == "failed" else 0)


def _is_logged_in() -> bool:
    """Whether ``wandb login`` has left a key on this machine."""
    from requests.utils import get_netrc_auth

    return get_netrc_auth(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")) is not None
