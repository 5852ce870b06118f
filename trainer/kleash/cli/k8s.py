"""``kleash k8s ...``: what is done with Kleash on a cluster; finds the subcommand."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

from kleash.base.errors import ConfigError
from kleash.cli.output import show


class Subcommand(NamedTuple):
    """The function that runs it, and a line of help."""

    function: str
    summary: str


_RUN = "kleash.cli.k8s_run:run"

SUBCOMMANDS = {
    "check": Subcommand("kleash.cli.k8s_check:run", "call every service once, as `helm test` does"),
    "run": Subcommand(_RUN, "all stages of a pipeline as Jobs, one after the other"),
    "status": Subcommand(_RUN, "where a run is"),
    "logs": Subcommand(_RUN, "what the pods of a run print"),
    "pause": Subcommand(_RUN, "suspend the Job at hand; its pod saves a checkpoint and ends"),
    "resume": Subcommand(_RUN, "go on from that checkpoint"),
    "cancel": Subcommand(_RUN, "end a run and its Jobs"),
}


def run(arguments: Sequence[str]) -> int:
    """Do what the first argument names; ``k8s_run`` gets it too, for it runs several."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        show(_help())
        return 0
    if name not in SUBCOMMANDS:
        seen = f"'{name}' is none of them" if name else "nothing is named"
        raise ConfigError(f"kleash k8s does one of {', '.join(SUBCOMMANDS)}, and {seen}.")
    function = SUBCOMMANDS[name].function
    module, _, attribute = function.partition(":")
    call = getattr(importlib.import_module(module), attribute)
    return call([name, *rest] if function == _RUN else rest)


def _help() -> str:
    width = max(map(len, SUBCOMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {each.summary}" for name, each in SUBCOMMANDS.items())
    return (
        "usage: kleash k8s COMMAND ...\n\nKleash on a Kubernetes cluster.\n\n"
        f"{rows}\n\nkleash k8s COMMAND --help lists a command's keys."
    )
