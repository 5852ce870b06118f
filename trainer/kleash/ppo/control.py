"""Steering a run from outside of its loop: other threads ask, the loop answers between two steps.

gRPC handlers, signal handlers ──► Control ◄── the training loop
   pause, resume, stop,             state,       may_continue() between steps,
   request_checkpoint, snapshot     steps        is_abandoned() inside a rollout
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any


class RunState(Enum):
    """Where a run is; the names are those of trainer.proto."""

    STARTING = 1
    RUNNING = 2
    PAUSED = 3
    STOPPING = 4
    COMPLETED = 5
    FAILED = 6


@dataclass(frozen=True)
class Snapshot:
    """What is known about the run at one moment."""

    run_id: str = ""
    state: RunState = RunState.STARTING
    step: int = 0
    total_steps: int = 0
    weights_version: int = 0
    checkpoint_step: int = 0
    config_json: str = ""
    error_message: str = ""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk."""

    path: Path
    step: int


@dataclass
class Control:
    """Thread-safe. The loop writes, everyone reads, requests are answered by the loop."""

    steps: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every step so far; only ever appended to."""
    samples: Sequence[dict[str, Any]] = ()
    """Lines of samples.jsonl of the newest step that has some."""
    address: str = ""
    """Of the trainer's own gRPC service, from this machine; empty without one."""
    page: str = ""
    """Address of the live page; empty without one."""
    signal_number: int = 0
    """The signal that ends the run; 0 for none."""

    def __post_init__(self) -> None:
        self._condition = threading.Condition()
        self._snapshot = Snapshot()
        self._is_pausing = self._is_stopping = self._is_abandoning = self._is_over = False
        self._requests: list[Future[SavedCheckpoint]] = []
        self._listeners: list[Callable[[], None]] = []

    # ------------------------------------------------------------------ asked from other threads

    @property
    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        snapshot = self._snapshot
        if self._is_stopping and not self._is_over:
            return replace(snapshot, state=RunState.STOPPING)
        return snapshot

    @property
    def is_over(self) -> bool:
        """No further step will come."""
        return self._is_over

    def pause(self) -> RunState:
        """No further step starts; the one in progress ends."""
        return self._change(is_pausing=True)

    def resume(self) -> RunState:
        """Go on after ``pause``."""
        return self._change(is_pausing=False)

    def stop(self, *, abandon_rollout: bool = False, signal_number: int = 0) -> RunState:
        """End the run after the step in progress, with a checkpoint.

        ``abandon_rollout``: if the step is still collecting its rollout, give that up and end at
        once; nothing is lost but the responses, which a resumed run draws again.
        ``signal_number``: the signal that asks for it; 0 for a caller.

        Takes no lock: a signal handler calls it in the middle of anything the main thread does.
        """
        self._is_stopping = True
        self._is_abandoning |= abandon_rollout
        self.signal_number = self.signal_number or signal_number
        return self._snapshot.state if self._is_over else RunState.STOPPING

    def request_checkpoint(self) -> Future[SavedCheckpoint]:
        """A checkpoint after the step in progress; the future is done when it is on disk."""
        request: Future[SavedCheckpoint] = Future()
        with self._condition:
            if self._is_over:
                request.set_exception(
                    RuntimeError("the run is over; its last checkpoint is complete.")
                )
            else:
                self._requests.append(request)
                self._condition.notify_all()
        return request

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener``, from any thread, whenever a step was added or the run has changed."""
        with self._condition:
            self._listeners.append(listener)

    def remove_listener(self, listener: Callable[[], None]) -> None:
        """Undo ``add_listener``."""
        with self._condition:
            self._listeners.remove(listener)

    # ------------------------------------------------------------------------ called by the loop

    def is_abandoned(self) -> bool:
        """Whether the rollout in progress is to be given up."""
        return self._is_abandoning

    def may_continue(self, save: Callable[[], SavedCheckpoint]) -> bool:
        """Between two steps: answer requests for checkpoints, wait while paused; False to stop."""
        while True:
            with self._condition:
                requests = list(self._requests)
                if not requests:
                    if self._is_stopping:
                        self._update(state=RunState.STOPPING)
                        return False
                    if not self._is_pausing:
                        self._update(state=RunState.RUNNING)
                        return True
                    self._update(state=RunState.PAUSED)
                    # A signal handler sets a flag without notifying: look again soon.
                    self._condition.wait(timeout=0.2)
            if requests:
                saved = save()
                with self._condition:
                    del self._requests[: len(requests)]
                for request in requests:
                    # A caller that went away has cancelled its future.
                    if request.set_running_or_notify_cancel():
                        request.set_result(saved)

    def begin(self, snapshot: Snapshot, steps: list[dict[str, float]]) -> None:
        """The run is loaded: what is known about it, and the metrics of earlier steps."""
        with self._condition:
            self.steps.extend(steps)
            self._snapshot = snapshot
        self._tell()

    def step_done(self, metrics: dict[str, float]) -> None:
        """A step ended; ``metrics`` holds step and weights_version."""
        with self._condition:
            self.steps.append(metrics)
            self._update(step=int(metrics["step"]), weights_version=int(metrics["weights_version"]))
        self._tell()

    def checkpoint_saved(self, step: int) -> None:
        """A checkpoint of ``step`` is on disk."""
        with self._condition:
            self._update(checkpoint_step=step)
        self._tell()

    def samples_kept(self, rows: Sequence[dict[str, Any]]) -> None:
        """Responses of a step were written to samples.jsonl."""
        self.samples = rows

    def end(self, state: RunState, error_message: str = "") -> None:
        """The run is over: COMPLETED, FAILED, or STOPPING when it ended before its last step."""
        with self._condition:
            self._is_over = True
            self._update(state=state, error_message=error_message)
            requests, self._requests = self._requests, []
        for request in requests:
            if request.set_running_or_notify_cancel():
                request.set_exception(RuntimeError(error_message or "the run is over."))
        self._tell()

    def _change(self, *, is_pausing: bool) -> RunState:
        with self._condition:
            if self._is_over:
                return self._snapshot.state
            if self._is_stopping:
                return RunState.STOPPING
            self._is_pausing = is_pausing
            if self._snapshot.state is not RunState.STARTING:
                self._update(state=RunState.PAUSED if is_pausing else RunState.RUNNING)
            self._condition.notify_all()
            state = self._snapshot.state
        self._tell()
        return state

    def _update(self, **changes: object) -> None:
        self._snapshot = replace(self._snapshot, **changes)  # pyright: ignore[reportArgumentType]

    def _tell(self) -> None:
        with self._condition:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()
