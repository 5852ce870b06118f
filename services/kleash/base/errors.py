"""The exception tree. Messages are whole sentences: what was seen, where, and the remedy.

KleashError
├── UserError (ValueError)      a user's mistake; the command line prints it and exits with 2
│   ├── ConfigError             a configuration file, key, flag or value
│   ├── DataError               a line of a data file: names file, line and field
│   └── ModelError              a model folder or a tokenizer
└── RemoteError                 a service answered with an error; see kleash.rpc.errors
"""

from __future__ import annotations


class KleashError(Exception):
    """Base of every error that Kleash raises on purpose."""


class UserError(KleashError, ValueError):
    """Input that cannot be used; the message is one sentence with the place and the remedy."""


class ConfigError(UserError):
    """A configuration that cannot be used."""


class DataError(UserError):
    """A line of a data file that cannot be used."""

    def __init__(self, message: str, *, path: str = "", line: int = 0, field: str = "") -> None:
        place = path + (f":{line}" if line else "") + (f": field '{field}'" if field else "")
        super().__init__(f"{place}: {message}" if place else message)
        self.path, self.line, self.field = path, line, field


class ModelError(UserError):
    """A model folder or tokenizer that cannot be used."""


class RemoteError(KleashError):
    """A service answered with an error."""
