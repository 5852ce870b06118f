"""The version of the installed software."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version


@cache
def software_version() -> str:
    """Version of the installed ``kleash`` distribution."""
    return version("kleash")
