"""What every subcommand shares: --help from the configuration class, logging, threads."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import TypeVar

from kleash.base.config import Config, describe_config, load_config
from kleash.cli.flags import wants_help
from kleash.cli.output import show

C = TypeVar("C", bound=Config)


def parse(config_class: type[C], arguments: Sequence[str], *, usage: str) -> C | None:
    """Load the configuration, or print the help and return None."""
    if wants_help(arguments):
        show(help_text(config_class, usage))
        return None
    return load_config(config_class, arguments)


def help_text(config_class: type[Config], usage: str) -> str:
    """Usage, then every key with its type, default and documentation."""
    lines = [f"usage: {usage}", "", "Keys, for the TOML file or as --key=value:", ""]
    for key, kind, default, text in describe_config(config_class):
        lines.append(
            f"  --{key}  ({kind}; {'required' if default == 'required' else 'default ' + default})"
        )
        lines.extend(textwrap.wrap(text, 96, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def limit_threads(num_threads: int) -> None:
    """Threads that torch computes with; 0 leaves its own choice. Call before torch is imported."""
    if num_threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
        import torch

        torch.set_num_threads(num_threads)
