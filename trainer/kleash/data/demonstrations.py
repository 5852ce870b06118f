"""Demonstrations: ``{"prompt", "completion"}`` in text or messages, or ``{"messages"}``.

``messages`` is a conversation that ends with the assistant; its last turn is the response.
"""

from __future__ import annotations

from typing import Any

from kleash.data import fields
from kleash.data.chat import Prompt, render_response
from kleash.data.jsonl import Loaded, Record, load_records
from kleash.lm.sequences import TokenSequence


def load_demonstrations(
    source: str, tokenizer: Any, *, max_tokens: int, skip_bad: bool = False
) -> Loaded[TokenSequence]:
    """Read and encode demonstrations; the response ends in the end-of-sequence token.

    One of more than ``max_tokens`` in all is bad: cutting a response would teach not to stop.
    Raises DataError, and ModelError for messages without a chat template.
    """

    def parse(record: Record) -> TokenSequence:
        prompt, response, field = _parts(record)
        with fields.at(record, field):
            sequence = render_response(tokenizer, prompt, response)
        what = f"the demonstration ({sequence.response_start} tokens of prompt)"
        fields.check_length(record, len(sequence.ids), max_tokens, what, field)
        return sequence

    return load_records(source, parse, skip_bad=skip_bad)


def _parts(record: Record) -> tuple[Prompt, str, str]:
    """Prompt, response, and the field that holds the response."""
    # Some published sets have a "prompt" beside the "messages" that repeat it.
    if "completion" not in record.fields and "messages" in record.fields:
        *prompt, last = fields.conversation(record, record.fields["messages"], "messages")
        if last["role"] != "assistant":
            raise record.error(
                f"ends with role '{last['role']}'; a demonstration ends with role 'assistant'.",
                "messages",
            )
        if not prompt:
            raise record.error("has nothing before the assistant's message.", "messages")
        return prompt, last["content"], "messages"
    prompt = fields.prompt(record)
    value = fields.required(record, "completion")
    response = fields.response(record, value, "completion")
    fields.check_one_form(record, prompt, value, "completion")
    return prompt, response, "completion"
