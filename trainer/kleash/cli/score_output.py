"""What ``kleash score`` writes: one JSON object for each scored line, in order, whole lines at a
time, and how a file that an interrupted run left is gone on with."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kleash.base.errors import ConfigError
from kleash.cli.score_input import Entry
from kleash.client.reward import Comparison, Score

Record = dict[str, Any]


def score_record(entry: Entry, digest: str, score: Score) -> Record:
    """Of a text or a conversation."""
    return _head(entry, digest, score.code) | _outcome(score)


def ranking_record(entry: Entry, digest: str, comparison: Comparison) -> Record:
    """Of a ranking; its code is that of the first response without a score."""
    failed = [score for score in comparison.scores if not score.is_ok]
    record = _head(entry, digest, failed[0].code if failed else "OK")
    if failed:
        record["error"] = f"responses[{failed[0].index}]: {failed[0].error_message}"
    record["ranking"] = comparison.ranking
    record["preference"] = [_shortest(each) for each in comparison.preference]
    record["scores"] = [{"code": each.code} | _outcome(each) for each in comparison.scores]
    return record


def failed_record(entry: Entry, digest: str, cause: str) -> Record:
    """Of a line that the service refused as a whole."""
    return _head(entry, digest, "INVALID_INPUT") | {"error": cause}


def _head(entry: Entry, digest: str, code: str) -> Record:
    label = {} if entry.label is None else {"id": entry.label}
    return {"line": entry.line.number, **label, "code": code, "digest": digest}


def _outcome(score: Score) -> Record:
    if not score.is_ok:
        return {"error": score.error_message}
    outcome: Record = {"score": _shortest(score.value)}
    if score.components:
        outcome["components"] = {name: _shortest(v) for name, v in score.components.items()}
    if score.uncertainty:
        outcome["uncertainty"] = _shortest(score.uncertainty)
    outcome["token_count"] = score.token_count
    if score.is_truncated:
        outcome["truncated"] = True
    return outcome


def _shortest(value: float) -> float:
    """The fewest digits that give the same float32."""
    return float(str(np.float32(value)))


class Output:
    """A file that grows by whole lines, or standard output."""

    def __init__(self, file: BinaryIO, *, is_own: bool) -> None:
        self._file = file
        self._is_own = is_own

    def write(self, records: Sequence[Record]) -> None:
        """Append one line for each record."""
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        self._file.write(text.encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file; standard output stays open."""
        if self._is_own:
            self._file.close()


def open_output(path: Path | None, *, resume: bool) -> Output:
    """Standard output without a path.

    Raises ConfigError for a file that exists, unless ``resume``, and for one that cannot be
    written.
    """
    if path is None:
        return Output(sys.stdout.buffer, is_own=False)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if resume else os.O_EXCL)
    try:
        return Output(os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0), is_own=True)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists already; --resume goes on with it, or choose another --out."
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}.") from None


def cut_torn_line(path: Path) -> None:
    """Take off what an interrupted write left after the last whole line."""
    try:
        with path.open("r+b") as file:
            end = position = file.seek(0, os.SEEK_END)
            while position > 0:
                begin = max(position - 65536, 0)
                file.seek(begin)
                found = file.read(position - begin).rfind(b"\n")
                if found >= 0:
                    position = begin + found + 1
                    break
                position = begin
            if position < end:
                file.truncate(position)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"cannot go on with {path}: {error.strerror}.") from None


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file that ``kleash score`` wrote; none where there is no file.

    A last line that was not written to its end is none. Raises ConfigError for any other file.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            record: Any = None
            try:
                record = json.loads(line)
                is_ours = isinstance(record["line"], int) and isinstance(record["digest"], str)
            except (ValueError, TypeError, KeyError, RecursionError):
                is_ours = False
            if not is_ours:
                raise ConfigError(
                    f"{path}:{number} was not written by kleash score; choose another --out."
                )
            yield record


def one_revision(path: Path, records: Iterable[Record]) -> Iterator[Record]:
    """The same records. Raises ConfigError when they are by more than one model or revision."""
    first: tuple[Any, Any] | None = None
    for record in records:
        served = record.get("model"), record.get("revision")
        if first is None:
            first = served
        if served != first:
            raise ConfigError(f"{path} holds scores of {first} and of {served}; begin a new file.")
        yield record
