"""What ``kleash watch`` makes of a run's figures: pace, time left, sparklines, the picture."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from kleash.base.errors import ConfigError, UserError
from kleash.cli.trainer_target import find_trainer
from kleash.cli.watch import outcome
from kleash.cli.watch_state import RunView, describe_state, duration, sparkline
from kleash.cli.watch_view import render
from kleash.trainer.v1 import trainer_pb2

pytestmark = pytest.mark.unit


def view_of(num_steps: int, *, total_steps: int = 100, state: str = "RUN_STATE_RUNNING") -> RunView:
    view = RunView()
    view.take_run(trainer_pb2.GetRunResponse(run_id="a-run", state=state, total_steps=total_steps))
    for step in range(1, num_steps + 1):
        values = {"score_mean": step / 10, "time_generate_s": 1.5, "time_update_s": 0.5}
        view.take_step(
            trainer_pb2.StepMetrics(step=step, weights_version=step, step_s=2.0, values=values)
        )
    return view


def test_pace_and_time_left_are_those_of_the_newest_steps() -> None:
    view = view_of(30)
    assert (view.run.step, view.run.weights_version) == (30, 30)
    assert (view.step_s, view.left_s) == (2.0, 140.0)
    for step in range(31, 51):
        view.take_step(trainer_pb2.StepMetrics(step=step, step_s=4.0))
    assert (view.step_s, view.left_s) == (4.0, 200.0)
    view.is_over = True
    assert view.left_s is None


def test_without_a_step_there_is_no_pace() -> None:
    assert (view_of(0).step_s, view_of(0).left_s) == (None, None)


def test_steps_that_are_done_again_are_forgotten() -> None:
    view = view_of(6)
    view.cut_back(4)
    assert view.series("score_mean") == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 8, ""),
        ([1.0], 8, "▄"),
        ([2.0, 2.0], 8, "▄▄"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
        # Groups count from the end: the lone first value is one of its own.
        ([7, 0, 0, 0, 0], 3, "█▁▁"),
        ([0, float("nan"), 7], 3, "▁!█"),
        ([float("inf"), float("nan")], 3, "!!"),
    ],
)
def test_a_sparkline(values: list[float], width: int, drawn: str) -> None:
    assert sparkline(values, width) == drawn


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (0.304, "0.30 s"),
        (0.999, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.6, "2 min"),
        (7000, "117 min"),
        (7200, "2 h"),
        (86400 * 4, "4 days"),
    ],
)
def test_a_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_state_is_a_sentence() -> None:
    view = view_of(12, state="RUN_STATE_PAUSED")
    assert describe_state(view.run) == "paused after step 12 of 100"
    assert describe_state(trainer_pb2.GetRunResponse()) == "starting"
    view = view_of(12, state="RUN_STATE_FAILED")
    view.run.error_message = "no memory."
    assert outcome(view) == "failed after step 12 of 100: no memory."
    stopped = view_of(12, state="RUN_STATE_STOPPING")
    assert stopped.state == "stopping"
    stopped.is_over = True
    assert stopped.state == "stopped"
    assert outcome(stopped) == "stopped after step 12 of 100; kleash ppo --resume goes on"


@pytest.mark.parametrize("width", [40, 80, 110])
def test_the_picture_fits_and_holds_what_is_known(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(render(view_of(30), width=width, place="a:1", notice="a notice", has_keys=True))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for told in ("a-run", "running", "a:1", "a notice", "none yet", "pause", "stop"):
        assert told in text, told
    if width >= 80:
        for told in (
            "step 30 of 100",
            "2.0 s a step",
            "2 min left",
            "▁",
            "█",
            "1.5\N{NO-BREAK SPACE}s",
        ):
            assert told in text, told


def test_a_trainer_is_named_by_its_address_or_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_trainer("localhost:50051") == ("localhost:50051", "", None)
    assert find_trainer("dns:///trainer:50051").address == "dns:///trainer:50051"
    (tmp_path / "trainer.json").write_text('{"run_id": "r", "address": "a:1", "page": ""}')
    assert find_trainer(str(tmp_path)) == ("a:1", "r", tmp_path)
    monkeypatch.setenv("KLEASH_TRAINER_ADDRESS", "b:2")
    assert find_trainer(None).address == "b:2"
    monkeypatch.delenv("KLEASH_TRAINER_ADDRESS")
    with pytest.raises(ConfigError, match="name the trainer, as HOST:PORT or by its run folder"):
        find_trainer(None)
    with pytest.raises(ConfigError, match="'nowhere' is neither a folder here nor HOST:PORT"):
        find_trainer("nowhere")


def test_a_folder_without_a_trainer_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run; kleash ppo --out="):
        find_trainer(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has had no trainer yet"):
        find_trainer(str(tmp_path))
