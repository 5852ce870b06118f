"""This machine's configuration of pip, for pip in a build: `pip_settings.py PIP_CONF`.

Writes the settings that `pip config list` shows, from files and environment together, to the file
PIP_CONF, and prints the local folders and files that they name, as volumes for `buildah build`:
an index on disk, certificates, constraints. Most machines have neither, and get an empty file.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

SETTING = re.compile(r"(?P<section>:env:|[^.]+)\.(?P<key>[^=]+)=(?P<value>.+)")


def parse_settings(listing: str) -> dict[str, dict[str, str]]:
    """Section -> key -> value, from the output of `pip config list`; the environment's win."""
    sections: dict[str, dict[str, str]] = {"global": {}}
    matches = [match for line in listing.splitlines() if (match := SETTING.match(line))]
    for match in sorted(matches, key=lambda match: match["section"] == ":env:"):
        section = "global" if match["section"] == ":env:" else match["section"]
        sections.setdefault(section, {})[match["key"]] = str(ast.literal_eval(match["value"]))
    return sections


def render(sections: dict[str, dict[str, str]]) -> str:
    """The same as the text of a pip.conf."""
    lines = []
    for section, settings in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {' '.join(value.split())}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def local_paths(values: Iterable[str]) -> list[Path]:
    """What exists of the paths in ``values``; of an index the folder above, which has its files."""
    paths = []
    for word in (word for value in values for word in value.split()):
        if word.startswith("file://"):
            paths.append(Path(word.removeprefix("file://")).parent)
        elif word.startswith("/"):
            paths.append(Path(word))
    return [path for path in dict.fromkeys(paths) if path.exists()]


def main(arguments: list[str]) -> None:
    """Write the file, print the volumes one a line."""
    if len(arguments) != 1:
        raise SystemExit("usage: pip_settings.py PIP_CONF")
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sections = parse_settings(listing)
    Path(arguments[0]).write_text(render(sections))
    values = [value for settings in sections.values() for value in settings.values()]
    sys.stdout.writelines(f"{path}:{path}:ro\n" for path in local_paths(values))


if __name__ == "__main__":
    main(sys.argv[1:])
