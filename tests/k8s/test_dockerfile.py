"""The Dockerfile and its scripts, read but not built: tests/k8s/test_image.py builds."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from tests.k8s.tools import ROOT

pytestmark = pytest.mark.k8s

IMAGE = ROOT / "k8s" / "image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


class Instruction(NamedTuple):
    """One instruction, its continued lines joined: ("COPY", ". .")."""

    keyword: str
    text: str


def instructions() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#"]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, list[Instruction]]:
    """Instructions by stage, the FROM of each first; "" has those above the first FROM."""
    found: dict[str, list[Instruction]] = {"": []}
    name = ""
    for instruction in instructions():
        if instruction.keyword == "FROM":
            name = instruction.text.split(" AS ")[1]
            assert name not in found
            found[name] = []
        found[name].append(instruction)
    return found


def only(stage: str, keyword: str) -> str:
    (found,) = [text for word, text in stages()[stage] if word == keyword]
    return found


def arguments(stage: str) -> dict[str, str]:
    """ARG -> default of a stage."""
    texts = [text for word, text in stages()[stage] if word == "ARG"]
    return {text.partition("=")[0]: text.partition("=")[2] for text in texts}


def load(script: str) -> ModuleType:
    """A script of k8s/image as a module."""
    specification = importlib.util.spec_from_file_location(
        f"image_{script}", IMAGE / f"{script}.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_hadolint_has_nothing_to_say() -> None:
    found = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    assert found is not None, "hadolint is missing: make setup installs it"
    command = [found, "--failure-threshold=style", "Dockerfile"]
    result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_every_stage_comes_from_the_base_image_or_from_another_stage() -> None:
    bases = {name: body[0].text.split(" AS ")[0] for name, body in stages().items() if name}
    assert bases == {
        "python": "${BASE_IMAGE}",
        "torch": "python",
        "requirements": "python",
        "dependencies": "torch",
        "project": "python",
        "system": "${BASE_IMAGE}",
        "runtime": "system",
        "vllm-environment": "python",
        "vllm-system": "system",
        "vllm": "vllm-system",
        "kleash": "runtime",
    }
    assert list(bases)[-1] == "kleash"  # what a build without a target makes


def test_the_base_is_pinned_to_a_version_and_nothing_to_latest() -> None:
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", arguments("")["BASE_IMAGE"])
    assert "latest" not in " ".join(text for _, text in instructions())


def test_versions_in_the_dockerfile_are_those_of_the_project() -> None:
    assert f"\ntorch=={arguments('torch')['TORCH_VERSION']}\n" in CONSTRAINTS
    assert arguments("kleash")["VERSION"] == PROJECT["version"]


def test_the_default_is_the_cpu_image_with_extras_that_exist() -> None:
    assert arguments("torch")["VARIANT"] == "cpu"
    assert set(arguments("requirements")["EXTRAS"].split(",")) <= set(EXTRAS)


def test_layers_go_from_what_changes_least_to_what_changes_most() -> None:
    copies = [
        text for stage in ("runtime", "kleash") for word, text in stages()[stage] if word == "COPY"
    ]
    assert copies == [f"--from={stage} /layer /" for stage in ("torch", "dependencies", "project")]


def test_a_change_of_the_sources_reaches_the_last_layer_alone() -> None:
    above = ("python", "torch", "requirements", "dependencies", "system", "runtime")
    copied = {
        word
        for stage in above
        for keyword, text in stages()[stage]
        if keyword in ("COPY", "ADD") and "--from" not in text
        for word in text.split()[:-1]
    }
    scripts = {"k8s/image/install.sh", "k8s/image/requirements.py"}
    assert copied == scripts | {"constraints.txt", "pyproject.toml"}
    torch_sees = {
        text for stage in ("python", "torch") for word, text in stages()[stage] if word == "COPY"
    }
    assert torch_sees == {"k8s/image/install.sh k8s/image/requirements.py /build/"}


def test_the_image_runs_one_process_without_rights() -> None:
    assert only("system", "USER") == "10001:0"
    assert only("system", "STOPSIGNAL") == "SIGTERM"
    assert json.loads(only("system", "ENTRYPOINT")) == ["kleash"]
    assert only("system", "WORKDIR") == "/"
    for stage in ("runtime", "kleash", "vllm"):
        words = {word for word, _ in stages()[stage]}
        assert words <= {"FROM", "COPY", "ARG", "LABEL"}


def test_caches_lie_on_the_one_writable_mount() -> None:
    environment = dict(word.split("=", 1) for word in only("system", "ENV").split())
    assert environment["HOME"] == "/cache"
    for name in (
        "XDG_CACHE_HOME",
        "HF_HOME",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "MPLCONFIGDIR",
    ):
        assert environment[name].startswith("/cache/"), name
    assert environment["PYTHONUNBUFFERED"] == environment["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("stage", ["kleash", "vllm"])
def test_labels_say_what_it_is(stage: str) -> None:
    labels = only(stage, "LABEL")
    for name in ("title", "description", "licenses"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert f'licenses="{PROJECT["license"]}"' in labels


def test_no_other_engine_is_claimed_for_vllm() -> None:
    engines = (ROOT / "services" / "kleash" / "policy").glob("*.py")
    assert not any("import vllm" in path.read_text() for path in engines), (
        "an engine drives vLLM now: say so at the stage vllm of the Dockerfile and in its label"
    )
    assert "no engine of Kleash drives vLLM yet" in only("vllm", "LABEL")


def test_pip_reads_the_settings_of_the_machine_wherever_it_needs_the_network() -> None:
    for stage, body in stages().items():
        for word, text in body:
            offline = "--no-index" in text or not re.search(
                r"pip install|pip wheel|install\.sh", text
            )
            if word == "RUN" and not offline:
                assert "--mount=type=secret,id=pip,target=/etc/pip.conf" in text, stage
                assert "--mount=type=cache,target=/root/.cache/pip" in text, stage
                assert "required" not in text, stage  # a build without settings works


# -- What the build may see


def is_sent(path: str) -> bool:
    """Whether .dockerignore leaves ``path`` in the build's context; the last match decides."""
    sent = True
    parents = [str(parent) for parent in [Path(path), *Path(path).parents][:-1]]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        names = [Path(parent).name for parent in parents] if pattern[:3] == "**/" else parents
        depth = None if pattern[:3] == "**/" else pattern.count("/")
        pattern = pattern.removeprefix("**/")
        if any(
            fnmatch.fnmatchcase(name, pattern) and depth in (None, name.count("/"))
            for name in names
        ):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        "runs/demo/report.html",
        "tests/k8s/test_image.py",
        "build/tools/helm",
        "docs/architecture.md",
        "Dockerfile",
        "k8s/image/build.sh",
        "k8s/manifests/gpu.yaml",
        "services/kleash/base/__pycache__/errors.cpython-311.pyc",
        "id_ed25519",
        ".env",
    ],
)
def test_the_build_does_not_see(path: str) -> None:
    assert not is_sent(path)


@pytest.mark.parametrize(
    "path",
    [
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "protos/kleash/common/v1/common_pb2.py",
        "services/kleash/base/errors.py",
        "trainer/kleash/cli/main.py",
        "k8s/chart/Chart.yaml",
        "k8s/chart/templates/_pod.tpl",
        "k8s/image/install.sh",
        "k8s/image/requirements.py",
    ],
)
def test_the_build_sees(path: str) -> None:
    assert (ROOT / path).exists()
    assert is_sent(path)


def test_the_build_sees_all_that_the_wheel_is_made_of() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]
    for folder in wheel["wheel"]["only-include"]:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        kept = [path for path in files if "__pycache__" not in path.parts]
        assert kept
        assert all(is_sent(str(path.relative_to(ROOT))) for path in kept)


# -- The scripts


def test_requirements_of_the_image_are_those_of_the_extras_each_once() -> None:
    lines = load("requirements").project_requirements(PROJECT, ["train", "k8s"])
    expected = {*PROJECT["dependencies"], *EXTRAS["serve"], *EXTRAS["train"], *EXTRAS["k8s"]}
    assert sorted(lines) == sorted(line for line in expected if not line.startswith("kleash["))


def test_an_extra_that_does_not_exist_stops_the_build() -> None:
    with pytest.raises(SystemExit, match=r"no extra 'gpu'; pyproject\.toml offers serve, train"):
        load("requirements").project_requirements(PROJECT, ["train", "gpu"])


def test_requirements_as_the_build_calls_it() -> None:
    command = [sys.executable, "k8s/image/requirements.py", "project", "serve"]
    result = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[0] == PROJECT["dependencies"][0]


def test_the_layer_of_torch_gets_what_torch_pins_exactly() -> None:
    requirements = [
        "filelock",
        "sympy>=1.13.3",
        'nvidia-cudnn-cu13==9.24.0.43; platform_system == "Linux"',
        'triton==3.8.0; platform_system == "Linux"',
        'optree==0.13.0; extra == "optree"',
    ]
    assert load("requirements").pinned_requirements(requirements) == requirements[2:4]


LISTING = """\
:env:.cert='/certs/env.pem'
:env:.default-timeout='180'
global.cert='/certs/file.pem'
global.extra-index-url='file:///srv/index/simple\\nhttps://index.example/simple'
install.find-links='/srv/wheels'
"""


def test_pip_settings_of_the_environment_win() -> None:
    pip_settings = load("pip_settings")
    text = pip_settings.render(pip_settings.parse_settings(LISTING))
    assert text.splitlines() == [
        "[global]",
        "cert = /certs/env.pem",
        "extra-index-url = file:///srv/index/simple https://index.example/simple",
        "default-timeout = 180",
        "[install]",
        "find-links = /srv/wheels",
    ]


def test_local_paths_are_those_that_exist_and_of_an_index_the_folder_above(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    for folder in (wheels, tmp_path / "index" / "simple"):
        folder.mkdir(parents=True)
    values = [f"{wheels} {tmp_path}/absent", f"file://{tmp_path}/index/simple https://a.example/"]
    assert load("pip_settings").local_paths(values) == [wheels, tmp_path / "index"]


@pytest.mark.parametrize("script", ["build.sh", "debootstrap-base.sh", "install.sh"])
def test_the_shell_can_read_the_script(script: str) -> None:
    subprocess.run(["sh", "-n", IMAGE / script], check=True)
    assert "\nset -eu\n" in (IMAGE / script).read_text()
