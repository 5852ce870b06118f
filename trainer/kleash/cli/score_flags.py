"""The flags of ``kleash score``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleash.base.errors import ConfigError
from kleash.cli.flags import Parser
from kleash.client.reward import Truncation

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
BOOLEANS = ("normalize", "skip_bad", "resume")
MAX_PARALLEL = 256


@dataclass(frozen=True)
class Flags:
    """What to score, how, and where results go."""

    file: Path | None
    """Input; None for standard input, unless ``texts`` are given."""
    texts: tuple[str, ...]
    out: Path | None
    """Output; None for standard output."""
    format: str
    """A key of score_input.PARSERS."""
    address: str
    """Empty for that of the environment."""
    model: str
    revision: str
    normalize: bool
    truncation: Truncation
    parallel: int
    """Blocks of lines that are under way at a time."""
    timeout_s: float | None
    """Of each call; None for that of the environment."""
    skip_bad: bool
    resume: bool

    @property
    def settings(self) -> str:
        """What a line's result depends on besides the line and the model."""
        return json.dumps([self.format == "jsonl", self.normalize, self.truncation])


def help_text() -> str:
    """Usage and every flag."""
    return _parser().format_help().rstrip()


def parse_flags(arguments: Sequence[str]) -> Flags | None:
    """The flags, or None when help is wanted. Raises ConfigError."""
    if any(argument in ("-h", "--help") for argument in arguments):
        return None
    given = vars(_parser().parse_args([_underscored(each) for each in arguments]))
    file, texts = given.pop("file"), tuple(given.pop("text") or ())
    if texts and file is not None:
        raise ConfigError(f"give --text or the file {file}, not both.")
    if not texts and file == Path("-"):
        file = None
    out = given.pop("out")
    if out == Path("-"):
        out = None
    flags = Flags(file=file, texts=texts, out=out, **_checked(given))
    if flags.resume and flags.out is None:
        raise ConfigError("--resume goes on with a file; name it with --out=FILE.")
    if flags.format == "auto" and (texts or (file and file.suffix in JSON_SUFFIXES)):
        return _replaced(flags, "text" if texts else "jsonl")
    return flags


def _replaced(flags: Flags, its_format: str) -> Flags:
    return Flags(**{**vars(flags), "format": its_format})


def _underscored(argument: str) -> str:
    """Dashes in a key count as underscores, as in every command; a lone switch means true."""
    if not argument.startswith("--") or argument == "--":
        return argument
    key, equals, value = argument[2:].partition("=")
    key = key.replace("-", "_")
    if key in BOOLEANS and not equals:
        equals, value = "=", "true"
    return f"--{key}{equals}{value}"


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    if not 1 <= given["parallel"] <= MAX_PARALLEL:
        raise ConfigError(f"--parallel={given['parallel']} is not between 1 and {MAX_PARALLEL}.")
    timeout_s = given["timeout_s"]
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise ConfigError(f"--timeout_s={timeout_s:g} is not a number of seconds above 0.")
    return given


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text == "true"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "kleash score",
        description=(
            "Rewards of the lines of a file from a reward service, as JSON Lines in the same "
            'order. A line is a text, or with --format=jsonl one of {"text"}, {"messages"}, '
            '{"prompt", "response"} and {"prompt", "responses": [...]}, which are ranked; "id" '
            "is kept. Status: 0 every line has a score, 1 some have none, 2 the input or a flag "
            "cannot be used, 3 the service failed."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", metavar="FILE", nargs="?", type=Path, help="standard input without it")
    add("--text", metavar="TEXT", action="append", help="score this text; may be repeated")
    add("--out", metavar="FILE", type=Path, help="standard output without it")
    help_ = "HOST:PORT of the service; KLEASH_REWARD_ADDRESS without it"
    add("--address", metavar="ADDRESS", default="", help=help_)
    help_ = "its name; KLEASH_REWARD_MODEL, then the service's default, without it"
    add("--model", metavar="NAME", default="", help=help_)
    help_ = "of the model; that of now without it, and the same for every line"
    add("--revision", metavar="SHA256", default="", help=help_)
    help_ = "text or jsonl; by the file's name without it"
    add("--format", choices=("auto", "text", "jsonl"), default="auto", help=help_)
    help_ = "false for raw scores; true without it"
    add("--normalize", metavar="BOOL", type=_boolean, default=True, help=help_)
    help_ = "what happens to an input that is too long; error without it"
    add("--truncation", choices=("error", "left", "right"), default="error", help=help_)
    help_ = "blocks of lines under way at a time; 4 without it"
    add("--parallel", metavar="N", type=int, default=4, help=help_)
    help_ = "seconds that a call may take; KLEASH_REWARD_TIMEOUT_S without it"
    add("--timeout_s", metavar="N", type=float, help=help_)
    help_ = "leave out lines that cannot be used, and count them"
    add("--skip_bad", metavar="BOOL", type=_boolean, default=False, help=help_)
    help_ = "go on with the --out file of an interrupted run"
    add("--resume", metavar="BOOL", type=_boolean, default=False, help=help_)
    return parser
