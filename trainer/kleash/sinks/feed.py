"""Figures to the sinks, from threads of their own: training neither waits for them nor fails.

training ──► queue ──► thread ──► sink      one queue and one thread for each sink
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from kleash.sinks.config import Name, SinksConfig
from kleash.sinks.mlflow import MLflowSink
from kleash.sinks.sink import End, RunDescription, Sink
from kleash.sinks.tensorboard import TensorBoardSink
from kleash.sinks.wandb import WandbSink

logger = logging.getLogger(__name__)

QUEUE_CALLS = 1000
"""That may wait for a slow sink: some hundred steps."""
END_WAIT_S = 60.0
"""Longest wait for the sinks at the end of a run, all of them together."""

Call = Callable[[Sink], None]


class Feed:
    """All sinks of a run. A context that ends them; nothing here raises for a sink's sake."""

    def __init__(self, sinks: Mapping[str, Sink], run: RunDescription) -> None:
        self._lines = [_Line(name, sink) for name, sink in sinks.items()]
        self._run = run
        self._step = run.from_step
        self._put(lambda sink: sink.begin(run))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_done = self._step >= self._run.total_steps
        self.end("failed" if kind else "completed" if is_done else "stopped")

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step or an evaluation; ``step`` among them is left out."""
        kept = {key: value for key, value in figures.items() if key != "step"}
        self._step = step
        self._put(lambda sink: sink.metrics(step, kept))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of samples.jsonl of a step."""
        self._put(lambda sink: sink.samples(step, rows))

    def end(self, state: End, wait_s: float = END_WAIT_S) -> None:
        """Tell every sink, and wait until they are done or time is up."""
        self._put(lambda sink: sink.end(state))
        deadline = time.monotonic() + wait_s
        for line in self._lines:
            line.finish(max(deadline - time.monotonic(), 0.0))

    def _put(self, call: Call) -> None:
        for line in self._lines:
            line.put(call)


class _Line:
    """The queue of one sink and the thread that empties it."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name = name
        self._sink = sink
        self._calls: queue.Queue[Call | None] = queue.Queue(QUEUE_CALLS)
        self._is_alive = True
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Call | None) -> None:
        """Without waiting; None is the last."""
        if not self._is_alive:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"{QUEUE_CALLS} calls wait for it")

    def finish(self, wait_s: float) -> None:
        """Wait for what was put; a thread that hangs is left behind, and ends with the process."""
        self.put(None)
        if self._is_alive:
            self._thread.join(wait_s)
            if self._thread.is_alive():
                self._give_up("it was not done in time at the end of the run")

    def _work(self) -> None:
        while self._is_alive and (call := self._calls.get()) is not None:
            try:
                call(self._sink)
            except Exception as error:  # the border of somebody else's software
                self._give_up(str(error).strip().rstrip(".") or type(error).__name__)

    def _give_up(self, reason: str) -> None:
        """Once: a sink that has failed is not called again."""
        if self._is_alive:
            self._is_alive = False
            logger.warning(
                "the sink %s gets no further figures: %s; the run goes on, and its folder has "
                "them all.",
                self._name,
                reason,
                extra={"event": "SinkFailed"},
            )


def make_sinks(config: SinksConfig) -> dict[str, Sink]:
    """Those in use, by name."""
    makers: dict[Name, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoardSink(config.tensorboard),
        "wandb": lambda: WandbSink(config.wandb),
        "mlflow": lambda: MLflowSink(config.mlflow),
    }
    return {name: makers[name]() for name in config.use}
