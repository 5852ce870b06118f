"""What the image installs, as requirements for pip: `requirements.py project EXTRA...` or `torch`.

`project` reads pyproject.toml beside the working directory, so that the dependencies become a
layer of their own, which a change of the sources leaves alone. `torch` prints what the installed
torch pins exactly: the CUDA libraries of its CUDA builds, nothing for its CPU builds.
It runs while the image is built and needs the standard library alone.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OWN_EXTRAS = re.compile(r"kleash\[(?P<extras>[^\]]+)\]$")


def project_requirements(project: dict[str, Any], extras: Iterable[str]) -> list[str]:
    """The dependencies of the project and of ``extras``, each once, in the order of the file.

    ``project``: the table of that name. Raises SystemExit with a sentence for an unknown extra.
    """
    offered = project["optional-dependencies"]
    found = dict.fromkeys(project["dependencies"])
    waiting = list(extras)
    while waiting:
        extra = waiting.pop(0).strip()
        if extra not in offered:
            raise SystemExit(
                f"error: there is no extra '{extra}'; pyproject.toml offers {', '.join(offered)}."
            )
        for requirement in offered[extra]:
            own = OWN_EXTRAS.match(requirement)
            if own:
                waiting.extend(own["extras"].split(","))
            else:
                found.setdefault(requirement)
    return list(found)


def pinned_requirements(requirements: Iterable[str]) -> list[str]:
    """Those of ``requirements`` that name one exact version and belong to no extra."""
    return [line for line in requirements if "==" in line.split(";")[0] and "extra ==" not in line]


def main(arguments: list[str]) -> None:
    """Print one requirement a line."""
    match arguments:
        case ["project", *extras]:
            project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
            names = (name for extra in extras for name in extra.split(","))
            lines = project_requirements(project, filter(None, names))
        case ["torch"]:
            lines = pinned_requirements(importlib.metadata.requires("torch") or [])
        case _:
            raise SystemExit("usage: requirements.py project [EXTRA[,EXTRA...]] | torch")
    sys.stdout.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main(sys.argv[1:])
