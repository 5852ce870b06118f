"""Where the programs of the tests are: on PATH, or where `make k8s-tools` puts them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "tools"


def find(program: str) -> Path | None:
    """The program, None when this machine has none."""
    found = shutil.which(program) or shutil.which(program, path=str(FOLDER))
    return None if found is None else Path(found)


def need(program: str) -> Path:
    """The program; the test that asks is skipped when there is none."""
    found = find(program)
    if found is None:
        pytest.skip(f"{program} is neither on PATH nor in build/tools: run `make k8s-tools`")
    return found


def run(program: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its output is text and its status is the caller's to read."""
    command = [str(program), *arguments]
    return subprocess.run(
        command, check=False, cwd=cwd, capture_output=True, text=True, timeout=120
    )
