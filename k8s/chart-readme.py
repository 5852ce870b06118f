"""Writes k8s/chart/README.md from Chart.yaml and the comments of values.yaml.

python k8s/chart-readme.py [--check]     `make chart-readme`; --check fails when it is stale

A key is documented by the comment above it that starts with `# --`; what comments without that say
is for readers of the file alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent / "chart"
README = CHART / "README.md"
TEMPLATE = CHART / "README.md.in"
LONGEST_DEFAULT = 60
"""Characters; a longer default is left to values.yaml."""

_KEY = re.compile(r"^( *)([A-Za-z_][\w.-]*):(?: |$)")


class UndocumentedError(Exception):
    """A key of values.yaml without a comment."""


@dataclass(frozen=True)
class Row:
    """One key."""

    key: str
    default: Any
    text: str


def rows(text: str) -> list[Row]:
    """Every documented key, in the order of the file. Raises UndocumentedError."""
    values = yaml.safe_load(text)
    found = list(_documented(text))
    covered = {path for path, _ in found}
    for path in _leaves(values):
        if not any(path[:length] in covered for length in range(1, len(path) + 1)):
            raise UndocumentedError(
                f"{'.'.join(path)} has no comment that starts with '# --'; write one above it"
            )
    return [Row(".".join(path), _at(values, path), comment) for path, comment in found]


def _documented(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Path and comment of every key that has one."""
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        words = line.strip()
        if words.startswith("# -- "):
            comment = [words[5:]]
        elif words.startswith("#") and comment:
            comment.append(words[1:].strip())
        elif match := _KEY.match(line):
            depth = len(match[1])
            path = [part for part in path if part[0] < depth] + [(depth, match[2])]
            if comment:
                yield tuple(name for _, name in path), " ".join(comment)
            comment = []
        else:
            comment = []


def _leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def table(found: list[Row]) -> str:
    """The keys as tables, one for each section of the values; those of no section come first."""
    sections: dict[str, list[Row]] = {"": []}
    for row in found:
        sections.setdefault(row.key.partition(".")[0] if "." in row.key else "", []).append(row)
    lines: list[str] = []
    for section, group in sections.items():
        title = f"`{section}`" if section else "All pods and objects"
        lines += [f"### {title}", "", "| key | default | what it does |", "|---|---|---|"]
        lines += [f"| `{row.key}` | {_default(row.default)} | {_cell(row.text)} |" for row in group]
        lines.append("")
    return "\n".join(lines).strip()


def _default(value: Any) -> str:
    text = json.dumps(value)
    return f"`{_cell(text)}`" if len(text) <= LONGEST_DEFAULT else "see values.yaml"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def render() -> str:
    """The whole README."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    text = TEMPLATE.read_text()
    for name in ("name", "version", "appVersion", "kubeVersion", "description"):
        text = text.replace(f"{{{{{name}}}}}", str(chart[name]))
    return text.replace("{{values}}", table(rows((CHART / "values.yaml").read_text())))


def main() -> int:
    """The command."""
    if sys.argv[1:] not in ([], ["--check"]):
        sys.stderr.write(__doc__ or "")
        return 2
    try:
        text = render()
    except UndocumentedError as error:
        sys.stderr.write(f"{CHART / 'values.yaml'}: {error}\n")
        return 1
    if not sys.argv[1:]:
        README.write_text(text)
        return 0
    if not README.exists() or README.read_text() != text:
        sys.stderr.write("k8s/chart/README.md is stale: run `make chart-readme` and commit it\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
