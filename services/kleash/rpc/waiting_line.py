"""The calls that wait for a model, in the order in which they are served, and the next batch.

Whoever has waited longest is first. A call's priority is a head start in seconds: it goes before
calls that came up to so much earlier, and none waits for ever. The next batch always holds an item
of the first call; calls of less priority only fill the room that those of its own leave.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kleash.base import tracing
from kleash.base.tracing import Span
from kleash.rpc.batching import choose_batch

# Items looked at for one batch; bounds the sorting when the queue is long.
WINDOW_ITEMS = 1024
WINDOW_BATCHES = 2
"""Tokens looked at for one batch, in batches: enough to find neighbours in length. Calls further
behind are not computed before those in front of them."""

_numbers = itertools.count()


@dataclass(eq=False)
class Call:
    """One submit."""

    items: Sequence[Any]
    sizes: list[int]
    isolate: bool
    future: asyncio.Future[list[Any]]
    deadline: float | None
    priority_s: float = 0.0
    enqueued: float = field(default_factory=time.monotonic)
    waiting: list[int] = field(default_factory=list)
    """Indices of the items that wait, by size and then by index."""
    num_missing: int = 0
    results: list[Any] = field(default_factory=list)
    tokens_before: float = 0.0
    """Tokens to be computed until it is done, as estimated when it came; 0 if nothing waited."""
    started: float | None = None
    compute_ns: int = 0
    span: Span | None = field(default_factory=tracing.current)
    """Of the caller's request, when it is traced."""

    def __post_init__(self) -> None:
        self.waiting = sorted(range(len(self.items)), key=lambda index: (self.sizes[index], index))
        self.tokens_waiting = sum(self.sizes)
        self.num_missing = len(self.items)
        self.results = [None] * len(self.items)
        self.order = (self.enqueued - self.priority_s, next(_numbers))
        """Of those that wait, the least is first."""


Member = tuple[Call, int]
"""An item: call, and index within the call."""


@dataclass(frozen=True)
class Batch:
    """Items that are computed together, shortest first."""

    members: list[Member]

    @property
    def calls(self) -> list[Call]:
        return list(dict.fromkeys(call for call, _ in self.members))

    @property
    def sizes(self) -> list[int]:
        return [_size(member) for member in self.members]


class WaitingLine:
    """Calls with items that wait."""

    def __init__(self) -> None:
        self.tokens = 0
        self._calls: list[Call] = []

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls)

    def add(self, call: Call) -> None:
        """Put a new call where it belongs."""
        insort(self._calls, call, key=_order)
        self.tokens += call.tokens_waiting

    def remove(self, call: Call) -> bool:
        """Take a call out with all that waits of it; False when nothing did."""
        if not call.waiting:
            return False
        self._leave(call)
        self.tokens -= call.tokens_waiting
        call.waiting, call.tokens_waiting = [], 0
        return True

    def tokens_before(self, call: Call) -> int:
        """Tokens of the calls that go before one that is not in the line yet."""
        tokens = self.tokens
        for other in reversed(self._calls):
            if other.order < call.order:
                break
            tokens -= other.tokens_waiting
        return tokens

    def next_batch(self, max_batch_tokens: int, wanted_tokens: int | None = None) -> Batch | None:
        """Take the next batch out, or None when nothing waits.

        It has at most ``wanted_tokens`` padded tokens, unless one item has more. The batches of an
        isolated call always are as large as ``max_batch_tokens`` lets them be, to be the same ones.
        """
        if not self._calls:
            return None
        first = self._calls[0]
        if first.isolate:
            members = [(first, index) for index in first.waiting]
            batch = _around(members, (first, first.waiting[-1]), max_batch_tokens)
        else:
            budget = wanted_tokens or max_batch_tokens
            window = WINDOW_BATCHES * budget
            peers = (call for call in self._calls if call.priority_s >= first.priority_s)
            rest = (call for call in self._calls if call.priority_s < first.priority_s)
            batch = _around(_by_size(peers, window), (first, first.waiting[-1]), budget)
            batch = _filled(batch, _by_size(rest, window), budget)
        self._take(batch)
        return Batch(batch)

    def _take(self, members: list[Member]) -> None:
        taken: dict[Call, set[int]] = {}
        for call, index in members:
            taken.setdefault(call, set()).add(index)
            call.tokens_waiting -= call.sizes[index]
            self.tokens -= call.sizes[index]
        for call, indices in taken.items():
            if len(indices) == len(call.waiting):
                self._leave(call)
            call.waiting = [index for index in call.waiting if index not in indices]

    def _leave(self, call: Call) -> None:
        place = bisect_left(self._calls, call.order, key=_order)
        assert self._calls[place] is call, "the line is out of order"
        del self._calls[place]


def _order(call: Call) -> tuple[float, int]:
    return call.order


def _size(member: Member) -> int:
    call, index = member
    return call.sizes[index]


def _around(members: list[Member], seed: Member, max_batch_tokens: int) -> list[Member]:
    """Those of ``members``, which are sorted, that are computed together with ``seed``."""
    sizes = [_size(member) for member in members]
    return members[choose_batch(sizes, members.index(seed), max_batch_tokens)]


def _by_size(calls: Iterator[Call], window_tokens: int) -> list[Member]:
    """Items of the first calls that share batches, by size."""
    members: list[Member] = []
    num_tokens = 0
    for call in calls:
        if not call.isolate:
            members += [(call, index) for index in call.waiting]
            num_tokens += call.tokens_waiting
        if len(members) >= WINDOW_ITEMS or num_tokens >= window_tokens:
            break
    return sorted(members, key=_size)


def _filled(members: list[Member], others: list[Member], max_batch_tokens: int) -> list[Member]:
    """``members`` and as many of ``others`` as fit beside them without making a row longer."""
    longest = _size(members[-1])
    fitting = [member for member in others if _size(member) <= longest]
    if not fitting:
        return members
    # All of the members stay in: as rows of the longest they cost nothing to add.
    sizes = [*map(_size, fitting), *[longest] * len(members)]
    chosen = choose_batch(sizes, len(sizes) - 1, max_batch_tokens)
    return sorted([*fitting[chosen.start :], *members], key=_size)
