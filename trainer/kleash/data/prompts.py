"""Prompts: ``{"prompt": text or messages}``, optionally with an ``id``; other fields are kept.

PPO, candidates and evaluation read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kleash.data import fields
from kleash.data.chat import Message, prompt_text, render_prompt
from kleash.data.jsonl import Loaded, Record, load_records


@dataclass(frozen=True, eq=False)
class PromptRecord:
    """One prompt, ready for a policy."""

    prompt_id: str
    """The ``id`` field, or the line number without one; unique in its source."""
    text: str
    """What is encoded: the text verbatim, or the messages as the chat template writes them."""
    messages: list[Message] | None
    """The conversation; None for a prompt given as text."""
    ids: np.ndarray
    """Token ids, int32."""
    fields: dict[str, Any]
    """The record's other fields."""


def load_prompts(
    source: str, tokenizer: Any, *, max_tokens: int, skip_bad: bool = False
) -> Loaded[PromptRecord]:
    """Read and encode the prompts of ``source``; one of more than ``max_tokens`` is bad.

    Raises DataError, and ModelError for messages without a chat template.
    """
    places: dict[str, str] = {}

    def parse(record: Record) -> PromptRecord:
        prompt = fields.prompt(record)
        prompt_id = fields.label(record, "id") or str(record.line)
        if prompt_id in places:
            raise record.error(
                f"{prompt_id!r} is the id of {places[prompt_id]} too; ids are unique, and a record "
                "without one has its line number.",
                "id",
            )
        with fields.at(record, "prompt"):
            ids = render_prompt(tokenizer, prompt)
            text = prompt_text(tokenizer, prompt)
        fields.check_length(record, len(ids), max_tokens, "the prompt", "prompt")
        places[prompt_id] = record.place
        others = {name: value for name, value in record.fields.items() if name not in _OWN_FIELDS}
        messages = None if isinstance(prompt, str) else prompt
        return PromptRecord(prompt_id, text, messages, ids, others)

    return load_records(source, parse, skip_bad=skip_bad)


_OWN_FIELDS = ("id", "prompt")
