"""How ``kleash weights`` prints: bytes in human units, names and values, aligned tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(num_bytes: int) -> str:
    """A number of bytes with three significant digits: 512 B, 1.50 KiB, 23.4 MiB."""
    count, step = num_bytes, 0
    while count >= 999.5 and step < len(UNITS) - 1:
        count, step = count / 1024, step + 1
    return f"{_three_digits(count) if step else count} {UNITS[step]}"


def _three_digits(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def ratio_text(dense: int, encoded: int) -> str:
    """How many times smaller the encoded bytes are: "12.4x"; "-" for none at all."""
    return f"{_three_digits(dense / encoded)}x" if encoded else "-"


def size_cells(changed: float, num_bytes: int) -> list[str]:
    """Share of changed elements, and bytes."""
    return [f"{100 * changed:.3g} %", human_bytes(num_bytes)]


def pairs(facts: Mapping[str, Any]) -> str:
    """A line for each fact; a name that ends in "bytes" holds a number of them."""
    width = max(map(len, facts))
    return "\n".join(
        f"{name.replace('_', ' '):<{width}}  {_value(name, value)}" for name, value in facts.items()
    )


def _value(name: str, value: Any) -> str:
    if name.endswith("bytes"):
        return human_bytes(value)
    if isinstance(value, dict):
        return counts(value)
    return "-" if value in ("", None) else str(value)


def counts(numbers: Mapping[str, int]) -> str:
    """How many of each: "2 delta, 1 anchor"."""
    return ", ".join(f"{number} {name}" for name, number in numbers.items()) or "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[str]) -> str:
    """Aligned columns; those named in ``text`` begin at one place, the numbers end at one."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in (header, *rows):
        padded = [
            cell.ljust(width) if name in text else cell.rjust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
