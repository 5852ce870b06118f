"""Comparisons: ``{"prompt", "chosen", "rejected"}`` and ``{"prompt", "responses", "ranks"}``.

Responses are text or one message of the assistant; ``chosen`` and ``rejected`` may also be whole
conversations that differ in their last message, with or without a ``prompt`` beside them. Optional:
``margin`` (of a pair), ``annotator``, ``dimension``. Rank 1 is the best; equal ranks are a tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from kleash.base.errors import DataError
from kleash.data import fields
from kleash.data.chat import Message, Prompt, render_response
from kleash.data.jsonl import Loaded, Record, load_records


@dataclass(frozen=True, eq=False)
class Ranking:
    """Responses to one prompt and the pairs in which one of them won: one batch element.

    Example: ranks [1, 2, 2] are the pairs (0, 1) and (0, 2); the tied pair (1, 2) is left out.
    """

    prompt_ids: np.ndarray
    """Token ids, int32."""
    responses: list[np.ndarray]
    """Token ids of each response, int32, the end-of-sequence token included."""
    pairs: list[tuple[int, int, float]]
    """(index of the winner, index of the loser, margin); never empty."""
    dimension: str
    """What was compared (``helpful``); empty without the field."""
    annotator: str
    """Who compared; empty without the field."""
    fields: dict[str, Any]
    """The record's other fields."""


def load_comparisons(
    source: str, tokenizer: Any, *, max_tokens: int, skip_bad: bool = False
) -> Loaded[Ranking]:
    """Read and encode comparisons; a response with its prompt of more than ``max_tokens`` is bad.

    Tied pairs, by rank or because both responses are the same, teach nothing: they are counted in
    ``num_tied_pairs``, and a record without another pair is left out.
    Raises DataError, and ModelError for messages without a chat template.
    """
    num_tied_pairs = 0

    def parse(record: Record) -> Ranking:
        nonlocal num_tied_pairs
        ranking, num_tied = _ranking(record, tokenizer, max_tokens)
        num_tied_pairs += num_tied
        return ranking

    loaded = load_records(source, parse, skip_bad=skip_bad)
    loaded[:] = [ranking for ranking in loaded if ranking.pairs]
    if not loaded:
        raise DataError(
            f"all {num_tied_pairs} pairs are ties; nothing can be learned.", path=source
        )
    loaded.num_tied_pairs = num_tied_pairs
    return loaded


def _ranking(record: Record, tokenizer: Any, max_tokens: int) -> tuple[Ranking, int]:
    if "responses" in record.fields:
        prompt, responses, ranks = _ranked(record)
        margin, names = 0.0, [f"responses[{index}]" for index in range(len(responses))]
    else:
        prompt, responses = _pair(record)
        ranks, margin, names = [1, 2], fields.margin(record), ["chosen", "rejected"]
    sequences = []
    for name, response in zip(names, responses, strict=True):
        with fields.at(record, name):
            sequence = render_response(tokenizer, prompt, response)
        what = f"the prompt ({sequence.response_start} tokens) with this response"
        fields.check_length(record, len(sequence.ids), max_tokens, what, name)
        sequences.append(sequence)
    pairs = []
    for first, second in combinations(range(len(ranks)), 2):
        if ranks[first] == ranks[second] or responses[first] == responses[second]:
            continue
        winner, loser = (first, second) if ranks[first] < ranks[second] else (second, first)
        pairs.append((winner, loser, margin))
    start = sequences[0].response_start
    ranking = Ranking(
        prompt_ids=sequences[0].ids[:start],
        responses=[sequence.ids[start:] for sequence in sequences],
        pairs=pairs,
        dimension=fields.label(record, "dimension"),
        annotator=fields.label(record, "annotator"),
        fields={name: value for name, value in record.fields.items() if name not in _OWN_FIELDS},
    )
    return ranking, len(ranks) * (len(ranks) - 1) // 2 - len(pairs)


def _ranked(record: Record) -> tuple[Prompt, list[str], list[int]]:
    prompt = fields.prompt(record)
    values, ranks = record.fields["responses"], fields.required(record, "ranks")
    for field, value in (("responses", values), ("ranks", ranks)):
        if not isinstance(value, list) or len(value) < 2:
            raise record.error("must be a list of two or more.", field)
    if len(ranks) != len(values):
        raise record.error(f"has {len(ranks)} ranks for {len(values)} responses.", "ranks")
    for index, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise record.error(
                f"is {rank!r}; a rank is a whole number, 1 for the best.", f"ranks[{index}]"
            )
    if "margin" in record.fields:
        raise record.error("belongs to a pair of chosen and rejected, not to ranks.", "margin")
    responses = []
    for index, value in enumerate(values):
        responses.append(fields.response(record, value, f"responses[{index}]"))
        fields.check_one_form(record, prompt, value, f"responses[{index}]")
    return prompt, responses, ranks


def _pair(record: Record) -> tuple[Prompt, list[str]]:
    values = {name: fields.required(record, name) for name in ("chosen", "rejected")}
    if all(isinstance(value, list) and len(value) > 1 for value in values.values()):
        return _conversations(record, values)
    prompt = fields.prompt(record)
    responses = []
    for name, value in values.items():
        responses.append(fields.response(record, value, name))
        fields.check_one_form(record, prompt, value, name)
    return prompt, responses


def _conversations(record: Record, values: dict[str, Any]) -> tuple[Prompt, list[str]]:
    """Two conversations that differ in what the assistant says last."""
    prompts: list[list[Message]] = []
    responses = []
    for name, value in values.items():
        *prompt, last = fields.conversation(record, value, name)
        if last["role"] != "assistant":
            raise record.error(
                f"ends with role '{last['role']}'; a response ends with role 'assistant'.", name
            )
        prompts.append(prompt)
        responses.append(last["content"])
    if prompts[0] != prompts[1]:
        raise record.error("has other messages before the last one than 'chosen'.", "rejected")
    if "prompt" in record.fields:
        prompt = fields.prompt(record)
        is_same = prompt == prompts[0] or any(m["content"] == prompt for m in prompts[0])
        if not is_same:
            raise record.error("is not what 'chosen' and 'rejected' begin with.", "prompt")
    return prompts[0], responses


_OWN_FIELDS = (
    *("prompt", "chosen", "rejected", "responses", "ranks"),
    *("margin", "dimension", "annotator"),
)
