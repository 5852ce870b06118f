"""Comparisons: pairs and rankings, ties, and the places of mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kleash.base.errors import DataError
from kleash.data.chat import Message
from kleash.data.comparisons import load_comparisons
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


def test_every_form_of_a_pair(tokenizer: Any, write: Write) -> None:
    bad = {"role": "assistant", "content": "8."}
    source = write(
        {"prompt": "3+4=", "chosen": "7.", "rejected": "8."},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [bad]},
        {"prompt": [USER], "chosen": "7.", "rejected": "8.", "margin": 2, "source": "web"},
        {"chosen": [USER, ANSWER], "rejected": [USER, bad]},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, bad], "annotator": 4},
        {
            "prompt": USER["content"],
            "chosen": [USER, ANSWER],
            "rejected": [USER, bad],
            "dimension": "honest",
        },
    )
    rankings = load_comparisons(source, tokenizer, max_tokens=99)
    chat = "<|user|>What is 3 plus 4?<|assistant|>"
    for ranking, prompt in zip(rankings, ["3+4=", *[chat] * 5], strict=True):
        assert tokenizer.decode(ranking.prompt_ids) == prompt
        texts = [tokenizer.decode(response) for response in ranking.responses]
        assert texts == ["7.<|end|>", "8.<|end|>"]
    assert [ranking.pairs for ranking in rankings] == [
        [(0, 1, 2.0 if index == 2 else 0.0)] for index in range(6)
    ]
    assert [ranking.annotator for ranking in rankings] == ["", "", "", "", "4", ""]
    assert [ranking.dimension for ranking in rankings] == ["", "", "", "", "", "honest"]
    assert rankings[2].fields == {"source": "web"}
    assert rankings.num_tied_pairs == 0


def test_ranking_is_expanded_to_all_pairs_in_one_element(tokenizer: Any, write: Write) -> None:
    """Facts R5: all pairs of a prompt in one batch element; ties are dropped and counted."""
    source = write(
        {"prompt": "x", "responses": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 4]},
        {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "x", "responses": ["a", "a", "b"], "ranks": [1, 2, 3]},
        {"prompt": "x", "chosen": "same", "rejected": "same"},
    )
    rankings = load_comparisons(source, tokenizer, max_tokens=99)
    assert [ranking.pairs for ranking in rankings] == [
        [(1, 0, 0.0), (0, 3, 0.0), (1, 2, 0.0), (1, 3, 0.0), (2, 3, 0.0)],
        [(0, 2, 0.0), (1, 2, 0.0)],
    ]
    assert rankings.num_tied_pairs == 4
    assert [tokenizer.decode(ids) for ids in rankings[0].responses] == [
        f"{letter}<|end|>" for letter in "abcd"
    ]


def test_nothing_but_ties_is_an_error(tokenizer: Any, write: Write) -> None:
    source = write({"prompt": "x", "responses": ["a", "b", "c"], "ranks": [1, 1, 1]})
    with pytest.raises(DataError, match=r"data.jsonl: all 3 pairs are ties"):
        load_comparisons(source, tokenizer, max_tokens=99)


PAIR = {"prompt": "x", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 2]}
BAD_COMPARISONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "x", "chosen": "a"}, "rejected", "is missing"),
    ({"chosen": "a", "rejected": "b"}, "prompt", "is missing"),
    (PAIR | {"chosen": " "}, "chosen", "is empty"),
    (PAIR | {"rejected": ["b"]}, "rejected[0]", "must be a message"),
    (PAIR | {"rejected": [ANSWER]}, "rejected", "both as text or both as messages"),
    (PAIR | {"rejected": "1" * 30}, "rejected", "has 32 tokens, more than the 20"),
    (PAIR | {"margin": "big"}, "margin", "must be a number, not text"),
    (PAIR | {"margin": True}, "margin", "must be a number"),
    (PAIR | {"margin": -1}, "margin", "is -1"),
    (PAIR | {"margin": float("nan")}, "margin", "is nan"),
    (PAIR | {"annotator": 1.5}, "annotator", "must be text or a whole number"),
    (PAIR | {"dimension": ["honest"]}, "dimension", "must be text or a whole number"),
    (PAIR | {"chosen": [USER, USER], "rejected": [USER, ANSWER]}, "chosen", "ends with role"),
    (
        {"chosen": [USER, ANSWER], "rejected": [ANSWER, USER, ANSWER]},
        "rejected",
        "has other messages before",
    ),
    (
        {"prompt": "other", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
        "prompt",
        "is not what 'chosen' and 'rejected' begin with",
    ),
    ({"prompt": "x", "responses": ["a", "b"]}, "ranks", "is missing"),
    (RANKED | {"responses": ["a"], "ranks": [1]}, "responses", "two or more"),
    (RANKED | {"responses": "ab"}, "responses", "two or more"),
    (RANKED | {"responses": ["a", ""]}, "responses[1]", "is empty"),
    (RANKED | {"responses": ["a", "1" * 30]}, "responses[1]", "more than the 20"),
    (RANKED | {"ranks": [1, 2, 3]}, "ranks", "has 3 ranks for 2 responses"),
    (RANKED | {"ranks": [1, 0]}, "ranks[1]", "is 0; a rank is a whole number"),
    (RANKED | {"ranks": [1, 2.5]}, "ranks[1]", "is 2.5"),
    (RANKED | {"ranks": [1, "2"]}, "ranks[1]", "is '2'"),
    (RANKED | {"margin": 1}, "margin", "belongs to a pair"),
]


@pytest.mark.parametrize(("line", "field", "reason"), BAD_COMPARISONS)
def test_bad_comparison(
    tokenizer: Any, write: Write, line: dict[str, Any], field: str, reason: str
) -> None:
    source = write(PAIR, line)
    with pytest.raises(DataError) as caught:
        load_comparisons(source, tokenizer, max_tokens=20)
    assert (caught.value.line, caught.value.field) == (2, field)
    assert reason in str(caught.value)
    loaded = load_comparisons(source, tokenizer, max_tokens=20, skip_bad=True)
    assert (len(loaded), len(loaded.skipped)) == (1, 1)
