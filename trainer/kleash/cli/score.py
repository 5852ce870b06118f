"""``kleash score``: rewards of the lines of a file, from a reward service. Needs the client alone.

Lines are sent in blocks, several at a time, and results are written in the order of the lines:
however large the input is, memory holds a few blocks.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from kleash.base.errors import ConfigError, DataError
from kleash.cli.output import forget_reader, show
from kleash.cli.score_flags import Flags, help_text, parse_flags
from kleash.cli.score_input import PARSERS, Entry, Line, Parse, read_lines
from kleash.cli.score_output import (
    Output,
    Record,
    cut_torn_line,
    failed_record,
    one_revision,
    open_output,
    ranking_record,
    read_records,
    score_record,
)
from kleash.cli.score_progress import Tally
from kleash.client import InvalidRequest, NotFound, RewardClient

BLOCK_ITEMS = 256
BLOCK_BYTES = 1024 * 1024
"""A block is full at either."""


def run(arguments: Sequence[str]) -> int:
    """Score, and return 0 when every line has a score, 1 when some have none."""
    flags = parse_flags(arguments)
    if flags is None:
        show(help_text())
        return 0
    with contextlib.ExitStack() as stack:
        lines, size = _lines(flags, stack)
        tally = Tally(size)
        reading = _Reading(lines, PARSERS[flags.format], flags.skip_bad, tally)
        found = _written(flags.out) if flags.resume and flags.out is not None else None
        client = stack.enter_context(_client(flags))
        model, revision = _pin(client, flags, found)
        pinned = client.with_options(model=model, revision=revision, parallel_calls=1)
        if found is not None and flags.out is not None:
            _pass_over(flags.out, reading, flags, tally)
            cut_torn_line(flags.out)
        output = open_output(flags.out, resume=flags.resume)
        stack.callback(output.close)
        served = {"model": model, "revision": revision}
        with tally:
            _score(reading, pinned, output, flags, served)
    return 1 if tally.num_failed else 0


def _client(flags: Flags) -> RewardClient:
    keywords: dict[str, Any] = {"parallel_calls": 1}
    if flags.address:
        keywords["address"] = flags.address
    if flags.model:
        keywords["model"] = flags.model
    if flags.timeout_s is not None:
        keywords["timeout_s"] = flags.timeout_s
    return RewardClient.from_env(revision=flags.revision, **keywords)


def _lines(flags: Flags, stack: contextlib.ExitStack) -> tuple[Iterator[Line], int]:
    """The input, and its size in bytes; 0 where that is not known."""
    if flags.texts:
        raw = [text.encode("utf-8", "surrogateescape") for text in flags.texts]
        lines = (Line("--text", n, each, len(each)) for n, each in enumerate(raw, start=1))
        return lines, sum(map(len, raw))
    if flags.file is None:
        if sys.stdin.isatty():
            raise ConfigError(
                "there is nothing to score: give a file or --text=..., or pipe lines in; "
                "kleash score --help tells more."
            )
        return read_lines(sys.stdin.buffer, "standard input"), 0
    try:
        file: BinaryIO = stack.enter_context(flags.file.open("rb"))
        size = flags.file.stat().st_size
    except OSError as error:
        raise ConfigError(f"cannot read {flags.file}: {error.strerror}.") from None
    return read_lines(file, str(flags.file)), size


@dataclass
class _Reading:
    """Entries of the input; bad lines raise, or are left out and counted."""

    lines: Iterator[Line]
    parse: Parse
    skips_bad: bool
    tally: Tally

    def __iter__(self) -> Iterator[Entry]:
        for line in self.lines:
            self.tally.num_bytes += line.num_bytes
            try:
                entry = self.parse(line)
            except DataError as error:
                if not self.skips_bad:
                    raise
                self.tally.leave_out(str(error))
                continue
            if entry is not None:
                yield entry


def _written(out: Path) -> Record:
    """The first record of what is there; empty when there is none."""
    return next(read_records(out), {})


def _pin(client: RewardClient, flags: Flags, found: Record | None) -> tuple[str, str]:
    """Model and revision of every score of this run."""
    if not found:
        served = client.get_model().model
        return served.name, served.revision
    model, revision = found.get("model", ""), found.get("revision", "")
    begun = f"{flags.out} was begun with the model '{model}', revision {revision}"
    if (flags.model and flags.model != model) or (flags.revision and flags.revision != revision):
        raise ConfigError(f"{begun}; leave --model and --revision out, or begin a new file.")
    try:
        client.with_options(model=model, revision=revision).get_model()
    except NotFound as error:
        raise ConfigError(f"{begun}; that is not served now ({error}) Begin a new file.") from None
    return model, revision


def _pass_over(out: Path, reading: _Reading, flags: Flags, tally: Tally) -> None:
    """Go on in the input to what has no record yet. Raises ConfigError when the two do not fit."""
    entries = iter(reading)
    for number, record in enumerate(one_revision(out, read_records(out)), start=1):
        entry = next(entries, None)
        place = f"{out}:{number}"
        if entry is None:
            raise ConfigError(f"{place} has a result, and the input ends before: begin a new file.")
        fits = record["line"] == entry.line.number
        if not fits or record["digest"] != entry.line.digest(flags.settings):
            raise ConfigError(
                f"{place} is the result of another line than {entry.line.path}:"
                f"{entry.line.number}, or of other options: begin a new file, or give the input "
                "and the options that it was begun with."
            )
        tally.count(record)
    tally.num_found = tally.num_done


def _score(
    reading: _Reading, client: RewardClient, output: Output, flags: Flags, served: Record
) -> None:
    tally = reading.tally
    try:
        with contextlib.closing(_in_order(reading, client, flags)) as blocks:
            for records in blocks:
                for record in records:
                    record.update(served)
                    tally.count(record)
                output.write(records)
                tally.show()
    except BrokenPipeError:  # as `head` does
        forget_reader()


def _in_order(
    entries: Iterable[Entry], client: RewardClient, flags: Flags
) -> Generator[list[Record], None, None]:
    """Records of each block; an error of the input comes after those of the lines before it."""
    waiting: deque[Future[list[Record]]] = deque()
    failure: DataError | None = None
    threads = ThreadPoolExecutor(flags.parallel)
    try:
        try:
            for block in _blocks(entries):
                waiting.append(threads.submit(_score_block, block, client, flags))
                if len(waiting) > flags.parallel:
                    yield waiting.popleft().result()
        except DataError as error:
            failure = error
        while waiting:
            yield waiting.popleft().result()
    except BaseException:
        client.close()  # ends the calls that are under way, so that their threads end
        raise
    finally:
        threads.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure


@dataclass
class _Block:
    entries: list[Entry] = field(default_factory=list)
    num_items: int = 0
    num_bytes: int = 0


def _blocks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    block = _Block()
    try:
        for entry in entries:
            block.entries.append(entry)
            block.num_items += max(len(entry.responses), 1)
            block.num_bytes += len(entry.line.raw)
            if block.num_items >= BLOCK_ITEMS or block.num_bytes >= BLOCK_BYTES:
                yield block.entries
                block = _Block()
    except DataError:
        if block.entries:
            yield block.entries
        raise
    if block.entries:
        yield block.entries


def _score_block(entries: Sequence[Entry], client: RewardClient, flags: Flags) -> list[Record]:
    options: Any = {"normalize": flags.normalize, "truncation": flags.truncation}
    singles = [entry.given for entry in entries if not entry.responses]
    scores = iter(client.score(singles, raise_on_item_error=False, **options))
    records = []
    for entry in entries:
        digest = entry.line.digest(flags.settings)
        if not entry.responses:
            records.append(score_record(entry, digest, next(scores)))
            continue
        try:
            comparison = client.compare(entry.given, entry.responses, **options)
        except InvalidRequest as error:
            records.append(failed_record(entry, digest, str(error)))
        else:
            records.append(ranking_record(entry, digest, comparison))
    return records
