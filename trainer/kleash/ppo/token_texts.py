"""Texts of tokens, one by one, as they read in their context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""How a decoder writes bytes that are not yet a whole letter."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, special tokens included; together they are that of all.

    A token decoded alone may lack its space, and may be half a letter: each is what a few tokens
    with it say beyond those without. Where a letter takes several tokens, the last of them has it.
    """
    texts: list[str] = []
    start = told = 0  # ids[start:told] is the context, ids[told:] is not told yet
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[start:told])
        text = _decode(tokenizer, ids[start:end])
        if text.endswith(INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, told = told, end
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
