"""The folder of a demo: which stages are done, and that one process at a time works in it.

OUT/demo.json     seed and sizes, which a resumed demo must share, and how long each stage took
.NAME.lock        beside OUT; held by the living demo
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kleash.base.durable import write_whole
from kleash.base.errors import ConfigError
from kleash.base.lock_file import HeldError, take_lock
from kleash.demo.config import DemoConfig, StageName

logger = logging.getLogger(__name__)

RESULTS: dict[StageName, str] = {
    "world": "data",
    "base": "base",
    "sft": "sft",
    "candidates": "data/candidates.jsonl",
    "comparisons": "data/comparisons-report.json",
    "reward_model": "reward-model",
    "ppo": "ppo/report.json",
}
"""Below OUT, what is there once the stage of that name is complete; the stages in their order."""

TELL_EVERY_S = 10.0


class DemoFolder:
    """A locked folder; made by ``demo_folder``."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity = identity
        self.wall_seconds: dict[str, float] = {}
        """By stage, as far as it is known of stages that earlier processes did."""

    def save(self) -> None:
        """Write demo.json."""
        content = self._identity | {"wall_seconds": self.wall_seconds}
        write_whole(self._path / "demo.json", json.dumps(content, indent=2) + "\n")

    def load(self) -> None:
        """Read demo.json; raises ConfigError when it is of another demo."""
        path = self._path / "demo.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(
                f"{self._path} holds no demo that can be resumed (no demo.json); choose another "
                "--out or remove it."
            ) from None
        wanted, found = _flat(self._identity), _flat(content)
        for key, value in wanted.items():
            if found.get(key) != value:
                raise ConfigError(
                    f"the demo in {self._path} was started with {key} {json.dumps(found.get(key))},"
                    f" not {json.dumps(value)}; set it back to resume, or choose another --out."
                )
        self.wall_seconds.update(content["wall_seconds"])


@contextlib.contextmanager
def demo_folder(config: DemoConfig) -> Iterator[DemoFolder]:
    """The folder ``config.out``, ready for the stages that it lacks, and nobody else's.

    With ``config.resume`` a demo that works there now is waited for, as the pod that takes over
    from one that is being ended must.
    """
    out = config.out
    lock = _lock(out, waits=config.resume)
    try:
        settings = config.chosen_settings.model_dump(mode="json")
        folder = DemoFolder(out, {"seed": config.seed, "settings": settings})
        has_content = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if has_content and config.resume:
            folder.load()
        else:
            if has_content:
                move_aside(out)
            out.mkdir(parents=True, exist_ok=True)
            folder.save()
        yield folder
    finally:
        os.close(lock)


def move_aside(out: Path) -> None:
    """Keep an earlier run under the first free name OUT-N."""
    number = 1
    while (aside := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    out.rename(aside)
    logger.info("the earlier run is now %s", aside)


def _lock(out: Path, *, waits: bool) -> int:
    path = out.absolute().with_name(f".{out.absolute().name}.lock")
    told = -TELL_EVERY_S
    while True:
        try:
            return take_lock(path)
        except HeldError as error:
            if not waits:
                raise ConfigError(
                    f"a demo works in {out} already ({error.holder}); wait for it, or choose "
                    "another --out."
                ) from None
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                logger.info("waiting for the demo that works in %s (%s)", out, error.holder)
        time.sleep(0.5)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        below = value if isinstance(value, dict) else None
        flat |= {prefix + key: value} if below is None else _flat(below, f"{prefix}{key}.")
    return flat
