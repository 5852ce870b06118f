"""A short run of benchmarks/reward_scoring.py: it measures all that it says; no timing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "reward_scoring.py"
LATENCIES = {"sequences_per_s", "p50_ms", "p99_ms", "calls"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not (ROOT / "build" / "bench" / ".installed").exists(), reason="needs make bench-framework"
    ),
]


def test_every_figure_is_measured(tmp_path: Path) -> None:
    """The script itself checks that both servers give the same scores."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out)]
    subprocess.run(command, check=True, timeout=390)
    found = json.loads(out.read_text())
    assert found["summary"]["ratio_vs_serial_server_64_callers"] > 0
    assert found["summary"]["ratio_vs_ceiling"] > 0
    [its] = found["results"].values()
    for name in ("ours_1", "serial_1", "ours_64", "serial_64", "ours_sync_64", "ours_batches"):
        assert its["medians"][name].keys() == LATENCIES
        assert 0 < its["medians"][name]["p50_ms"] <= its["medians"][name]["p99_ms"]
    assert its["reuse"]["apart"] <= 1e-5
