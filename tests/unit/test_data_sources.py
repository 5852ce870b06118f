"""Where data may come from: files, folders of `datasets`, the hub; and in which order it goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from kleash.base.errors import DataError
from kleash.data.chat import Message
from kleash.data.demonstrations import load_demonstrations
from kleash.data.jsonl import read_records
from kleash.data.prompts import load_prompts
from kleash.data.shuffle import shuffled
from kleash.lm.load import load_tokenizer

pytestmark = pytest.mark.unit

USER: Message = {"role": "user", "content": "What is 3 plus 4?"}
ANSWER: Message = {"role": "assistant", "content": "7."}
Write = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(tiny_folder)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write lines (objects as JSON, strings and bytes as they are) and return the file's path."""

    def write_lines(*lines: Any) -> str:
        path = tmp_path / "data.jsonl"
        with path.open("wb") as file:
            for line in lines:
                if not isinstance(line, str | bytes):
                    line = json.dumps(line)
                file.write((line.encode() if isinstance(line, str) else line) + b"\n")
        return str(path)

    return write_lines


def test_sources_without_anything_to_read(
    tokenizer: Any, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"data.jsonl: holds no records"):
        load_prompts(write(), tokenizer, max_tokens=9)
    with pytest.raises(DataError, match=r"holds no usable record; all 2 were bad, first: .*:1: "):
        load_prompts(write("x", "y"), tokenizer, max_tokens=9, skip_bad=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for missing in (f"{tmp_path}/no.jsonl", "no.jsonl", "a/b.jsonl", "a/b/c", "no", "runs/no"):
        with pytest.raises(DataError, match="there is no such file or folder"):
            load_prompts(missing, tokenizer, max_tokens=9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: cannot be read by datasets"):
        load_prompts(str(tmp_path / "empty"), tokenizer, max_tokens=9)


def test_a_hub_that_cannot_be_reached(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^owner/set:train: cannot be read by datasets: .*Hub"):
        load_prompts("owner/set:train", tokenizer, max_tokens=9)


def test_a_byte_order_mark_is_no_mistake(write: Write) -> None:
    (record,) = read_records(write(b'\xef\xbb\xbf{"prompt": "x"}\r'))
    assert (record.line, record.fields) == (1, {"prompt": "x"})


ROWS = [
    {"messages": [USER, ANSWER], "source": "a"},
    {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]},
]


def _expected(tokenizer: Any, write: Write) -> list[list[int]]:
    loaded = load_demonstrations(write(*ROWS), tokenizer, max_tokens=99)
    return [sequence.ids.tolist() for sequence in loaded]


def _save(folder: Path) -> dict[str, str]:
    """The same rows in every local form that `datasets` has; source by name."""
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(folder / "disk")
    datasets.DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(folder / "dict")
    (folder / "parquet").mkdir()
    rows.to_parquet(folder / "parquet" / "part-0.parquet")
    (folder / "json").mkdir()
    rows.to_json(folder / "json" / "train.jsonl")
    rows.select([0]).to_json(folder / "json" / "test.jsonl")
    return {
        "disk": f"{folder}/disk",
        "dict": f"{folder}/dict:test",
        "parquet": f"{folder}/parquet",
        "parquet file": f"{folder}/parquet/part-0.parquet",
        "json": f"{folder}/json",
    }


def test_every_local_source_of_datasets(tokenizer: Any, write: Write, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    expected = _expected(tokenizer, write)
    sources = _save(tmp_path)
    for name, source in sources.items():
        loaded = load_demonstrations(source, tokenizer, max_tokens=99)
        assert [sequence.ids.tolist() for sequence in loaded] == expected, name
        assert len(loaded.sha256) == 64
    first = load_demonstrations(f"{tmp_path}/json:test", tokenizer, max_tokens=99)
    assert [sequence.ids.tolist() for sequence in first] == expected[:1]
    # A column that a row lacks is missing, not null; rows count as lines.
    second = list(read_records(sources["disk"]))[1]
    assert (second.line, set(second.fields)) == (2, {"messages"})
    with pytest.raises(DataError, match=r"disk:1: field 'prompt': is missing"):
        load_prompts(sources["disk"], tokenizer, max_tokens=99)


def test_a_file_has_no_splits(tokenizer: Any, write: Write) -> None:
    source = write({"prompt": "x"}) + ":train"
    with pytest.raises(DataError, match="is a file and has no splits; leave ':train' out"):
        load_prompts(source, tokenizer, max_tokens=9)


def test_bad_sources_of_datasets(tokenizer: Any, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match=r"dict: has no split 'train'; it has a, b"):
        load_demonstrations(f"{tmp_path}/dict", tokenizer, max_tokens=99)
    with pytest.raises(DataError, match=r"dict:c: has no split 'c'; it has a, b"):
        load_demonstrations(f"{tmp_path}/dict:c", tokenizer, max_tokens=99)
    rows.save_to_disk(tmp_path / "disk")
    with pytest.raises(DataError, match="has no splits; leave ':train' out"):
        load_demonstrations(f"{tmp_path}/disk:train", tokenizer, max_tokens=99)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"bad.parquet: cannot be read by datasets: "):
        load_demonstrations(f"{tmp_path}/bad.parquet", tokenizer, max_tokens=99)


def test_shuffle_is_a_pure_function_of_seed_epoch_and_purpose() -> None:
    order = shuffled(100, seed=1, epoch=2)
    assert sorted(order.tolist()) == list(range(100))
    assert shuffled(100, seed=1, epoch=2).tolist() == order.tolist()
    others = [
        shuffled(100, seed=2, epoch=2),
        shuffled(100, seed=1, epoch=3),
        shuffled(100, seed=1, epoch=2, purpose="held out"),
    ]
    assert all(other.tolist() != order.tolist() for other in others)
