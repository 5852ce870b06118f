"""Run folders as the report reads them: living, crashed, short, and folders that are no run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.run_folders import write_run

from kleash.base.errors import ConfigError
from kleash.base.lock_file import take_lock
from kleash.evaluate.run_data import read_run, read_runs

pytestmark = pytest.mark.unit


def test_steps_and_evaluations_are_told_apart(tmp_path: Path) -> None:
    run = read_run(
        write_run(
            tmp_path / "a-run",
            {"score_mean": [0.0, 0.5, 1.0]},
            evaluations={"evaluation/score_mean": [0.25, 0.75]},
            every=2,
        )
    )
    assert run.name == "a-run"
    assert run.series("score_mean") == {1: 0.0, 2: 0.5, 3: 1.0}
    assert run.series("evaluation/score_mean") == {0: 0.25, 2: 0.75}
    assert run.series("entropy") == {}
    assert (run.state, run.seed, run.last_step) == ("complete", 0, 3)


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {"score_mean": [0.5]}, num_samples=1, is_complete=False)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (path / name).open("a") as file:
            file.write('{"step": 2, "score_me')
    run = read_run(path)
    assert (len(run.steps), len(run.samples), run.state) == (1, 1, "stopped")


def test_a_line_in_the_middle_that_is_broken_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {"score_mean": [0.5]})
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sco\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"line 2 of .*metrics\.jsonl is no JSON object"):
        read_run(path)


def test_a_living_trainer_is_seen_and_not_disturbed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {"score_mean": [0.5]}, is_complete=False)
    lock = take_lock(path / "trainer.lock")
    assert read_run(path).state == "running"
    os.close(lock)
    assert read_run(path).state == "stopped"
    os.close(take_lock(path / "trainer.lock"))


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder; give the --out folder"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    with pytest.raises(ConfigError, match=r"holds no PPO run: there is no run\.json"):
        read_run(tmp_path / "sft")
    write_run(tmp_path / "demo" / "ppo", {"score_mean": [0.5]})
    with pytest.raises(ConfigError, match=r"is no run, but holds some; give .*/demo/ppo\."):
        read_run(tmp_path / "demo")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="without a single step or evaluation yet"):
        read_run(tmp_path / "new")


def test_a_folder_that_is_named_twice_is_one_run(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {"score_mean": [0.5]})
    assert len(read_runs([path, path.parent / "run" / ".." / "run"])) == 1
