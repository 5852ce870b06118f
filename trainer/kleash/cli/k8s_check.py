"""``kleash k8s check``: a line a check, status 1 when one of them failed."""

from __future__ import annotations

from collections.abc import Sequence

from kleash.cli.output import show


def run(arguments: Sequence[str]) -> int:
    """Check what the arguments name."""
    from kleash.cli.options import parse
    from kleash.cluster.check import CheckConfig, check

    usage = "kleash k8s check [--policy=ADDRESS] [--reward=ADDRESS] [--reference=ADDRESS] ..."
    config = parse(CheckConfig, arguments, usage=usage)
    if config is None:
        return 0
    from kleash.base.logging import configure_logging

    configure_logging()
    return 0 if check(config, lambda outcome: show(str(outcome))) else 1
