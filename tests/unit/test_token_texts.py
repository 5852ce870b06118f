"""Texts of tokens: together they are the text, also where a letter takes several tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kleash.lm.load import load_tokenizer
from kleash.lm.tiny import Kind
from kleash.ppo import samples
from kleash.ppo.samples import newest_samples
from kleash.ppo.token_texts import token_texts

pytestmark = pytest.mark.unit

TEXTS = ("What is 3 plus 4?", "naïve café, 東京 🙂 end", "two  spaces\n\nand lines", "🙂")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("text", TEXTS)
def test_together_they_are_the_text(tiny_folders: dict[Kind, Path], kind: Kind, text: str) -> None:
    tokenizer = load_tokenizer(tiny_folders[kind])
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(texts) == whole
    assert not any("\ufffd" in each for each in texts if "\ufffd" not in whole)


def test_a_letter_of_several_tokens_is_the_last_ones(tiny_folders: dict[Kind, Path]) -> None:
    tokenizer = load_tokenizer(tiny_folders["gpt2"])
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) == 4
    assert token_texts(tokenizer, ids) == ["", "", "", "🙂"]
    # One that is cut in the middle is told as what it is.
    assert token_texts(tokenizer, ids[:2]) == ["", "\ufffd"]


def test_no_tokens_have_no_texts(tiny_folders: dict[Kind, Path]) -> None:
    assert token_texts(load_tokenizer(tiny_folders["gpt2"]), []) == []


def test_the_newest_samples_are_those_of_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "samples.jsonl"
    assert newest_samples(path) == []
    path.write_text("")
    assert newest_samples(path) == []
    rows = [{"step": step, "n": n} for step in range(1, 200) for n in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 200, "cu')
    monkeypatch.setattr(samples, "NEWEST_BYTES", 100)
    assert newest_samples(path) == rows[-2:]
