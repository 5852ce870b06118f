"""``kleash token NAME``: a key for a caller of servers with server.auth.mode=token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kleash.base.errors import ConfigError
from kleash.cli.flags import Parser, parse_or_help
from kleash.cli.output import show
from kleash.rpc.static_tokens import make_token

MAX_DAYS = 36500


def run(arguments: Sequence[str]) -> int:
    """Make a token and the line that servers know it by."""
    flags = parse_or_help(_parser(), arguments)
    if flags is None:
        return 0
    until = None
    if flags.days is not None:
        if not 0 < flags.days <= MAX_DAYS:
            raise ConfigError(f"--days={flags.days:g} is not between 0 and {MAX_DAYS}.")
        until = datetime.now(UTC) + timedelta(days=flags.days)
    token, line = make_token(flags.name, until)
    if flags.tokens_file is None:
        show(f"token: {token}\nline:  {line}")
    else:
        _append(flags.tokens_file, line)
        show(token)
    return 0


def _append(path: Path, line: str) -> None:
    """Add ``line`` at the end, in one write; a new file is for its owner alone."""
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
            text = file.read()
            is_cut = bool(text) and not text.endswith(b"\n")
            file.write(b"\n" * is_cut + line.encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}.") from None


def _parser() -> Parser:
    parser = Parser(
        "kleash token",
        description=(
            "Make a token for one caller of servers with --server.auth.mode=token, and the line "
            "for their --server.auth.tokens_file. The token is shown once and kept nowhere: the "
            "line holds its digest. The caller sets KLEASH_TOKEN or KLEASH_TOKEN_FILE."
        ),
        allow_abbrev=False,
    )
    name = "who calls, as logs and server.auth.allowed_callers have it"
    parser.add_argument("name", metavar="NAME", help=name)
    file = "add the line to this file, and print the token alone"
    parser.add_argument("--tokens_file", metavar="FILE", type=Path, help=file)
    parser.add_argument("--days", metavar="N", type=float, help="days until the token ends")
    return parser
