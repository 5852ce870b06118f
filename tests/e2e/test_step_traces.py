"""``kleash up`` with tracing: one trace a step, through all four processes; ``kleash trace``."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kleash.base.config import Config, describe_config
from kleash.ppo.config import PPOConfig
from kleash.traces.read import StepTrace, files_of_run, read_spans, step_traces
from kleash.traces.summary import phases
from kleash.up.config import ServeConfig, UpConfig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "tracing.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
STEPS = 3
PROMPT = "What is the sum of"


@dataclass(frozen=True)
class Traced:
    """A run, and what was recorded of it."""

    folder: Path
    steps: dict[int, StepTrace]


@pytest.fixture(scope="module")
def run(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Traced:
    """More responses than are decoded side by side: the first groups are scored meanwhile."""
    root = tmp_path_factory.mktemp("traced")
    prompts = root / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"{PROMPT} {n} and 4?"}) + "\n" for n in range(16))
    )
    command = [
        *(sys.executable, "-m", "kleash.cli", "up"),
        f"--ppo.model={tiny_folder}",
        f"--ppo.reward_model={tiny_reward_folder}",
        f"--ppo.prompts={prompts}",
        f"--ppo.evaluation.prompts={prompts}",
        f"--ppo.evaluation.every={STEPS}",
        f"--ppo.out={root / 'run'}",
        f"--ppo.total_steps={STEPS}",
        *(word for word in shlex.split(COMMANDS[1]) if word.startswith("--")),
        "--ppo.sampling.max_new_tokens=24",
        "--ppo.batch_size=16",
        "--ppo.services.group_size=4",
        "--policy.max_running_sequences=4",
        "--ppo.algorithm.epochs=2",
        "--ppo.max_prompt_tokens=64",
        "--service_threads=1",
        "--ppo.num_threads=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return Traced(root / "run", step_traces(read_spans(files_of_run(root / "run"))))


def test_every_step_is_one_trace_and_there_is_no_other(run: Traced) -> None:
    assert sorted(run.steps) == list(range(1, STEPS + 1))
    spans = read_spans(files_of_run(run.folder))
    assert {span.trace_id for span in spans} == {it.root.trace_id for it in run.steps.values()}
    for trace in run.steps.values():
        assert [span for span in trace.spans if span.parent_id not in trace.by_id] == [trace.root]
        assert not any(span.has_failed for span in trace.spans)


def test_a_step_goes_through_all_processes(run: Traced) -> None:
    names: dict[str, set[str]] = {}
    for span in run.steps[2].spans:
        names.setdefault(span.process.name, set()).add(span.short_name)
    assert names["trainer"] >= {
        *("ppo_step", "rollout", "generate", "score", "reference", "old_log_probs"),
        *("update", "epoch", "publish", "encode", "send", "commit", "canary"),
    }
    assert names["policy"] >= {"Generate", "queue", "decode", "receive", "stage", "swap"}
    assert names["reward"] >= {"Score", "tokenize", "queue", "compute", "encode"}
    assert names["reference"] >= {"LogProbs", "tokenize", "queue", "compute", "encode"}
    # The replica fetches from the trainer's store within the same trace.
    fetches = [span for span in run.steps[2].spans if span.short_name == "Fetch"]
    assert {span.process.name for span in fetches} == {"policy", "trainer"}


def test_what_comes_behind_a_step_is_in_its_trace(run: Traced) -> None:
    last = {span.name for span in run.steps[STEPS].spans}
    assert "evaluation" in last
    assert "evaluation" not in {span.name for span in run.steps[1].spans}


def test_epochs_and_microbatches_are_counted(run: Traced) -> None:
    spans = run.steps[1].spans
    assert len([span for span in spans if span.name == "epoch"]) == 2
    for name in ("score", "reference"):
        assert len([span for span in spans if span.name == name]) == 4


def test_scoring_overlaps_generation(run: Traced) -> None:
    for trace in run.steps.values():
        hidden = {phase.name: phase.hidden for phase in phases(trace)}
        assert hidden["score"], "no score was computed while responses were generated"
        assert hidden["reference"], "no reference was computed meanwhile"


def test_the_page_names_every_span(run: Traced) -> None:
    table = DOC[DOC.index("| span | process |") :]
    documented = {
        (name, process)
        for row in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row[0])
        for process in row[1].replace("services", "policy, reward, reference").split(", ")
    }
    recorded = {
        (span.name, span.process.name)
        for trace in run.steps.values()
        for span in trace.spans
        if "/" not in span.name
    }
    assert recorded <= documented
    assert documented - recorded == {("checkpoint", "trainer")}
    notes = set(re.findall(r"`(kleash\.\w+)`", table))
    noted = {key for it in run.steps.values() for span in it.spans for key in span.attributes}
    assert {key for key in noted if key.startswith("kleash.")} <= notes


def test_the_commands_of_the_page(run: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that start processes have keys that are read; kleash trace shows the run."""
    monkeypatch.chdir(run.folder.parent)
    (run.folder.parent / "run.toml").write_text("")
    for line in COMMANDS:
        words = [word for word in shlex.split(line) if "OTEL_" not in word]
        match words[:2]:
            case ["kleash", "up"]:
                keys = describe_keys(UpConfig)
            case ["kleash", "ppo"]:
                keys = describe_keys(PPOConfig)
            case ["kleash", "serve"]:
                keys = describe_keys(ServeConfig) | {"model"}
            case ["kleash", "trace"]:
                show(line, run)
                continue
            case _:
                assert line == "pip install 'kleash[train,trace]'"
                continue
        flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        assert flags
        assert flags <= keys


def describe_keys(config_class: type[Config]) -> set[str]:
    return {key for key, *_ in describe_config(config_class)}


def show(line: str, run: Traced) -> None:
    """``runs/mine/ppo`` is the run, whose reward service writes elsewhere in the page."""
    line = line.replace("runs/mine/ppo", str(run.folder))
    line = line.replace(" traces/reward.jsonl", f" {run.folder}/traces/reward.jsonl")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "critical path" in done.stdout


def test_no_text_is_in_the_files(run: Traced) -> None:
    files = files_of_run(run.folder)
    assert {file.stem for file in files} == {"trainer", "policy", "reward", "reference"}
    for file in files:
        text = file.read_text()
        assert text
        assert PROMPT not in text


def test_the_command_shows_the_step(run: Traced, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kleash.cli", "trace", str(run.folder), "--step=2"]
    command += [f"--out={tmp_path / 'step.json'}", f"--picture={tmp_path / 'step.png'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("step 2:", "of 4 processes", "generate", "critical path", "perfetto"):
        assert word in done.stdout
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert len([it for it in events if it["ph"] == "X"]) == len(run.steps[2].spans)
    assert len([it for it in events if it["name"] == "process_name"]) == 4
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
