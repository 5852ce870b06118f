"""Each metric and figure is defined once, wholly, and is what a run writes or a process exports."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from prometheus_client.metrics import MetricWrapperBase

from kleash.base import client_metrics, metric_labels, metrics
from kleash.base.config import describe_config
from kleash.base.metric import Group
from kleash.common.v1 import common_pb2
from kleash.policy.config import PolicyConfig
from kleash.policy.v1 import policy_pb2
from kleash.ppo import loss
from kleash.ppo.config import PPOConfig
from kleash.ppo.control import RunState
from kleash.ppo.figures import EVALUATION, EVALUATION_SAMPLE, SAMPLE, STEP
from kleash.ppo.train import train
from kleash.reference.v1 import reference_pb2
from kleash.reward.v1 import admin_pb2, reward_pb2
from kleash.reward_model.config import RewardModelConfig
from kleash.trainer.v1 import trainer_pb2
from kleash.weights.v1 import weights_pb2

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
MODULES = (metrics, client_metrics)
METRICS = [metric for each in MODULES for group in each.GROUPS for metric in group.metrics]
STEP_FIGURES = {figure.name: figure for section in STEP for figure in section.figures}
CONTRACTS = (policy_pb2, reference_pb2, reward_pb2, admin_pb2, trainer_pb2, weights_pb2)
FORBIDDEN = re.compile("version|revision|run|prompt|sha256|digest|address|caller|user|id$|step")
"""Labels with no end to their values."""


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with everything on that adds a key: evaluation, judge, pretraining, warm-up,
    calibration."""
    folder = tmp_path_factory.mktemp("metrics")
    demonstrations = folder / "demonstrations.jsonl"
    demonstrations.write_text(json.dumps({"prompt": "the quick", "completion": " brown fox"}))
    # A judge of one number is one whose only figure has the empty name.
    code = "def judge(record, response): return {'': 1.0, 'NAME': 2.0}"
    (folder / "judge_of_metrics.py").write_text(code)
    config = world.config(
        folder / "run",
        evaluation={
            "prompts": str(world.prompts),
            "num_prompts": 2,
            "judge": "judge_of_metrics:judge",
        },
        ptx={"data": str(demonstrations), "batch_size": 1},
        value={"warmup_steps": 1},
        services={"new_reward_model": "adopt", "calibration": "affine"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        train(config, world.services())
    return config.out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------------- figures


def test_every_key_of_a_step_is_explained(run: Path) -> None:
    steps = [row for row in rows(run / "metrics.jsonl") if "step_s" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["weights_version"] for row in steps] == [1, 2]  # the first trains values alone
    assert {key for row in steps for key in row} == STEP_FIGURES.keys()


def test_every_key_of_an_evaluation_is_explained(run: Path) -> None:
    evaluations = [row for row in rows(run / "metrics.jsonl") if "step_s" not in row]
    assert [row["step"] for row in evaluations] == [0, 2]
    documented = {figure.name for figure in EVALUATION.figures}
    assert all(row.keys() == documented for row in evaluations)
    written = {key for row in rows(run / "evaluations" / "step-000002.jsonl") for key in row}
    assert written == {key.name for key in EVALUATION_SAMPLE.keys}


def test_every_key_of_a_sample_is_explained(run: Path) -> None:
    samples = rows(run / "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 8 + [2] * 8
    documented = {key.name for key in SAMPLE.keys}
    assert all(row.keys() == documented for row in samples)


def test_figures_are_explained_once_and_wholly() -> None:
    figures = [*(figure for section in STEP for figure in section.figures), *EVALUATION.figures]
    assert len(STEP_FIGURES) == sum(len(section.figures) for section in STEP)
    for figure in figures:
        assert all((figure.unit, figure.formula, figure.remedy)), figure.name
    for kept in (EVALUATION_SAMPLE, SAMPLE):
        assert len({key.name for key in kept.keys}) == len(kept.keys)
        assert all(key.unit and key.meaning for key in kept.keys)


def test_functions_and_configuration_keys_that_are_named_exist() -> None:
    configurations = (PPOConfig, PolicyConfig, RewardModelConfig)
    config_keys = {key for each in configurations for key, *_ in describe_config(each)}
    last_parts = {key.rpartition(".")[2] for key in config_keys}
    known = vars(loss).keys() | STEP_FIGURES.keys() | config_keys | last_parts
    texts = [text for each in STEP_FIGURES.values() for text in (each.formula, each.remedy)]
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)[`=]", " ".join(texts)))
    assert {"policy_loss", "token_rewards", "kl.target"} <= named
    assert named - known == {"kleash.lm.log_probs.entropy"}


def test_figures_that_a_metric_shows_exist() -> None:
    known = STEP_FIGURES.keys() | {figure.name for figure in EVALUATION.figures}
    shown = {
        name
        for metric in METRICS
        if metric.name.startswith(("kleash_train_", "kleash_publish_"))
        for name in re.findall(r"See `([a-z_/]+)` (?:above|and)", metric.remedy)
    }
    assert len(shown) > 15
    assert shown <= known


# --------------------------------------------------------------------------------------- metrics


def test_every_metric_of_the_process_is_defined_once_and_wholly() -> None:
    assert len(METRICS) > 70
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert all((metric.help, metric.unit, metric.formula, metric.remedy)), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_what_prometheus_gets_is_what_is_defined(module: ModuleType) -> None:
    registered = {}
    for value in vars(module).values():
        if isinstance(value, MetricWrapperBase):
            described = next(iter(value.describe()))
            suffix = "_total" if described.type == "counter" else ""
            registered[described.name + suffix] = (
                described.type,
                described.documentation,
                list(value._labelnames),
            )
    groups: tuple[Group, ...] = module.GROUPS
    defined = {
        metric.name: (metric.kind, metric.help, [label.name for label in metric.labels])
        for group in groups
        for metric in group.metrics
    }
    assert registered == defined


def names_of(module: ModuleType) -> set[str]:
    """Of the constants that hold a metric."""
    return {name for name, value in vars(module).items() if isinstance(value, MetricWrapperBase)}


def uses(tree: ast.AST) -> Iterator[str]:
    """Names of the constants that code uses, beside those that it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id


def test_every_metric_is_set_by_the_code() -> None:
    sources = [
        path
        for root in ("services", "trainer")
        for path in (ROOT / root).rglob("*.py")
        if "_metrics" not in path.name or path.parent.name != "base"
    ]
    used = {name for path in sources for name in uses(ast.parse(path.read_text(encoding="utf-8")))}
    defined = set().union(*map(names_of, MODULES))
    assert defined - used == set()


def test_no_label_has_values_without_end() -> None:
    for metric in METRICS:
        for label in metric.labels:
            assert metric.is_info or not FORBIDDEN.search(label.name), (metric.name, label.name)


def test_forbidden_labels_would_be_found() -> None:
    info = next(metric for metric in METRICS if metric.name == "kleash_model_info")
    names = {label.name for label in info.labels}
    assert {name for name in names if FORBIDDEN.search(name)} == {"revision", "tokenizer_sha256"}


def test_closed_sets_are_those_of_what_they_name() -> None:
    services = {
        service.full_name
        for contract in CONTRACTS
        for service in contract.DESCRIPTOR.services_by_name.values()
    }
    other = {metric_labels.OTHER}
    assert set(metric_labels.GRPC_SERVICE.values) == services | other
    assert {*metric_labels.HOSTED.values} == {name.split(".")[1] for name in services}
    assert set(metric_labels.GRPC_CODE.values) == {code.name for code in grpc.StatusCode}
    assert values_of("kleash_train_state", "state") == {state.name.lower() for state in RunState}
    codes = {
        name.removeprefix("ITEM_STATUS_CODE_")
        for name in common_pb2.ItemStatusCode.DESCRIPTOR.values_by_name
    }
    assert values_of("kleash_items_total", "status") == codes - {"UNSPECIFIED"}


def values_of(metric: str, label: str) -> set[str]:
    """All that a label can be."""
    (found,) = [each for each in METRICS if each.name == metric]
    (its,) = [each for each in found.labels if each.name == label]
    return set(its.values)


def test_phases_are_those_of_a_step() -> None:
    keys = {name for name in STEP_FIGURES if name.startswith("time_")}
    assert keys == {f"time_{phase}_s" for phase in metric_labels.PHASE.values}


# ------------------------------------------------------------------------------------------ page


def test_the_page_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs" / "metrics_page.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_says_all_that_is_defined() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for metric in METRICS:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{metric.name}` |"))
        assert all(text in row for text in (metric.unit, metric.help, metric.formula))
        assert metric.remedy in row
        assert all(f"`{label.name}`" in row for label in metric.labels)
        for label in metric.labels:
            assert all(f"`{value}`" in page for value in label.values)
    assert "{{" not in page


def test_a_stale_page_is_refused(tmp_path: Path) -> None:
    for name in ("metrics_page.py", "metrics.md.in", "metrics.md"):
        (tmp_path / name).write_bytes((ROOT / "docs" / name).read_bytes())
    page = tmp_path / "metrics.md"
    page.write_text(page.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    command = [sys.executable, str(tmp_path / "metrics_page.py")]
    done = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, "make metrics-docs" in done.stderr) == (1, True)
    subprocess.run(command, check=True)
    subprocess.run([*command, "--check"], check=True)
