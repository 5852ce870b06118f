"""Steps that are recorded, so that ``kleash replay`` can do them again.

    recordings/step-000003/
      before/step-000002/   a checkpoint of the run as the step found it
      calls.jsonl           every call to policy, reward, reference: request, reply or error, time
      recording.json        prompts, seeds, digests, environment; figures of the step and digests of
                            the models after its update

A recording is written into a hidden folder and renamed when the update is done: one that is there
is complete. One that cannot be written is told in the log; the run goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kleash.base.durable import flush_folder, flush_tree
from kleash.base.errors import ConfigError
from kleash.data.prompts import PromptRecord
from kleash.lm.digest import model_digest
from kleash.ppo.keep_config import RecordConfig
from kleash.ppo.learner import Learner
from kleash.ppo.recording_services import CallLog, record_services
from kleash.ppo.services import Services

logger = logging.getLogger(__name__)

FORMAT = 1


class Recorder:
    """Records the steps of one run that its configuration chooses."""

    def __init__(self, config: RecordConfig, folder: Path) -> None:
        """Args:
        folder: RUN/recordings.
        """
        self._config = config
        self._folder = folder
        self._log = CallLog()
        self._partial: Path | None = None
        self._described: dict[str, Any] = {}

    def watch(self, services: Services) -> Services:
        """The services with a witness at each, where any step is to be recorded."""
        return record_services(services, self._log) if self._config.is_on else services

    def begin(
        self,
        step: int,
        prompts: Sequence[PromptRecord],
        *,
        save_before: Callable[[Path], Path],
        described: Mapping[str, Any],
    ) -> None:
        """Step ``step`` begins; nothing happens unless it is to be recorded.

        Args:
            save_before: writes a checkpoint of the run as it is into a folder.
            described: goes into recording.json.
        """
        self.discard()
        if not self._config.chooses(step):
            return
        partial = self._folder / f".step-{step:06d}.partial"
        try:
            partial.mkdir(parents=True)
            before = save_before(partial / "before")
        except Exception as error:  # safetensors and tokenizers tell of a full disk by their own
            self._give_up(step, error)
            return
        self._partial = partial
        self._described = {
            "format": FORMAT,
            "step": step,
            **described,
            "before": str(before.relative_to(partial)),
            "prompts": [_prompt_to_json(prompt) for prompt in prompts],
        }
        self._log.open(partial / "calls.jsonl")

    def finish(self, figures: Mapping[str, float], learner: Learner) -> None:
        """The update of the step is done: these are its figures."""
        if self._partial is None:
            return
        self._log.close()
        described = self._described | {"figures": dict(figures), "after": digests_of(learner)}
        try:
            if self._log.failure is not None:
                raise self._log.failure
            self._complete(self._partial, described)
        except OSError as error:
            self._give_up(described["step"], error)
        self._partial = None

    def _complete(self, partial: Path, described: Mapping[str, Any]) -> None:
        text = json.dumps(described, indent=1, ensure_ascii=False)
        (partial / "recording.json").write_text(text + "\n", encoding="utf-8")
        flush_tree(partial)
        target = self._folder / f"step-{described['step']:06d}"
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        flush_folder(self._folder)
        for old in recordings_in(self._folder)[: -self._config.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _give_up(self, step: int, error: Exception) -> None:
        self.discard()
        logger.warning(
            "step %d is not recorded: %s; the run goes on. Make room in %s, or raise record.every "
            "or lower record.keep.",
            step,
            str(error).rstrip(".") or type(error).__name__,
            self._folder,
            extra={"event": "RecordingFailed"},
        )

    def discard(self) -> None:
        """Forget the step that was begun, and what a killed trainer left."""
        self._log.close()
        self._partial = None
        for cut_off in self._folder.glob(".step-*.partial"):
            shutil.rmtree(cut_off, ignore_errors=True)


def recordings_in(folder: Path) -> list[Path]:
    """Complete recordings, oldest first."""
    return sorted(path for path in folder.glob("step-[0-9]*") if path.name[5:].isdigit())


def digests_of(learner: Learner) -> dict[str, str]:
    """Of the weights of both models."""
    return {"policy": model_digest(learner.policy), "value": model_digest(learner.value)}


@dataclass(frozen=True)
class Recording:
    """A recorded step on disk."""

    path: Path
    described: Mapping[str, Any]
    """recording.json."""

    @property
    def step(self) -> int:
        return self.described["step"]

    @property
    def before(self) -> Path:
        """The checkpoint that the step began with."""
        return self.path / self.described["before"]

    @property
    def calls(self) -> Path:
        return self.path / "calls.jsonl"

    def prompts(self) -> list[PromptRecord]:
        """The prompts of the step, in their order."""
        return [_prompt_from_json(row) for row in self.described["prompts"]]


def open_recording(path: Path, step: int | None = None) -> Recording:
    """The recording in ``path``: a folder of one, or of a run, whose newest it is without ``step``.

    Raises ConfigError.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; name a run, or one of its recordings.")
    if not (path / "recording.json").is_file():
        path = _of_run(path, step)
    try:
        described = json.loads((path / "recording.json").read_text(encoding="utf-8"))
        written_as = described["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path / 'recording.json'} cannot be read ({error!r}); bring the file back, or take "
            "another recording."
        ) from None
    if written_as != FORMAT:
        raise ConfigError(
            f"{path} was recorded in format {written_as}, and this software reads {FORMAT}; replay "
            "it with the software that recorded it."
        )
    if step is not None and described["step"] != step:
        raise ConfigError(f"{path} holds step {described['step']}, not {step}.")
    return Recording(path, described)


def _of_run(run: Path, step: int | None) -> Path:
    found = {int(path.name[5:]): path for path in recordings_in(run / "recordings")}
    if not found:
        raise ConfigError(
            f"{run} holds no recordings; record steps with kleash ppo --record.steps='[1]' or "
            "--record.every=10."
        )
    if step is None:
        return found[max(found)]
    if step not in found:
        there = ", ".join(map(str, found))
        raise ConfigError(f"step {step} is not recorded in {run}; there are {there}.")
    return found[step]


def _prompt_to_json(prompt: PromptRecord) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id,
        "text": prompt.text,
        "messages": prompt.messages,
        "ids": prompt.ids.tolist(),
    }


def _prompt_from_json(row: Mapping[str, Any]) -> PromptRecord:
    ids = np.array(row["ids"], dtype=np.int32)
    return PromptRecord(row["prompt_id"], row["text"], row["messages"], ids, {})
