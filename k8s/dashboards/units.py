"""Numbers as Grafana writes them in a unit of a panel."""

from __future__ import annotations

import math

_PLAIN = ((0.0, ""),)
_COUNTS = ((1e9, " Bil"), (1e6, " Mil"), (1e3, " K"), (0.0, ""))
_BINARY = ((2.0**40, " Ti"), (2.0**30, " Gi"), (2.0**20, " Mi"), (2.0**10, " Ki"), (0.0, " "))
_DECIMAL = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (0.0, " "))
_UNITS = {
    "none": (_PLAIN, ""),
    "short": (_COUNTS, ""),
    "bytes": (_BINARY, "B"),
    "Bps": (_DECIMAL, "B/s"),
    "reqps": (_COUNTS, " req/s"),
    "ops": (_COUNTS, " ops/s"),
}
"""((size, its name), ...), largest first, and what follows."""
_SECONDS = ((86400.0, " d"), (3600.0, " h"), (60.0, " min"), (1.0, " s"), (1e-3, " ms"))


def in_unit(value: float, unit: str, decimals: int | None = None) -> str:
    """A number with its unit; ``decimals`` None takes three digits that count.

    Raises KeyError for a unit that no panel has.
    """
    if not math.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{_digits(value * 100, decimals)} %"
    if unit == "s":
        return _seconds(value, decimals)
    steps, rest = _UNITS[unit]
    size, name = next(step for step in steps if abs(value) >= step[0])
    return _digits(value / (size or 1), decimals) + name + rest


def _seconds(value: float, decimals: int | None) -> str:
    for size, name in _SECONDS:
        if abs(value) >= size:
            return _digits(value / size, decimals) + name
    return _digits(value * 1e6, decimals) + " µs" if value else "0 s"


def _digits(value: float, decimals: int | None) -> str:
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(places, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
