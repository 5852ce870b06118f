"""The Helm chart as the one source of objects: find it, render it, read what came out.

In an installed wheel the chart lies beside this file; in a source checkout it is k8s/chart.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kleash.base.errors import ConfigError
from kleash.cluster.objects import Manifest

HELM_VARIABLE = "KLEASH_HELM"
RENDER_LIMIT_S = 60.0
KUBE_VERSION = re.compile(r"v?(\d+\.\d+(?:\.\d+)?)")


def find_chart() -> Path:
    """Folder of the chart. Raises ConfigError when this installation has none."""
    here = Path(__file__).resolve().parent
    candidates = (here / "chart", here.parents[2] / "k8s" / "chart")
    for folder in candidates:
        if (folder / "Chart.yaml").is_file():
            return folder
    raise ConfigError(
        f"the chart is at none of {', '.join(map(str, candidates))}; this installation is "
        "incomplete: install kleash again."
    )


def default_values() -> dict[str, Any]:
    """The chart's own values."""
    import yaml

    return yaml.safe_load((find_chart() / "values.yaml").read_text(encoding="utf-8"))


def find_helm() -> str:
    """The helm program: KLEASH_HELM, or helm on the PATH. Raises ConfigError that says how."""
    named = os.environ.get(HELM_VARIABLE)
    found = shutil.which(named or "helm")
    if found:
        return found
    seen = f"{HELM_VARIABLE}={named} is no program" if named else "helm is not on the PATH"
    raise ConfigError(
        f"{seen}; kleash k8s run renders its chart with Helm 3.14 or newer: install it "
        f"(https://helm.sh/docs/intro/install), or set {HELM_VARIABLE} to the program."
    )


def render(
    release: str,
    namespace: str,
    values: Mapping[str, Any],
    *,
    values_files: Sequence[Path] = (),
    kube_version: str = "",
    api_versions: Sequence[str] = (),
) -> list[Manifest]:
    """The chart's objects for a release: ``values`` over ``values_files`` over its defaults.

    Hooks, which are the pods of ``helm test``, are left out. Raises ConfigError with what helm
    found wrong, such as a value that the chart's schema does not know.
    """
    import yaml

    for path in values_files:
        if not path.is_file():
            raise ConfigError(f"the values file {path} does not exist; correct 'values'.")
    with tempfile.TemporaryDirectory(prefix="kleash-k8s-") as folder:
        own = Path(folder) / "values.yaml"
        own.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
        command = [find_helm(), "template", release, str(find_chart()), "--namespace", namespace]
        for path in (*values_files, own):
            command += ["--values", str(path)]
        if match := KUBE_VERSION.match(kube_version):
            command += ["--kube-version", match[1]]
        for version in api_versions:
            command += ["--api-versions", version]
        text = _run(command)
    try:
        documents = [document for document in yaml.safe_load_all(text) if document]
    except yaml.YAMLError as error:
        raise ConfigError(
            f"what helm rendered is not YAML ({' '.join(str(error).split())}); check the values "
            "that hold templates."
        ) from None
    return [document for document in documents if not _is_hook(document)]


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=RENDER_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"{command[0]} cannot be run ({error}); set {HELM_VARIABLE} to a helm program."
        ) from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # Warnings about the kubeconfig's file mode are not why it failed.
        told = "; ".join(line for line in lines if not line.startswith("WARNING"))
        raise ConfigError(
            f"the chart cannot be rendered: {told.removeprefix('Error: ').rstrip('.')}; correct "
            "the pipeline or its values files."
        )
    return done.stdout


def _is_hook(manifest: Manifest) -> bool:
    return "helm.sh/hook" in (manifest["metadata"].get("annotations") or {})
