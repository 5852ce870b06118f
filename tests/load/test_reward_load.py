"""A short run of benchmarks/reward_load.py: what is refused and why, and restarts; no timing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reward_load.py"


def run(part: str, folder: Path, *flags: str) -> dict[str, Any]:
    out = folder / "out.json"
    command = [sys.executable, str(SCRIPT), part, "--quick", "--json", str(out), *flags]
    subprocess.run(command, check=True, timeout=800)
    return json.loads(out.read_text())["results"][part]


def test_overload_is_refused_with_a_hint_and_nothing_else_goes_wrong(tmp_path: Path) -> None:
    found = run("overload", tmp_path, "--factor=3")  # more than noise hides
    summary = found["summary"]
    assert summary["shed"] > 0
    assert summary["shed_with_hint_ratio"] == 1.0
    assert summary["other_errors"] == 0
    for counts in found["counts"].values():
        assert set(counts) <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"}
        assert counts["OK"] > 0


def test_no_call_fails_while_replicas_restart(tmp_path: Path) -> None:
    found = run("restart", tmp_path)
    assert found["summary"]["restarts"] >= 2
    assert found["summary"]["calls"] > 0
    assert found["outcomes"].keys() == {"OK"}
    assert found["exit_statuses"] == {"0": found["summary"]["restarts"]}
