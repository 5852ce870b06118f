"""The queue in front of a model: what is computed together, what is refused, what is dropped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kleash.rpc.batcher import Batcher
from kleash.rpc.batching import PADDING_SHARE, PASS_OVERHEAD_TOKENS, choose_batch
from kleash.rpc.deadline import set_remaining_s
from kleash.rpc.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable

pytestmark = pytest.mark.unit

WAIT_S = 10.0


class Model:
    """Doubles numbers; an item is a tuple (number, tokens). A closed gate holds it in compute."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.poison: dict[int, Exception] = {}

    def compute(self, items: list[tuple[int, int]]) -> list[int]:
        self.batches.append([number for number, _ in items])
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        for number, _ in items:
            if number in self.poison:
                raise self.poison[number]
        return [2 * number for number, _ in items]


def batcher_of(
    model: Model, max_batch_tokens: int = 1000, max_queued_tokens: int = 10_000
) -> Batcher[tuple[int, int], int]:
    return Batcher(
        model.compute,
        size=lambda item: item[1],
        max_batch_tokens=max_batch_tokens,
        max_queued_tokens=max_queued_tokens,
        service="test",
    )


def run(scenario: Callable[[Model, Any], Awaitable[None]], **options: int) -> Model:
    """Run ``scenario(model, batcher)`` with a started batcher."""
    model = Model()

    async def main() -> None:
        batcher = batcher_of(model, **options)
        await batcher.start()
        try:
            async with asyncio.timeout(WAIT_S):
                await scenario(model, batcher)
        finally:
            model.gate.set()
            await batcher.stop()

    asyncio.run(main())
    return model


async def hold(model: Model, batcher: Any) -> asyncio.Task[Any]:
    """Occupy the model with item -1 until the gate opens."""
    model.gate.clear()
    model.entered.clear()
    task = asyncio.create_task(batcher.submit([(-1, 1)]))
    await asyncio.to_thread(model.entered.wait, WAIT_S)
    return task


async def queued(batcher: Any, tokens: int) -> None:
    """Wait until ``tokens`` tokens wait."""
    while batcher.queued_tokens != tokens:  # noqa: ASYNC110 - the batcher has no such event
        await asyncio.sleep(0.001)


def test_results_are_in_order_and_computed_on_one_thread() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        timing = await batcher.submit([(1, 30), (2, 10), (3, 20)])
        assert timing.results == [2, 4, 6]
        assert timing.compute_ns > 0
        assert timing.queue_ns >= 0
        assert (await batcher.submit([])).results == []

    model = run(scenario)
    assert model.batches == [[2, 3, 1]]  # shortest first
    assert model.threads == {"kleash-test-model"}


def test_what_waits_is_computed_together_and_nothing_waits_for_company() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        calls = [asyncio.create_task(batcher.submit([(n, 10)])) for n in range(5)]
        await queued(batcher, 50)
        model.gate.set()
        assert [(await call).results for call in calls] == [[0], [2], [4], [6], [8]]
        await first

    assert run(scenario).batches == [[-1], [0, 1, 2, 3, 4]]


def test_the_budget_is_in_padded_tokens() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        timing = await batcher.submit([(n, 10 * n) for n in range(1, 6)])
        assert timing.results == [2, 4, 6, 8, 10]

    # 50 + 40: two rows of 50 fit 100, a third does not; then 30, 20, 10 as three rows of 30.
    assert run(scenario, max_batch_tokens=100).batches == [[4, 5], [1, 2, 3]]


def test_long_and_short_items_do_not_share_a_pass() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        await batcher.submit([(n, 900 if n == 7 else 20) for n in range(20)])

    batches = run(scenario, max_batch_tokens=100_000, max_queued_tokens=100_000).batches
    assert batches == [[7], [n for n in range(20) if n != 7]]


def test_the_oldest_call_is_always_in_the_next_batch() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        old = asyncio.create_task(batcher.submit([(0, 900)]))
        await queued(batcher, 900)
        young = [asyncio.create_task(batcher.submit([(n, 5)])) for n in range(1, 50)]
        await queued(batcher, 900 + 49 * 5)
        model.gate.set()
        await asyncio.gather(first, old, *young)

    assert run(scenario).batches[1] == [0]


def test_a_full_queue_refuses_at_once_with_a_hint() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        waiting = asyncio.create_task(batcher.submit([(1, 60), (2, 30)]))
        await queued(batcher, 90)
        began = time.monotonic()
        with pytest.raises(Overloaded) as caught:
            await batcher.submit([(3, 11)])
        assert time.monotonic() - began < 1
        assert "90 of at most 100 tokens" in str(caught.value)
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s > 0
        small = asyncio.create_task(batcher.submit([(4, 10)]))
        await queued(batcher, 100)
        model.gate.set()
        assert (await waiting).results == [2, 4]
        assert (await small).results == [8]
        await first
        assert batcher.queued_tokens == 0

    run(scenario, max_batch_tokens=60, max_queued_tokens=100)


def test_what_never_fits_is_the_callers_mistake() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        with pytest.raises(InvalidRequest, match="item 1 has 61 tokens; at most 60") as caught:
            await batcher.submit([(1, 5), (2, 61)])
        assert caught.value.field == "items[1]"
        with pytest.raises(InvalidRequest, match="120 tokens; at most 100 may wait"):
            await batcher.submit([(1, 60), (2, 60)])

    assert run(scenario, max_batch_tokens=60, max_queued_tokens=100).batches == []


def test_a_cancelled_call_leaves_the_queue_before_compute() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        gone = asyncio.create_task(batcher.submit([(1, 10), (2, 10)]))
        stays = asyncio.create_task(batcher.submit([(3, 10)]))
        await queued(batcher, 30)
        gone.cancel()
        await queued(batcher, 10)
        model.gate.set()
        assert (await stays).results == [6]
        await first

    assert run(scenario).batches == [[-1], [3]]


def test_a_call_cancelled_in_compute_is_discarded() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        gone = await hold(model, batcher)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        model.gate.set()
        assert (await batcher.submit([(1, 1)])).results == [2]

    run(scenario)


def test_an_expired_call_leaves_the_queue_before_compute() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)

        async def hurried() -> Any:
            set_remaining_s(0.02)
            return await batcher.submit([(1, 10)])

        late = asyncio.create_task(hurried())
        await queued(batcher, 10)
        await asyncio.sleep(0.03)
        model.gate.set()
        with pytest.raises(DeadlineExceeded):
            await late
        await first
        assert batcher.queued_tokens == 0

    assert run(scenario).batches == [[-1]]


def test_a_failing_batch_fails_its_own_callers_alone() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        model.poison[13] = RuntimeError("thirteen")
        first = await hold(model, batcher)
        # 13 shares a batch with 12 by length; 1 and 2 are in another.
        calls = [
            asyncio.create_task(batcher.submit([(number, tokens)]))
            for number, tokens in ((1, 10), (12, 900), (2, 10), (13, 900))
        ]
        await queued(batcher, 1820)
        model.gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(answer) for answer in (answers[1], answers[3])] == ["thirteen"] * 2
        assert answers[0].results == [2]  # type: ignore[union-attr]
        assert answers[2].results == [4]  # type: ignore[union-attr]
        assert (await batcher.submit([(5, 5)])).results == [10]
        await first

    run(scenario, max_batch_tokens=1800)


def test_a_failed_call_leaves_nothing_in_the_queue() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        model.poison[1] = ValueError("one")
        with pytest.raises(ValueError, match="one"):
            await batcher.submit([(0, 50), (2, 50), (1, 60)])
        assert batcher.queued_tokens == 0

    assert run(scenario, max_batch_tokens=60).batches == [[1]]


def test_out_of_memory_is_tried_once_as_two_halves() -> None:
    class Small(Model):
        def compute(self, items: list[tuple[int, int]]) -> list[int]:
            answers = super().compute(items)
            if len(items) > 2:
                raise MemoryError
            return answers

    async def main() -> Small:
        model = Small()
        batcher = batcher_of(model)
        await batcher.start()
        assert (await batcher.submit([(n, 5) for n in range(4)])).results == [0, 2, 4, 6]
        with pytest.raises(Overloaded, match="does not fit into memory") as caught:
            await batcher.submit([(n, 5) for n in range(6)])
        assert caught.value.retry_after_s is None
        await batcher.stop()
        return model

    assert asyncio.run(main()).batches[:3] == [[0, 1, 2, 3], [0, 1], [2, 3]]


def test_an_isolated_call_is_split_alike_with_and_without_traffic() -> None:
    items = [(n, 10 + 7 * (n % 5)) for n in range(12)]

    async def alone(model: Model, batcher: Any) -> None:
        await batcher.submit(items, isolate=True)

    async def in_traffic(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        others = [asyncio.create_task(batcher.submit([(100 + n, 10 + n)])) for n in range(20)]
        await asyncio.sleep(0)
        isolated = asyncio.create_task(batcher.submit(items, isolate=True))
        await asyncio.sleep(0)
        others += [asyncio.create_task(batcher.submit([(200 + n, 10 + n)])) for n in range(20)]
        await asyncio.sleep(0)
        model.gate.set()
        assert (await isolated).results == [2 * n for n in range(12)]
        await asyncio.gather(first, *others)

    expected = run(alone, max_batch_tokens=150).batches
    assert len(expected) > 1
    batches = run(in_traffic, max_batch_tokens=150).batches
    assert [batch for batch in batches if set(batch) & set(range(12))] == expected
    assert sum(map(len, batches)) == 53


def test_run_goes_between_two_batches_on_the_model_thread() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        waiting = asyncio.create_task(batcher.submit([(1, 1)]))
        await queued(batcher, 1)
        seen = asyncio.create_task(
            batcher.run(lambda: (threading.current_thread().name, list(model.batches)))
        )
        await asyncio.sleep(0.01)
        assert not seen.done()
        model.gate.set()
        assert await seen == ("kleash-test-model", [[-1]])
        await asyncio.gather(first, waiting)

    run(scenario)


def test_an_error_of_run_reaches_its_caller() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        with pytest.raises(ZeroDivisionError):
            await batcher.run(lambda: 1 // 0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await batcher.run(lambda: next(iter(())))
        with pytest.raises(RuntimeError, match="SystemExit"):
            await batcher.run(exit_process)
        assert (await batcher.submit([(1, 1)])).results == [2]

    def exit_process() -> None:
        raise SystemExit(1)

    run(scenario)


def test_the_heartbeat_ages_only_while_the_model_is_busy() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        assert batcher.heartbeat_age_s() == 0.0
        first = await hold(model, batcher)
        await asyncio.sleep(0.05)
        assert 0.04 < batcher.heartbeat_age_s() < 5
        model.gate.set()
        await first
        assert batcher.heartbeat_age_s() == 0.0

    run(scenario)


def test_stop_finishes_what_is_queued_and_refuses_the_rest() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        waiting = asyncio.create_task(batcher.submit([(1, 1)]))
        await queued(batcher, 1)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="stopping"):
            await batcher.submit([(2, 1)])
        model.gate.set()
        await stopping
        assert (await waiting).results == [2]
        await first

    assert run(scenario).batches == [[-1], [1]]


sizes = st.lists(st.integers(1, 3000), min_size=1, max_size=60).map(sorted)


@given(sizes=sizes, data=st.data(), budget=st.integers(3000, 40_000))
def test_a_chosen_batch_keeps_every_promise(
    sizes: list[int], data: st.DataObject, budget: int
) -> None:
    seed = data.draw(st.integers(0, len(sizes) - 1))
    chosen = choose_batch(sizes, seed, budget)
    batch = sizes[chosen]
    assert chosen.start <= seed < chosen.stop
    padded = len(batch) * max(batch)
    assert padded <= budget
    assert padded - sum(batch) <= PASS_OVERHEAD_TOKENS + PADDING_SHARE * sum(batch)
    if chosen.stop < len(sizes):  # the largest batch at hand: a next longer item would break one
        longer = [*batch, sizes[chosen.stop]]
        padded = len(longer) * max(longer)
        padding = padded - sum(longer)
        assert padded > budget or padding > PASS_OVERHEAD_TOKENS + PADDING_SHARE * sum(longer)
