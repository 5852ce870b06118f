"""Makes environments with the oldest and the newest packages that the client takes, and no torch.

python tests/services/client_venvs.py FOLDER

One of each kind for every Python that is found, in FOLDER/3.12-oldest and so on. One that
is there is kept, unless what it should hold has changed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
KINDS = {
    "oldest": ("grpcio==1.73.1", "protobuf==6.33.5", "googleapis-common-protos==1.70.0"),
    "newest": ("grpcio", "protobuf>=7"),
}


def find_python(version: str) -> str | None:
    """An interpreter of that version, on PATH or of pyenv."""
    of_pyenv = (Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python")
    named = shutil.which(f"python{version}")
    for candidate in (*map(str, sorted(of_pyenv)), *([named] if named else [])):
        command = [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return candidate
    return None


def requirements(kind: str) -> list[str]:
    """Those of the base install, and the bounds of the kind."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *KINDS[kind]]


def make(folder: Path, python: str, wanted: list[str]) -> None:
    """The environment in ``folder``, unless it is there."""
    stamp = folder / ".installed"
    text = "\n".join([python, *wanted])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == text:
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--disable-pip-version-check", *wanted], check=True)
    stamp.write_text(text, encoding="utf-8")


def main(folder: Path) -> None:
    """Make all of them."""
    for version in PYTHONS:
        python = find_python(version)
        if python is None:
            print(f"no Python {version}")
            continue
        for kind in KINDS:
            make(folder / f"{version}-{kind}", python, requirements(kind))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
