"""Progress of a stage: what a pod prints is what a caller reads, and what the terminal shows."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from kleash.cli.progress import TerminalProgress
from kleash.cluster.diagnosis import Reason
from kleash.cluster.progress import RunDisplay, describe
from kleash.cluster.progress_lines import StageProgress, read_progress
from kleash.cluster.run_record import StageState
from kleash.cluster.stage_view import StageView
from kleash.cluster.stages import Stage

pytestmark = pytest.mark.unit


def pod_log(*, width: int = 80) -> tuple[TerminalProgress, io.StringIO]:
    """Progress as it is printed in a pod, where there is no terminal."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=False, width=width)
    return TerminalProgress(console, interval_s=0.0), output


@pytest.mark.parametrize("task", ["PPO", "SFT", "reward model", "base model"])
def test_what_a_pod_prints_is_read(task: str) -> None:
    progress, output = pod_log()
    progress.start(20, task)
    assert read_progress(output.getvalue()) == StageProgress(task, 0, 20)
    progress.advance(11)
    progress.advance(1, score=0.512345, kl=3.1, reward=-2.5e-7, learning_rate=1e-05)
    log = f"12:00:00 INFO kleash: x\n{output.getvalue()}12:00:01 INFO a: 1/2 b\n"
    found = read_progress(log)
    assert found is not None
    assert (found.task, found.done, found.total) == (task, 12, 20)
    assert found.figures == {
        "score": "0.5123",
        "kl": "3.1",
        "reward": "-2.5e-07",
        "learning_rate": "1e-05",
    }
    assert found.left_s == 0


def test_the_newest_line_counts() -> None:
    log = "SFT: 1/10  loss 2.5  10 s, 90 s left\nSFT: 2/10  loss 2.25  20 s, 80 s left\nother: x\n"
    assert read_progress(log) == StageProgress("SFT", 2, 10, {"loss": "2.25"}, 80)
    assert read_progress("nothing here\n3/4\nerror: 3/4 of it\n") is None


def plain() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=False, width=60), output


def without_clock(text: str) -> list[str]:
    return [re.sub(r"^\d\d:\d\d:\d\d |  \d+ s$", "", line) for line in text.splitlines()]


def test_without_a_terminal_news_get_a_line_each() -> None:
    console, output = plain()
    reason = Reason("no node takes pod sft-x: 1 Insufficient cpu; ask for less, or add [a] node")
    waiting = StageView(Stage.SFT, StageState.RUNNING, 0, 1, reasons=(reason,))
    running = StageView(Stage.SFT, StageState.RUNNING, 1, 1, StageProgress("SFT", 3, 9))
    with RunDisplay([Stage.SETUP, Stage.SFT], console) as display:
        display.note("stage sft has started")
        for view in (waiting, waiting, running, running):
            display.show(view)
        display.show(StageView(Stage.SFT, StageState.COMPLETE, 0, 1))
        display.log("end of the log", "one\ntwo [red]")
    assert without_clock(output.getvalue()) == [
        "stage sft has started",
        f"sft: running  pods 0/1  {reason.text}",
        "sft: running  pods 1/1  SFT 3/9",
        "sft: complete",
        "--- end of the log",
        "  | one",
        "  | two [red]",
        "---",
    ]


def test_without_a_terminal_progress_gets_a_line_now_and_then() -> None:
    console, output = plain()
    with RunDisplay([Stage.PPO], console, line_every_s=0.0) as display:
        for done in range(3):
            progress = StageProgress("PPO", done, 3, {"kl": "1.5"}, 3 - done)
            display.show(StageView(Stage.PPO, StageState.RUNNING, 1, 1, progress))
    assert without_clock(output.getvalue()) == [
        "ppo: running  pods 1/1  PPO 0/3  kl 1.5  3 s left",
        "ppo: running  pods 1/1  PPO 1/3  kl 1.5  2 s left",
        "ppo: running  pods 1/1  PPO 2/3  kl 1.5  1 s left",
    ]


def test_a_terminal_shows_every_stage() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, color_system=None)
    with RunDisplay([Stage.SETUP, Stage.SFT, Stage.PPO], console) as display:
        display.show(StageView(Stage.SFT, StageState.COMPLETE))
        display.show(
            StageView(
                Stage.PPO, StageState.RUNNING, 1, 1, StageProgress("PPO", 2, 3, {"kl": "[1]"})
            )
        )
    lines = output.getvalue().splitlines()
    *_, sft, ppo = [line for line in lines if "sft" in line or "ppo" in line]
    assert re.search(r"sft +complete", sft)
    assert re.search(r"ppo +running +pods 1/1  PPO 2/3  kl \[1\]", ppo)


def test_many_reasons_are_counted() -> None:
    reasons = tuple(Reason(f"reason {number}") for number in range(4))
    view = StageView(Stage.SERVICES, StageState.RUNNING, 0, 4, reasons=reasons)
    assert describe(view) == "pods 0/4  reason 0  reason 1  and 2 reasons more"
    paused = StageView(Stage.PPO, StageState.PAUSED, 0, 1)
    assert describe(paused) == "pods 0/1  kleash k8s resume goes on"
