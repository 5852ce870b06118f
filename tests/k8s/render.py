"""What the chart renders, kept in the repository: plain manifests, and goldens of every example.

python -m tests.k8s.render manifests [--check]     `make manifests`, `make manifests-check`
python -m tests.k8s.render goldens [--check]       `make goldens`
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import yaml
from tests.k8s.chart import CHART, EXAMPLES, example_name, render_text
from tests.k8s.tools import ROOT, find

MANIFESTS = ROOT / "k8s" / "manifests"
GOLDENS = ROOT / "tests" / "k8s" / "golden"
MANIFEST_NAMESPACE = "kleash"
MAX_DIFF_LINES = 300
HEADER = """\
# Made from k8s/chart with {values} by `make manifests`; do not edit.
#
#     kubectl apply -f k8s/manifests/{name}.yaml
#     kubectl -n kleash logs -f -l app.kubernetes.io/component=trainer
"""


def manifests() -> dict[Path, str]:
    """Files of k8s/manifests: a namespace, and a release in it without `helm test`."""
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": MANIFEST_NAMESPACE,
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        },
    }
    files: dict[Path, str] = {}
    for name in ("cpu-demo", "gpu"):
        values = CHART / "ci" / f"{name}-values.yaml"
        text = render_text(values, release="kleash", namespace=MANIFEST_NAMESPACE, with_tests=False)
        header = HEADER.format(values=values.relative_to(ROOT), name=name)
        body = f"---\n{yaml.safe_dump(namespace, sort_keys=False)}{text}"
        files[MANIFESTS / f"{name}.yaml"] = header + body
    return files


def goldens() -> dict[Path, str]:
    """Files of tests/k8s/golden: everything that each example renders."""
    return {GOLDENS / f"{example_name(path)}.yaml": render_text(path) for path in EXAMPLES}


def differences(files: dict[Path, str]) -> str:
    """A unified diff from the files on disk to ``files``; empty when they are the same."""
    parts: list[str] = []
    extra = {old for path in files for old in path.parent.glob("*.yaml")} - set(files)
    for path in sorted(set(files) | extra):
        name = str(path.relative_to(ROOT))
        old = path.read_text().splitlines(keepends=True) if path.exists() else []
        new = files.get(path, "").splitlines(keepends=True)
        parts += difflib.unified_diff(old, new, f"{name} (committed)", f"{name} (rendered now)")
    if len(parts) > MAX_DIFF_LINES:
        parts = [*parts[:MAX_DIFF_LINES], f"... and {len(parts) - MAX_DIFF_LINES} more lines\n"]
    return "".join(parts)


def write(files: dict[Path, str]) -> None:
    """Put the files on disk and remove those of the same folders that are no longer made."""
    extra = {old for path in files for old in path.parent.glob("*.yaml")} - set(files)
    for path in extra:
        path.unlink()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> int:
    """The command."""
    kinds = {"manifests": manifests, "goldens": goldens}
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in kinds or arguments[1:] not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if find("helm") is None:
        print("helm is missing: install helm 3.14 or newer, or run `make k8s-tools`")
        return 1
    files = kinds[arguments[0]]()
    if not arguments[1:]:
        write(files)
        return 0
    difference = differences(files)
    if difference:
        print(difference)
        print(f"stale: run `make {arguments[0]}`, read the diff and commit the result")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
