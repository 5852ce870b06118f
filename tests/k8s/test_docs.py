"""Commands for a cluster in README.md and docs/: what can be run without one is run.

helm commands render the chart with the settings that are printed; kubectl commands must name files
and objects that exist; kleash commands must parse. A command of another kind fails the test.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.k8s.chart import load_objects
from tests.k8s.tools import ROOT, need, run

pytestmark = pytest.mark.k8s

PAGES = ("README.md", "docs/operations.md", "docs/observability.md", "docs/security.md")
NAMES = {"kleash-policy", "kleash-reward", "kleash-reference", "kleash-trainer"}


def shell_commands(page: str) -> list[str]:
    """Commands of the page's shell blocks; a line that ends in a backslash goes on in the next."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = [
    (page, command)
    for page in PAGES
    for command in shell_commands(page)
    if page != "README.md" or command.startswith(("helm ", "kleash k8s "))
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_printed_command_is_one_that_works(page: str, command: str, tmp_path: Path) -> None:
    words = shlex.split(command, comments=True)
    match words[0]:
        case "helm":
            check_helm(words)
        case "sed":
            script, path, *rest = words[1:]
            done = subprocess.run(["sed", script, ROOT / path], capture_output=True, check=True)
            assert done.stdout != (ROOT / path).read_bytes(), "it changes nothing"
            assert rest == ["|", "kubectl", "apply", "--filename", "-"]
        case "kubectl":
            check_kubectl(words)
        case "kleash":
            check_kleash(words)
        case "promtool":
            done = run(need("promtool"), *words[1:])
            assert done.returncode == 0, done.stdout + done.stderr
        case "pip":
            extras = (ROOT / "pyproject.toml").read_text()
            assert re.search(rf"^{words[2].partition('[')[2].rstrip(']')} = ", extras, re.MULTILINE)
        case "python":
            done = subprocess.run(
                [sys.executable, *words[1:3], "--help"], cwd=ROOT, capture_output=True, check=False
            )
            assert done.returncode == 0, done.stderr
        case _:
            pytest.fail(f"nobody has decided how to test: {command}")


def check_helm(words: list[str]) -> None:
    helm = need("helm")
    assert words[1] in ("install", "upgrade", "test"), words
    if words[1] == "test":
        hooks = [
            its
            for its in load_objects(run(helm, "template", "kleash", "k8s/chart").stdout)
            if "test" in its["metadata"].get("annotations", {}).get("helm.sh/hook", "")
        ]
        assert [its["kind"] for its in hooks] == ["Pod"]
        return
    rest = [
        word
        for word in words[2:]
        if word not in ("--reset-then-reuse-values", "--create-namespace")
    ]
    done = run(helm, "template", *rest)
    assert done.returncode == 0, done.stderr
    assert load_objects(done.stdout)


def check_kubectl(words: list[str]) -> None:
    for position, word in enumerate(words):
        if word == "--filename":
            assert (ROOT / words[position + 1]).is_file(), words
        if "/" in word and word.split("/")[0] in ("deployment", "deploy", "service"):
            assert word.split("/")[1] in NAMES, word
    assert not {"edit", "replace"} & set(words)


def check_kleash(words: list[str]) -> None:
    from kleash.cli.main import COMMANDS as KNOWN

    assert words[1] in KNOWN, words
    if words[1:3] == ["k8s", "run"]:
        from kleash.base.config import load_config
        from kleash.cluster.pipeline_config import PipelineConfig

        config = load_config(PipelineConfig, [str(ROOT / words[3]), *words[4:]])
        assert config.namespace == "rlhf"


def test_the_page_tells_every_event_and_no_other() -> None:
    """Of trainers, which log them, and of `kleash k8s run`, which emits them itself."""
    code = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "trainer").rglob("*.py")
        if path.name != "events.py"  # it sends what others tell
    )
    found = re.findall(r'"event": "([A-Z]\w+)"|_emit\("([A-Z]\w+)"', code)
    known = {one or two for one, two in found}
    known |= set(re.findall(r'"event": "\w+" if \w+ else "([A-Z]\w+)"', code))
    assert {"TrainingCompleted", "TrainingStopped", "RunStopped"} <= known
    rows = (ROOT / "docs/operations.md").read_text(encoding="utf-8").partition("| event | of |")[2]
    table = rows.partition("\n\n")[0].splitlines()[2:]
    assert set(re.findall(r"`([A-Z]\w+)`", "".join(row.split("|")[1] for row in table))) == known
