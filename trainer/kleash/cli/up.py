"""``kleash up``."""

from __future__ import annotations

from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """Parse and run."""
    from kleash.base.logging import configure_logging
    from kleash.cli.options import parse
    from kleash.up.config import UpConfig

    config = parse(UpConfig, arguments, usage="kleash up [CONFIG.toml] [--ppo.key=value ...]")
    if config is None:
        return 0
    configure_logging()
    from kleash.cli.progress import TerminalProgress
    from kleash.up.run import run as run_up

    return run_up(config, TerminalProgress())
