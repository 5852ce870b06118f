"""Where a benchmark ran: what its figures hold for."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")


def environment(*packages: str) -> dict[str, Any]:
    """Date, machine, load and versions; ``packages`` are distributions, by whose names they are."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cpu": _processor(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        **{name: _version(name) for name in packages},
    }


def _processor() -> str:
    """The model's name, or the architecture where the system does not tell it."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
