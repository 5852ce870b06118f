"""MLflow, by its client alone: a tracking server, or a database in a file.

The run is found by its tag ``kleash.run_id``. MLflow does not take figures back: steps that a
resumed run does again are left out where the run has them, so that each is there once, with its
first figures.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kleash.sinks.config import MLflowConfig
from kleash.sinks.sink import SAMPLE_COLUMNS, End, RunDescription, flattened, sample_table

TAG = "kleash.run_id"
STATES: Mapping[End, str] = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
PARAMETERS_A_CALL = 100
"""MLflow takes no more."""


class MLflowSink:
    """Figures by step, parameters, and as artifacts the configuration and tables of samples."""

    def __init__(self, config: MLflowConfig) -> None:
        self._config = config
        self._client: Any = None
        self._run_id = ""
        self._known: dict[str, int] = {}
        """The highest step that the run has, by the kind of figures."""

    def begin(self, run: RunDescription) -> None:
        """Find the run or make it."""
        from mlflow.tracking import MlflowClient

        is_local = not (self._config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
        folder = run.out.resolve()
        address = f"sqlite:///{folder}/mlflow.db" if is_local else self._config.tracking_uri
        self._client = MlflowClient(tracking_uri=address)
        experiment = self._client.get_experiment_by_name(self._config.experiment)
        place = f"{folder}/mlflow" if is_local else None
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(self._config.experiment, artifact_location=place)
        )
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{TAG}` = '{run.run_id}'", max_results=1
        )
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            self._known = {
                kind: self._newest_step(key)
                for kind, key in (("step", "step_s"), ("evaluation", "evaluation/score_mean"))
            }
        else:
            made = self._client.create_run(
                experiment_id, run_name=run.run_id, tags={TAG: run.run_id, "stage": run.stage}
            )
            self._run_id = made.info.run_id
        self._describe(run, dict(found[0].data.params) if found else {})

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """One call for all figures of a step."""
        from mlflow.entities import Metric

        kind = "evaluation" if any(key.startswith("evaluation/") for key in figures) else "step"
        if step <= self._known.get(kind, -1):
            return
        now_ms = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now_ms, step) for key, value in figures.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table for each step; one that is done again replaces its table."""
        table = {"columns": SAMPLE_COLUMNS, "data": sample_table(rows)}
        text = json.dumps(table, ensure_ascii=False)
        self._client.log_text(self._run_id, text, f"samples/step-{step:06d}.json")

    def end(self, state: End) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._run_id, status=STATES[state])

    def _describe(self, run: RunDescription, known: Mapping[str, str]) -> None:
        """Parameters cannot be changed once set: those of the first start stay."""
        from mlflow.entities import Param

        parameters = [
            Param(key, str(value)) for key, value in flattened(run.config) if key not in known
        ]
        for first in range(0, len(parameters), PARAMETERS_A_CALL):
            part = parameters[first : first + PARAMETERS_A_CALL]
            self._client.log_batch(self._run_id, params=part)
        self._client.log_dict(self._run_id, dict(run.config), "config.json")
        self._client.log_dict(self._run_id, dict(run.environment), "environment.json")

    def _newest_step(self, key: str) -> int:
        history = self._client.get_metric_history(self._run_id, key)
        return max((metric.step for metric in history), default=-1)
