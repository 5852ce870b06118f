"""The namespace over three roots, and what importing the client may load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
ROOTS = ("protos", "services", "trainer")
# A package of one root alone may have an __init__.py; these are shared between roots.
NAMESPACES = (
    "",
    "common", "common/v1",
    "policy", "policy/v1",
    "reward", "reward/v1",
    "reference", "reference/v1",
    "weights", "weights/v1",
    "trainer", "trainer/v1",
)  # fmt: skip


def test_namespace_folders_have_no_init() -> None:
    folders = [ROOT / root / "kleash" / name for root in ROOTS for name in NAMESPACES]
    assert sum(folder.is_dir() for folder in folders) >= len(NAMESPACES)
    found = [
        str(folder.relative_to(ROOT)) for folder in folders if (folder / "__init__.py").exists()
    ]
    assert found == [], f"an __init__.py hides the other roots' part of the package: {found}"


def test_every_other_package_has_an_init() -> None:
    missing = []
    for root in ("services", "trainer"):
        base = ROOT / root / "kleash"
        for folder in sorted({path.parent for path in base.rglob("*.py")}):
            name = folder.relative_to(base).as_posix().removeprefix(".")
            if name not in NAMESPACES and not (folder / "__init__.py").exists():
                missing.append(str(folder.relative_to(ROOT)))
    assert missing == []


def test_no_module_is_in_two_roots() -> None:
    seen: dict[str, str] = {}
    for root in ROOTS:
        for path in (ROOT / root / "kleash").rglob("*.py"):
            name = path.relative_to(ROOT / root).as_posix()
            assert name not in seen, f"{name} is in {seen[name]} and in {root}"
            seen[name] = root


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that ``statement`` loads in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_client_is_light() -> None:
    loaded = loaded_by("import kleash.client")
    assert {"grpc", "numpy", "kleash"} <= loaded
    heavy = {"torch", "transformers", "pydantic", "prometheus_client"}
    assert loaded & heavy == set()


def test_the_chassis_does_not_load_torch() -> None:
    loaded = loaded_by("import kleash.rpc.server, kleash.rpc.batcher, kleash.base.metrics")
    assert "prometheus_client" in loaded
    assert loaded & {"torch", "transformers"} == set()
