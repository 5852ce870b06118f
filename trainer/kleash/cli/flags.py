"""Flags of commands that have no configuration class, and commands that do one of several things.

Needs nothing but the standard library: ``kleash score`` runs on the base install.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

from kleash.base.errors import ConfigError
from kleash.cli.output import show


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of a user."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}; {self.prog} --help lists the flags.")


class Action(NamedTuple):
    """One of the things that a command can do."""

    function: Callable[[argparse.Namespace], None]
    summary: str


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether --help is among the arguments."""
    return any(argument in ("-h", "--help") for argument in arguments)


def parse_or_help(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> argparse.Namespace | None:
    """The flags, or None after showing the help."""
    if wants_help(arguments):
        show(parser.format_help().rstrip())
        return None
    return parser.parse_args(arguments)


def run_action(
    command: str,
    actions: Mapping[str, Action],
    arguments: Sequence[str],
    *,
    parser_of: Callable[[str], argparse.ArgumentParser],
    help_text: Callable[[], str],
) -> int:
    """Do what the first argument names, or show what there is. Returns the exit status."""
    name = arguments[0] if arguments else ""
    if name in actions:
        if (flags := parse_or_help(parser_of(name), arguments[1:])) is not None:
            actions[name].function(flags)
        return 0
    if wants_help(arguments):
        show(help_text())
        return 0
    seen = f"'{name}' is none of them" if name else "nothing is named"
    raise ConfigError(f"{command} does one of {', '.join(actions)}, and {seen}.")
