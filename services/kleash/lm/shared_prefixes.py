"""Which rows of a batch begin alike, and whether computing their beginnings once pays.

Token ids alone decide, so that the same batch is always computed the same way. How it is computed
is in prefix_reuse.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Shorter beginnings (a chat template's first tokens) save less than they cost.
MIN_PREFIX_TOKENS = 16
# A forward pass costs about as much as this many tokens before it computes any.
PASS_OVERHEAD_TOKENS = 128
# Reuse must leave less than this share of the tokens: attention to a prefix takes a mask
# and a copy of its keys and values, which count for nothing here.
WORTHWHILE_SHARE = 0.8
MAX_ROUNDS = 3


@dataclass(frozen=True)
class SharedPrefix:
    """Rows that begin with the same ``length`` tokens; each has at least one more."""

    length: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class ReusePlan:
    """How a batch is computed: prefixes once each, the rests of their rows, the other rows."""

    prefixes: tuple[SharedPrefix, ...]
    others: tuple[int, ...]
    """Rows that share nothing worth while."""


def plan_reuse(rows: Sequence[np.ndarray]) -> ReusePlan | None:
    """The plan for rows of int32 ids; None where computing every row whole is cheaper."""
    if len({row[:MIN_PREFIX_TOKENS].tobytes() for row in rows}) == len(rows):
        return None
    prefixes = shared_prefixes(rows)
    if not prefixes:
        return None
    grouped = {row for prefix in prefixes for row in prefix.rows}
    others = tuple(row for row in range(len(rows)) if row not in grouped)
    saved = sum((len(prefix.rows) - 1) * prefix.length for prefix in prefixes)
    padding = sum(max(each.length for each in prefixes) - prefix.length for prefix in prefixes)
    whole = sum(map(len, rows))
    cost = whole - saved + padding + PASS_OVERHEAD_TOKENS
    return ReusePlan(prefixes, others) if cost < WORTHWHILE_SHARE * whole else None


def shared_prefixes(rows: Sequence[np.ndarray]) -> tuple[SharedPrefix, ...]:
    """Groups of rows that save tokens when each computes its beginning once.

    Rows in no group are tried again among themselves: a group may have stood between them.
    """
    found: list[SharedPrefix] = []
    left = list(range(len(rows)))
    for _ in range(MAX_ROUNDS):
        prefixes = _groups_of_neighbours(rows, left)
        found += prefixes
        taken = {row for prefix in prefixes for row in prefix.rows}
        left = [row for row in left if row not in taken]
    return tuple(found)


def _groups_of_neighbours(rows: Sequence[np.ndarray], among: list[int]) -> list[SharedPrefix]:
    """Rows that begin alike are neighbours once sorted, and a group's prefix is the least that two
    neighbours share. Groups are joined from the longest shared beginning to the shortest, and a
    joined one stays if it saves more than its two parts.
    """
    order = sorted(among, key=lambda i: (rows[i].astype(">i4").tobytes(), i))
    shared = [_num_shared(rows[one], rows[two]) for one, two in itertools.pairwise(order)]
    runs = {place: _Run(place, place, len(rows[row])) for place, row in enumerate(order)}
    ends = dict(runs)  # by their last place
    for gap in sorted(range(len(shared)), key=lambda gap: (-shared[gap], gap)):
        if shared[gap] < MIN_PREFIX_TOKENS:
            break
        joined = ends.pop(gap).joined(runs.pop(gap + 1), shared[gap])
        runs[joined.first] = ends[joined.last] = joined
    found = [group for run in runs.values() for group in run.groups]
    return [
        SharedPrefix(length, tuple(sorted(order[first : last + 1])))
        for first, last, length in sorted(found)
    ]


@dataclass(frozen=True)
class _Run:
    """Neighbours among the sorted rows, and the groups in which they are best computed."""

    first: int
    last: int
    shortest: int
    saved: int = 0
    groups: tuple[tuple[int, int, int], ...] = ()
    """First place, last place, length of the prefix."""

    def joined(self, right: _Run, num_shared: int) -> _Run:
        shortest = min(self.shortest, right.shortest)
        length = min(num_shared, shortest - 1)  # a row's last token is never part of its prefix
        saved = (right.last - self.first) * length
        groups = ((self.first, right.last, length),)
        if length < MIN_PREFIX_TOKENS or saved < self.saved + right.saved:
            saved, groups = self.saved + right.saved, self.groups + right.groups
        return _Run(self.first, right.last, shortest, saved, groups)


def _num_shared(one: np.ndarray, two: np.ndarray) -> int:
    """Number of tokens that two rows begin with alike."""
    length = min(len(one), len(two))
    differs = one[:length] != two[:length]
    return int(differs.argmax()) if differs.any() else length
