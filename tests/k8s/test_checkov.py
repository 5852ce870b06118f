"""checkov finds nothing in the examples that checkov.yaml does not give a reason for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from tests.k8s.chart import EXAMPLES, StrictLoader, example_name, render_text
from tests.k8s.tools import ROOT, need, run

pytestmark = pytest.mark.k8s

PROGRAM = ROOT / ".venv-checkov" / "bin" / "checkov"
REASONS = ROOT / "tests" / "k8s" / "checkov.yaml"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What checkov says of everything that the examples render."""
    need("helm")
    if not PROGRAM.exists():
        pytest.skip("checkov is not installed: run `make checkov`")
    folder = tmp_path_factory.mktemp("checkov")
    for values in EXAMPLES:
        (folder / f"{example_name(values)}.yaml").write_text(render_text(values))
    options = ["--framework=kubernetes", "--output=json", "--compact", "--skip-download"]
    done = run(PROGRAM, *options, f"--directory={folder}")
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_there_is_no_unexplained_finding(report: dict[str, Any]) -> None:
    assert report["summary"]["passed"] > 400 * len(EXAMPLES), "checkov did not read the chart"
    assert report["summary"]["parsing_errors"] == 0
    reasons = yaml.load(REASONS.read_text(), StrictLoader)
    unexplained = {
        f"{one['check_id']} {one['check_name']}: {one['file_path']} {one['resource']}"
        for one in report["results"]["failed_checks"]
        if one["check_id"] not in reasons
        or not any(one["resource"].startswith(kind) for kind in reasons[one["check_id"]]["of"])
    }
    assert unexplained == set()


def test_every_reason_is_still_needed(report: dict[str, Any]) -> None:
    found = {one["check_id"] for one in report["results"]["failed_checks"]}
    reasons = yaml.load(REASONS.read_text(), StrictLoader)
    assert set(reasons) <= found
    assert all(len(entry["why"]) > 20 for entry in reasons.values())
