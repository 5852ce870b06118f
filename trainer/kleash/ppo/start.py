"""A trainer starts on a run: an entry in environment.json, and the sinks are told."""

from __future__ import annotations

from collections.abc import Mapping

from kleash.lm.load import read_lineage
from kleash.ppo.config import PPOConfig
from kleash.ppo.environment import describe_start
from kleash.ppo.run_folder import RunFolder
from kleash.sinks.feed import Feed, make_sinks
from kleash.sinks.sink import RunDescription


def seen_step(folder: RunFolder) -> int:
    """The highest step that any trainer has done on the run; asked before the folder is cut back
    to a checkpoint. 0 for a new run."""
    steps = [row["step"] for row in folder.read_metrics()[-1:]]
    return max([0, *steps, *(start["seen_step"] for start in folder.read_starts())])


def record_start(
    config: PPOConfig,
    folder: RunFolder,
    *,
    from_step: int,
    seen_step: int,
    digests: Mapping[str, str],
) -> Feed:
    """Write down what this trainer computes with, and open the sinks that the run wants."""
    environment = describe_start(
        config,
        from_step=from_step,
        seen_step=seen_step,
        digests=digests,
        lineage=read_lineage(config.model),
    )
    folder.add_start(environment)
    run = RunDescription(
        run_id=folder.run_id,
        stage="ppo",
        out=folder.path,
        total_steps=config.total_steps,
        config=config.model_dump(mode="json"),
        environment=environment,
        from_step=from_step,
        seen_step=seen_step,
    )
    return Feed(make_sinks(config.sinks), run)
