"""docs/runbooks: a page for each alert, whose metrics, expressions and commands exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.k8s.chart import CHART, StrictLoader
from tests.k8s.promql import exported, matchers_in, names_in
from tests.k8s.test_docs import check_kubectl
from tests.k8s.test_rules import FILES, OF_TARGETS, alerts, rules
from tests.k8s.tools import ROOT, need, run

from kleash.policy.config import PolicyConfig
from kleash.ppo.config import PPOConfig
from kleash.reward.config import RewardConfig

pytestmark = pytest.mark.k8s

FOLDER = ROOT / "docs" / "runbooks"
ALERTS = {name: rule for path in FILES for name, rule in alerts(path).items()}
PAGES = tuple(sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md"))
HEADINGS = [
    "What it means",
    "Impact",
    "How to check",
    "Likely causes",
    "What to do",
    "Silence it while you work",
]
RECORDED = {rule["record"] for path in FILES for rule in rules(path) if "record" in rule}
OF_PODS = OF_TARGETS | {"pod", "app_kubernetes_io_component", "app_kubernetes_io_instance"}

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def blocks(path: Path, language: str) -> list[str]:
    """Lines of the page's blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in found for line in block.splitlines() if line.strip()]


def prose(path: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_alert_has_its_page_and_every_page_its_alert() -> None:
    assert {path.stem for path in PAGES} == set(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"


def test_the_index_has_every_alert_with_its_severity_and_summary() -> None:
    text = (FOLDER / "README.md").read_text()
    for name, rule in ALERTS.items():
        row = f"| [{name}]({name}.md) | {rule['labels']['severity']} "
        assert text.count(f"{row}| {rule['annotations']['summary']} |\n") == 1, name
    assert text.count(".md) | ") == len(ALERTS)


@each_page
def test_a_page_has_all_headings_with_something_below_each(path: Path) -> None:
    title, *sections = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)
    rule = ALERTS[path.stem]
    severity, summary = rule["labels"]["severity"], rule["annotations"]["summary"]
    assert title == f"# {path.stem}\n\n{summary} Severity: {severity}.\n\n"
    assert [section.partition("\n")[0] for section in sections] == HEADINGS
    assert all(section.partition("\n")[2].strip() for section in sections)


@each_page
def test_links_of_a_page_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose(path)):
        assert (path.parent / target).resolve().is_file(), target


@each_page
def test_every_metric_of_a_page_is_exported(path: Path) -> None:
    known = set(exported()) | RECORDED
    families = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in exported()}
    text = path.read_text()
    for name in re.findall(r"(?<![\w./-])(?:kleash|grpc_server)[_:][\w:]+", text):
        assert name in known | families, name
    for line in blocks(path, "promql"):
        assert names_in(line), line
        assert names_in(line) <= known, line
        for series, labels in matchers_in(line):
            if series in exported():
                assert labels <= exported()[series] | OF_PODS, line


def test_every_expression_is_one_that_prometheus_takes(tmp_path: Path) -> None:
    lines = [line for path in PAGES for line in blocks(path, "promql")]
    records = [{"record": f"check:{n}", "expr": line} for n, line in enumerate(lines)]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "runbooks", "rules": records}]}))
    done = run(need("promtool"), "check", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) > len(PAGES)


@each_page
def test_values_and_keys_of_a_page_exist(path: Path) -> None:
    """``reward.replicas`` is a value of the chart, ``kl.target`` a key of a process."""
    values = yaml.load((CHART / "values.yaml").read_text(), StrictLoader)
    thresholds = values["metrics"]["prometheusRule"]["thresholds"]
    for name in re.findall(r"\bthresholds[.](\w+)", prose(path)):
        assert name in thresholds, name
    tops = {*values, *PPOConfig.model_fields, "limits", "server"}
    for words in re.findall(r"`(\w+(?:[.]\w+)+)(?:=[^`]*)?`", prose(path)):
        first = words.split(".")[0]
        if first in tops and not words.endswith(".jsonl"):
            assert is_value(values, words) or is_key(words), words


def is_value(values: Any, words: str) -> bool:
    """Whether a value of the chart is named; below an empty one the keys are the process's."""
    for word in words.split("."):
        if values == {}:
            return True
        if not isinstance(values, dict) or word not in values:
            return False
        values = values[word]
    return True


def is_key(words: str) -> bool:
    """Whether it is a key of ``kleash ppo``, or of limits and server of ``kleash serve``."""
    configs: list[Any] = [PPOConfig, PolicyConfig, RewardConfig]
    for word in words.split("."):
        kinds = [
            each.model_fields[word].annotation for each in configs if word in each.model_fields
        ]
        if not kinds:
            return False
        configs = [kind for kind in kinds if hasattr(kind, "model_fields")]
    return True


@each_page
def test_commands_of_a_page_are_real(path: Path) -> None:
    commands = [shlex.split(line) for line in blocks(path, "sh")]
    for words in commands:
        match words[0]:
            case "kubectl":
                assert words[1:3] == ["--namespace", "rlhf"], words
                check_kubectl(words)
            case "amtool":
                check_silence(words, path.stem)
            case "kleash":
                check_help(words)
            case _:
                pytest.fail(f"nobody has decided how to test: {words}")
    assert commands[-1][0] == "amtool"


@each_page
def test_commands_within_the_text_are_real(path: Path) -> None:
    for span in re.findall(r"`(kleash [^`]*)`", prose(path)):
        check_help(shlex.split(span))


def check_silence(words: list[str], name: str) -> None:
    assert words[1:3] == ["silence", "add"]
    matchers = [word for word in words[3:] if not word.startswith("--")]
    assert matchers[0] == f"alertname={name}"
    assert {word.partition("=")[0] for word in matchers[1:]} <= OF_PODS
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert flags == {"--duration", "--comment"}


def check_help(words: list[str]) -> None:
    """``kleash COMMAND [ACTION] --flag=value``: the help knows all of them."""
    arguments = [word for word in words[1:] if not word.startswith("--")]
    shown = ""
    for count in (2, 1):
        action = arguments[:count]
        done = subprocess.run(
            [sys.executable, "-m", "kleash.cli", *action, "--help"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            shown = done.stdout
            break
    assert shown.startswith(f"usage: kleash {' '.join(arguments[:1])}"), words
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in shown, word
