"""``kleash serve NAME...``: one or more services in one process on one port."""

from __future__ import annotations

import asyncio
import gc
import importlib
from collections.abc import Sequence

from kleash.base.errors import ConfigError
from kleash.cli.flags import wants_help
from kleash.cli.options import parse


def run(arguments: Sequence[str]) -> int:
    """Parse the names and the configuration, serve until SIGTERM or Ctrl-C."""
    from kleash.up.config import SERVICES, ServeConfig

    rest = list(arguments)
    names = []
    while rest and rest[0] in SERVICES:
        names.append(rest.pop(0))
    if not names and not wants_help(rest):
        raise ConfigError(f"name at least one service to serve: {', '.join(SERVICES)}.")
    usage = "kleash serve policy|reward|reference... [CONFIG.toml] [--NAME.key=value ...]"
    config = parse(ServeConfig, [_with_section(argument, names) for argument in rest], usage=usage)
    if config is None:
        return 0
    from kleash.base.logging import configure_logging
    from kleash.base.trace_setup import traced
    from kleash.rpc.server import serve

    configure_logging()
    services = []
    for name in names:
        section = getattr(config, name)
        if section is None:
            raise ConfigError(
                f"the {name} service has no configuration; set --{name}.model=FOLDER."
            )
        module = importlib.import_module(f"kleash.{name}.service")
        services.append(getattr(module, f"{name.capitalize()}Service")(section))
    with traced(config.tracing, "-".join(names)):
        asyncio.run(serve(services, config.server, on_ready=_freeze))
    return 0


def _freeze(_port: int) -> None:
    """Spare the garbage collector what was loaded: hundreds of thousands of objects that stay and
    that it would look through again and again, while every call waits."""
    gc.collect()
    gc.freeze()


def _with_section(argument: str, names: Sequence[str]) -> str:
    """With one service, its own keys need no prefix: --model=X is --reward.model=X."""
    from kleash.up.config import ServeConfig

    key = argument[2:].partition("=")[0].partition(".")[0].replace("-", "_")
    if len(names) == 1 and argument.startswith("--") and key not in ServeConfig.model_fields:
        return f"--{names[0]}.{argument[2:]}"
    return argument
