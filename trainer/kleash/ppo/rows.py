"""The responses of a batch as rows: which replica draws which, and how it is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kleash.client.types import Prompt
from kleash.data.prompts import PromptRecord


@dataclass(frozen=True, eq=False)
class Row:
    """One response to draw: the n-th of its prompt in the batch."""

    index: int
    record: PromptRecord
    sample_index: int


def shares_of(rows: Sequence[Row], num_replicas: int) -> list[list[Row]]:
    """Each replica's rows: prompts in turn, all samples of a prompt at one replica, none empty.

    Sample indices of a prompt then have no gaps at a replica, which is asked for a range of them.
    """
    prompt_ids = list(dict.fromkeys(row.record.prompt_id for row in rows))
    num_shares = min(num_replicas, len(prompt_ids))
    place = {prompt_id: index % num_shares for index, prompt_id in enumerate(prompt_ids)}
    shares: list[list[Row]] = [[] for _ in range(num_shares)]
    for row in rows:
        shares[place[row.record.prompt_id]].append(row)
    return shares


def number_rows(prompts: Sequence[PromptRecord]) -> list[Row]:
    """A prompt that occurs again in the batch gets the next sample index: another draw."""
    seen: Counter[str] = Counter()
    rows = []
    for index, record in enumerate(prompts):
        rows.append(Row(index, record, seen[record.prompt_id]))
        seen[record.prompt_id] += 1
    return rows


def requests_of(rows: Iterable[Row]) -> list[Prompt]:
    """One Prompt an id. Sample indices in between that nobody needs are drawn too and ignored."""
    wanted: dict[str, list[Row]] = {}
    for row in rows:
        wanted.setdefault(row.record.prompt_id, []).append(row)
    requests = []
    for prompt_id, same in wanted.items():
        indices = [row.sample_index for row in same]
        first, last = min(indices), max(indices)
        requests.append(Prompt(prompt_id, same[0].record.ids, last - first + 1, first))
    return requests
