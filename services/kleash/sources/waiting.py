"""Waiting for a folder that somebody else fills, a Job on the same volume say."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from kleash.base.errors import ModelError
from kleash.sources.checkpoint import missing_parts
from kleash.sources.errors import SourceUnavailable

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
TELL_EVERY_S = 10.0


def wait_for_checkpoint(folder: Path, *, wait_s: float, needs_lineage: bool = False) -> None:
    """Return when ``folder`` is a complete checkpoint; tell every ten seconds what is missing.

    Raises SourceUnavailable when it still is not after ``wait_s``, and ModelError when there was
    no waiting to do.
    """
    started = told = time.monotonic()
    while missing := missing_parts(folder, needs_lineage=needs_lineage):
        waited = time.monotonic() - started
        if waited >= wait_s:
            raise _not_there(folder, ", ".join(missing), wait_s)
        if waited < LOOK_EVERY_S or time.monotonic() - told >= TELL_EVERY_S:
            told = time.monotonic()
            logger.info(
                "waiting for %s: %s (%.0f of %g s)", folder, ", ".join(missing), waited, wait_s
            )
        time.sleep(min(LOOK_EVERY_S, max(wait_s - waited, 0)))


def _not_there(folder: Path, missing: str, wait_s: float) -> Exception:
    if wait_s:
        return SourceUnavailable(
            f"{folder} is no complete checkpoint after {wait_s:g} s: {missing}",
            "see whether what writes it runs, or wait longer with --wait_s",
        )
    return ModelError(
        f"{folder} is no complete checkpoint: {missing}; correct the path, or wait for it with "
        "--wait_s=SECONDS."
    )
