"""The files of a run beside its checkpoints, and the lock that keeps a second trainer out.

OUT/run.json        id of the run, and the fence: how often a trainer started on it
OUT/config.json     the resolved configuration
OUT/environment.json  what each start of a trainer was computed with
OUT/recordings/     steps with all requests and replies, see record.*
OUT/weights/        versions of the policy that were published, for replicas that fall behind
OUT/metrics.jsonl   a line a step and a line an evaluation
OUT/samples.jsonl   a line a response that was kept to be read
OUT/traces/         spans of the steps that were traced
OUT/trainer.json    where the newest trainer listens, for whoever is on its machine
OUT/trainer.lock    held by the living trainer; the kernel lets go of it whatever way that ends
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kleash.base.config import save_config
from kleash.base.durable import write_whole
from kleash.base.errors import ConfigError
from kleash.base.lock_file import HeldError, take_lock
from kleash.ppo.config import PPOConfig
from kleash.rpc.errors import Unavailable

LOCK_NAME = "trainer.lock"


class RunFolder:
    """A locked run folder; made by ``open_run_folder``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_id = ""
        self.fence = 0

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def recordings(self) -> Path:
        return self.path / "recordings"

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    def holds_a_run(self) -> bool:
        """Whether a trainer has been here."""
        return any(
            (self.path / name).exists()
            for name in ("run.json", "metrics.jsonl", "checkpoints", "policy")
        )

    def begin(self, config: PPOConfig, seen_fence: int) -> None:
        """A trainer starts: save the configuration and raise the fence above every one before.

        ``seen_fence`` is the highest that a policy replica knows: a new trainer always takes over,
        and one that was believed dead is refused when it publishes. Raises ConfigError when the
        folder's run has another id than ``config.run_id``.
        """
        path = self.path / "run.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.run_id = self._run_id(known.get("run_id"), config.run_id)
        self.fence = max(known.get("fence", 0), seen_fence) + 1
        write_whole(path, json.dumps({"run_id": self.run_id, "fence": self.fence}) + "\n")
        partial = self.path / ".config.json.partial"
        save_config(config, partial)
        partial.replace(self.path / "config.json")

    def add_start(self, described: dict[str, Any]) -> None:
        """Add an entry to environment.json."""
        write_whole(
            self.path / "environment.json",
            json.dumps([*self.read_starts(), described], indent=2, ensure_ascii=False) + "\n",
        )

    def read_starts(self) -> list[dict[str, Any]]:
        """The entries of environment.json, oldest first."""
        path = self.path / "environment.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def note_addresses(self, address: str, page: str) -> None:
        """Say where this trainer's service and its live page are; empty for none."""
        text = json.dumps({"run_id": self.run_id, "address": address, "page": page})
        write_whole(self.path / "trainer.json", text + "\n")

    def _run_id(self, known: str | None, wanted: str | None) -> str:
        """The id that the folder's run has, or that a new run gets."""
        if known and wanted and known != wanted:
            raise ConfigError(
                f"{self.path} holds the run {known!r}, and run_id is {wanted!r}; resume it as "
                f"{known!r}, or start the other one in another --out."
            )
        return known or wanted or f"{self.path.resolve().name}-{secrets.token_hex(4)}"

    # ------------------------------------------------------------------------------- metrics.jsonl

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every complete line; a last one that was cut by a crash is left out."""
        path = self.path / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a line that survives a crash of the machine."""
        _append(self.path / "metrics.jsonl", [row])

    def append_samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add lines to samples.jsonl."""
        _append(self.path / "samples.jsonl", rows)

    def cut_back(self, step: int) -> None:
        """Forget what came after ``step``: it will be done again. -1 forgets everything."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (self.path / name).exists():
                _cut_back(self.path / name, step)
        for path in self.evaluations.glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()
        for path in self.recordings.glob("step-[0-9]*"):
            number = path.name.removeprefix("step-")
            if number.isdigit() and int(number) > step:
                shutil.rmtree(path)


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _cut_back(path: Path, step: int) -> None:
    """End the file before the first line of a later step, or one that a crash cut."""
    size = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            size += len(line)
    os.truncate(path, size)


@contextlib.contextmanager
def open_run_folder(path: Path, *, resume: bool, has_lease: bool = False) -> Iterator[RunFolder]:
    """Create the folder if need be and lock it; a start that wrote nothing leaves nothing behind.

    Raises ConfigError when another trainer lives there, or there is a run and ``resume`` is off;
    Unavailable for the former with a lease: that trainer has lost it, and is on its way out.
    """
    existed = path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(path / LOCK_NAME)
    except HeldError as error:
        if has_lease:
            raise Unavailable(
                f"the trainer before has lost its lease and still works in {path} "
                f"({error.holder}); this run goes on when it is gone.",
                reason="RUN_FOLDER_HELD",
            ) from None
        raise ConfigError(
            f"a trainer works in {path} already ({error.holder}); stop it, or choose another --out."
        ) from None
    try:
        folder = RunFolder(path)
        if folder.holds_a_run() and not resume:
            raise ConfigError(
                f"{path} holds a run already; go on with it with --resume, or choose another --out."
            )
        yield folder
    finally:
        if not existed and [entry.name for entry in path.iterdir()] == [LOCK_NAME]:
            (path / LOCK_NAME).unlink()
            path.rmdir()
        os.close(lock)
