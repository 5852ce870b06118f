"""Records of a data source with their place: a JSON Lines file or whatever `datasets` can read.

What the fields mean is in fields.py; what a file of prompts, demonstrations or comparisons looks
like is in the module of that name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from kleash.base.errors import DataError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOADERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", *_LOADERS)


@dataclass(frozen=True, eq=False)
class Record:
    """One object of a source."""

    path: str
    line: int
    """Line of the file, or number of the row in a data set; the first one is 1."""
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """``path:line``."""
        return f"{self.path}:{self.line}"

    def error(self, message: str, field: str = "") -> DataError:
        """A DataError that names this record's file and line."""
        return DataError(message, path=self.path, line=self.line, field=field)


class Loaded(list[T], Generic[T]):
    """What a source holds, and what had to be left out."""

    skipped: list[str]
    """One sentence for each bad record that ``skip_bad`` left out."""
    sha256: str
    """Of the bytes of a file, else of the records as JSON; in hexadecimal."""
    num_tied_pairs: int
    """Pairs without a winner, which comparisons leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped = []
        self.sha256 = ""
        self.num_tied_pairs = 0


def read_records(source: str, *, skip_bad: bool = False) -> Iterator[Record]:
    """Yield the records of ``source``.

    Args:
        source: a JSON Lines file, a parquet, csv or arrow file, a folder that ``datasets`` wrote
            (save_to_disk) or can read, or ``owner/name`` of a data set on the Hugging Face hub;
            folders and names may end in ``:split``.
        skip_bad: leave out lines that are not JSON objects instead of raising DataError.
    """
    yield from load_records(source, lambda record: record, skip_bad=skip_bad)


def load_records(source: str, parse: Callable[[Record], T], *, skip_bad: bool) -> Loaded[T]:
    """Read all of ``source`` and ``parse`` each record, which raises DataError for a bad one.

    The first bad record raises, or with ``skip_bad`` each one is left out and noted. A source
    without any good record raises.
    """
    loaded: Loaded[T] = Loaded()
    digest = hashlib.sha256()
    for found in _read(source, digest.update):
        try:
            if isinstance(found, DataError):
                raise found
            loaded.append(parse(found))
        except DataError as error:
            if not skip_bad:
                raise
            loaded.skipped.append(str(error))
    if not loaded and loaded.skipped:
        why = f"all {len(loaded.skipped)} were bad, first: {loaded.skipped[0]}"
        raise DataError(f"holds no usable record; {why}", path=source)
    if not loaded:
        raise DataError("holds no records.", path=source)
    loaded.sha256 = digest.hexdigest()
    if loaded.skipped:
        num_skipped, first = len(loaded.skipped), loaded.skipped[0]
        logger.warning(
            "bad records left out: %d of %d; %s", num_skipped, num_skipped + len(loaded), first
        )
    return loaded


def _read(source: str, update: Callable[[bytes], None]) -> Iterator[Record | DataError]:
    path, split = _split_source(source)
    if path.is_file() and split:
        raise DataError(f"is a file and has no splits; leave ':{split}' out.", path=source)
    if path.is_file() and path.suffix not in _LOADERS:
        yield from _read_lines(path, update)
        return
    if path.is_file():
        rows = _load_dataset(source, _LOADERS[path.suffix], "train", data_files=str(path))
    elif path.is_dir():
        rows = _load_folder(source, path, split)
    elif _is_hub_name(source.partition(":")[0]):
        rows = _load_dataset(source, str(path), split)
    else:
        raise DataError("there is no such file or folder; check the path.", path=source)
    for number, fields in _numbered(source, rows):
        # Arrow gives every row every column, empty where the row had none.
        fields = {name: value for name, value in fields.items() if value is not None}
        update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
        yield Record(source, number, fields)


def _is_hub_name(name: str) -> bool:
    """``owner/name``, unless it looks like a path with a slip: asking the hub takes a while."""
    is_path = Path(name).suffix in _SUFFIXES or Path(name).parent.exists()
    return _HUB_NAME.fullmatch(name) is not None and not is_path


def _split_source(source: str) -> tuple[Path, str]:
    """Path or name, and split; a path that exists as a whole has no split."""
    name, colon, split = source.rpartition(":")
    if Path(source).exists() or not colon:
        return Path(source), ""
    return Path(name), split


def _read_lines(path: Path, update: Callable[[bytes], None]) -> Iterator[Record | DataError]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}.", path=str(path)) from None
    with file:
        for number, line in enumerate(file, start=1):
            update(line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                fields = json.loads(text)
            except UnicodeDecodeError as error:
                yield DataError(f"is not UTF-8: {error.reason}.", path=str(path), line=number)
            except (ValueError, RecursionError) as error:
                yield DataError(
                    f"is not valid JSON ({error}); write one object a line.",
                    path=str(path),
                    line=number,
                )
            else:
                if isinstance(fields, dict):
                    yield Record(str(path), number, fields)
                    continue
                kind = type(fields).__name__
                yield DataError(
                    f"is a JSON {kind}, not an object; write one object a line.",
                    path=str(path),
                    line=number,
                )


def _load_folder(source: str, path: Path, split: str) -> Any:
    is_saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    if not is_saved:
        return _load_dataset(source, str(path), split)
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise what they like for a damaged folder
        raise _unreadable(source, error) from None
    if isinstance(loaded, datasets.DatasetDict):
        return _choose_split(source, loaded, split)
    if split:
        raise DataError(f"has no splits; leave ':{split}' out.", path=source)
    return loaded


def _load_dataset(source: str, name: str, split: str, **options: Any) -> Any:
    """Rows of a data set, streamed: nothing is copied into a cache of ``datasets``."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, streaming=True, **options)
    except Exception as error:  # network, hub, file format: datasets raises what they raise
        raise _unreadable(source, error) from None
    return _choose_split(source, loaded, split)


def _choose_split(source: str, splits: Any, split: str) -> Any:
    name = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if name not in splits:
        raise DataError(
            f"has no split '{name}'; it has {', '.join(splits)}: name one with :SPLIT.", path=source
        )
    return splits[name]


def _numbered(source: str, rows: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from enumerate(rows, start=1)
    except Exception as error:  # pyarrow's errors, which arrive with the rows
        raise _unreadable(source, error) from None


def _unreadable(source: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return DataError(f"cannot be read by datasets: {reason}.", path=source)
