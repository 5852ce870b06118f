"""Sinks: TensorBoard, W&B (offline) and MLflow (a database file) by their own packages.

A run of three steps with an evaluation after each is stopped after the second, of which no
checkpoint is left, and resumed: step 2 is done twice.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.test_ppo_resume import stop_after
from tests.wandb_file import config_of, history, run_of

from kleash.base.errors import ConfigError
from kleash.ppo.config import PPOConfig
from kleash.ppo.control import Control
from kleash.ppo.train import train
from kleash.sinks import config as sinks_config
from kleash.sinks.config import SinksConfig, check_packages
from kleash.sinks.feed import Feed
from kleash.sinks.sink import RunDescription

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit

SINKS = {"use": ["tensorboard", "wandb", "mlflow"], "wandb": {"mode": "offline"}}


@pytest.fixture(scope="module")
def out(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder, resumed once."""
    out = tmp_path_factory.mktemp("sinks") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        _run(world, out, stop_at=2)
        shutil.rmtree(out / "checkpoints" / "step-000002")
        _run(world, out, stop_at=None)
    return out


def _run(world: World, out: Path, *, stop_at: int | None) -> None:
    control = Control()
    if stop_at:
        stop_after(control, stop_at)
    config = world.config(
        out,
        run_id="a-run",
        total_steps=3,
        resume=True,
        sinks=SINKS,
        samples={"per_step": 2},
        checkpoint={"every": 1, "keep": 3},
        evaluation={"prompts": str(world.prompts), "every": 1, "num_prompts": 2},
    )
    train(config, world.services(), control=control)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def series(out: Path, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows(out) if key in row]


def test_tensorboard_shows_every_step_once(out: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    for key in ("score_mean", "kl_per_sequence", "evaluation/score_mean", "step_s"):
        seen = [(event.step, event.value) for event in events.Scalars(key)]
        assert seen == [(step, pytest.approx(value)) for step, value in series(out, key)]
    # Its reader in Python, unlike its server, purges scalars alone.
    samples = {event.step for event in events.Tensors("samples/text_summary")}
    assert samples == {1, 2, 3}
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```"))["run_id"] == "a-run"


def test_wandb_has_every_step_once(out: Path) -> None:
    first, second = sorted((out / "wandb").glob("offline-run-*/*.wandb"), key=_time_of)
    assert [run_of(file).run_id for file in (first, second)] == ["a-run", "a-run"]
    assert [row["_step"] for row in history(first)] == [0, 1, 2]
    assert [row["_step"] for row in history(second)] == [3]
    logged = {row["_step"]: row for file in (first, second) for row in history(file)}
    assert set(logged[1]) >= {"score_mean", "step_s", "evaluation/score_mean", "samples/path"}
    # Step 2 was done twice, with the same figures.
    for key in ("score_mean", "kl_per_sequence", "evaluation/score_mean"):
        seen = [(step, row[key]) for step, row in logged.items() if key in row]
        assert seen == [(step, pytest.approx(value)) for step, value in series(out, key)]
    assert logged[3]["samples/nrows"] == 2
    config = config_of(first)
    assert config["batch_size"] == 12
    assert config["environment"]["machine"]["device"] == "cpu"


def _time_of(path: Path) -> float:
    return path.stat().st_mtime


def test_mlflow_has_every_step_once(out: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("kleash")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["kleash.run_id"] == "a-run"
    assert run.data.params["kl.coefficient"] == "0.05"
    assert run.info.status == "FINISHED"
    for key in ("score_mean", "evaluation/score_mean"):
        seen = [(it.step, it.value) for it in client.get_metric_history(run.info.run_id, key)]
        assert sorted(seen) == [(step, pytest.approx(value)) for step, value in series(out, key)]
    tables = sorted((out / "mlflow").glob("**/samples/*.json"))
    assert [path.name for path in tables] == [f"step-00000{step}.json" for step in (1, 2, 3)]
    table = json.loads(tables[0].read_text())
    sample = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    cells = dict(zip(table["columns"], table["data"][0], strict=True))
    assert cells["prompt"] == sample["prompt"]
    assert cells["kl"] == pytest.approx(sum(sample["kl"]))
    assert cells["length"] == len(sample["response_token_ids"])


class Recording:
    """A sink that notes its calls, and fails or waits when it is told to."""

    def __init__(
        self, *, fails_at: int | None = None, waits: threading.Event | None = None
    ) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._fails_at = fails_at
        self._waits = waits

    def begin(self, run: RunDescription) -> None:
        self.calls.append(("begin", run.run_id))
        if self._waits:
            self._waits.wait()

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        if step == self._fails_at:
            raise OSError("no space left on the device")
        self.calls.append(("metrics", (step, dict(figures))))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.calls.append(("samples", step))

    def end(self, state: str) -> None:
        self.calls.append(("end", state))


def feed(tmp_path: Path, **sinks: Recording) -> Feed:
    return Feed(sinks, RunDescription("a-run", "ppo", tmp_path, total_steps=3))


def test_a_sink_that_fails_is_left_out_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Recording(fails_at=2), Recording()
    with caplog.at_level(logging.WARNING), feed(tmp_path, bad=bad, good=good) as its:
        for step in (1, 2, 3):
            its.metrics(step, {"step": step, "score_mean": 0.5})
    assert bad.calls == [("begin", "a-run"), ("metrics", (1, {"score_mean": 0.5}))]
    assert [name for name, _ in good.calls] == ["begin", "metrics", "metrics", "metrics", "end"]
    assert good.calls[-1] == ("end", "completed")
    (message,) = caplog.messages
    assert message == (
        "the sink bad gets no further figures: no space left on the device; the run goes on, and "
        "its folder has them all."
    )


def test_a_sink_that_hangs_does_not_hold_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    slow, good = Recording(waits=released), Recording()
    its = feed(tmp_path, slow=slow, good=good)
    its.metrics(1, {"score_mean": 0.5})
    its.end("stopped", wait_s=0.2)
    released.set()
    assert good.calls[-1] == ("end", "stopped")
    assert "the sink slow gets no further figures: it was not done in time" in caplog.text


def test_sinks_are_told_how_a_run_ended(tmp_path: Path) -> None:
    stopped, failed = Recording(), Recording()
    with feed(tmp_path, sink=stopped) as its:
        its.metrics(1, {})
    with pytest.raises(KeyError), feed(tmp_path, sink=failed):
        raise KeyError
    assert stopped.calls[-1] == ("end", "stopped")
    assert failed.calls[-1] == ("end", "failed")


def test_a_run_goes_on_when_its_sinks_cannot_be_opened(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is where the events should go, the database's folder is not there, W&B has no key."""
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    sinks = {
        "use": ["tensorboard", "wandb", "mlflow"],
        "tensorboard": {"folder": str(tmp_path / "file" / "below")},
        "mlflow": {"tracking_uri": "unknown://nowhere"},
    }
    report = train(world.config(tmp_path / "run", sinks=sinks), world.services())
    assert report.is_complete
    for name in ("tensorboard", "wandb", "mlflow"):
        assert caplog.text.count(f"the sink {name} gets no further figures") == 1


def test_a_missing_package_is_named_before_anything_is_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks_config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"names wandb, .*pip install 'kleash\[wandb\]'"):
        train(world.config(tmp_path / "run", sinks={"use": ["wandb"]}), world.services())
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    assert importlib.util.find_spec("wandb")
    check_packages(SinksConfig(use=("wandb",)))


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        ({"use": ["wandb", "wandb"]}, "names a sink twice"),
        ({"wandb": {"mode": "offline"}}, "wandb has no effect without being in use"),
        ({"use": "wandb,mlflow", "mlflow": {"tracking_uri": "http://me:x@host"}}, "must not hold"),
    ],
)
def test_settings_that_make_no_sense(world: World, sinks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig.model_validate(world.config(Path("run")).model_dump() | {"sinks": sinks})
