"""``kleash.json``: what made a checkpoint, so that the three stages form one traceable line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kleash.base.config import Config
from kleash.base.version import software_version
from kleash.lm.load import read_lineage


def describe_lineage(
    stage: str,
    config: Config,
    *,
    parent: Path | str,
    parent_digest: str,
    digest: str,
    data_sha256: str,
    run_id: str | None = None,
) -> dict[str, Any]:
    """The content of ``kleash.json``.

    ``lineage_id`` is handed down from the parent; a checkpoint that Kleash did not write starts a
    line that bears the first 16 digits of its digest. Digests are of the weights as stored.
    ``run_id`` names the run that the stage belongs to.
    """
    return {
        "stage": stage,
        "run_id": run_id,
        "created_by": f"kleash {software_version()}",
        "lineage_id": read_lineage(parent).get("lineage_id")
        or parent_digest.removeprefix("sha256:")[:16],
        "parent_digest": parent_digest,
        "digest": digest,
        "data_sha256": data_sha256,
        "config": config.model_dump(mode="json"),
    }
