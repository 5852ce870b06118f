"""Who is served first, who is refused for lack of time, and what a caller may take."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_batcher import Model, hold, queued, run

from kleash.rpc import quota
from kleash.rpc.deadline import set_remaining_s
from kleash.rpc.errors import InvalidRequest, Overloaded
from kleash.rpc.pace import Pace
from kleash.rpc.quota import DEFAULT_QUOTAS, Account, QuotaConfig, Quotas
from kleash.rpc.waiting_line import Call, WaitingLine

pytestmark = pytest.mark.unit


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(quota.time, "monotonic", lambda: clock.now)
    return clock


def call_of(*sizes: int, priority_s: float = 0.0, came: float = 0.0) -> Call:
    future: Any = None
    return Call(list(sizes), list(sizes), False, future, None, priority_s, enqueued=came)


async def submit(batcher: Any, items: list[Any], account: Account | None, left_s: float = 0) -> Any:
    """Submit in a task of its own, as the caller with ``account``."""

    async def call() -> Any:
        quota._account.set(account)
        if left_s:
            set_remaining_s(left_s)
        return await batcher.submit(items)

    return await asyncio.create_task(call())


def test_priority_goes_first_and_others_fill_the_room_it_leaves() -> None:
    line = WaitingLine()
    low, high = call_of(10, 20, 50, 50, came=0), call_of(50, 50, priority_s=5, came=1)
    line.add(low)
    line.add(high)
    batch = line.next_batch(150)
    assert batch is not None
    # Three rows of 50: both of the first, and one of the other; its 20 would fit, too.
    assert [(call, index) for call, index in batch.members if call is high] == [
        (high, 0),
        (high, 1),
    ]
    assert batch.sizes == [50, 50, 50]
    assert line.tokens == 80
    assert list(line) == [low]


def test_a_row_of_others_never_makes_the_batch_longer() -> None:
    line = WaitingLine()
    line.add(call_of(100, came=0))
    line.add(call_of(30, priority_s=5, came=1))
    first, second = line.next_batch(1000), line.next_batch(1000)
    assert first is not None
    assert first.sizes == [30]
    assert second is not None
    assert second.sizes == [100]


def test_who_has_waited_longer_than_the_head_start_goes_before_newer_ones() -> None:
    line = WaitingLine()
    old, new = call_of(1, came=0), call_of(2, priority_s=60, came=61)
    for call in (new, old):
        line.add(call)
    assert list(line) == [old, new]
    assert line.tokens_before(call_of(1, priority_s=60, came=60.5)) == 1
    assert line.tokens_before(call_of(1, priority_s=60, came=59)) == 0


@given(
    calls=st.lists(
        st.tuples(
            st.lists(st.integers(1, 40), min_size=1, max_size=8), st.sampled_from([0, 5, 60])
        ),
        min_size=1,
        max_size=12,
    ),
    budget=st.integers(40, 300),
)
def test_a_line_loses_nothing_and_serves_the_first_call(
    calls: list[tuple[list[int], int]], budget: int
) -> None:
    line = WaitingLine()
    for number, (sizes, priority_s) in enumerate(calls):
        line.add(call_of(*sizes, priority_s=priority_s, came=number))
    served: list[tuple[Call, int]] = []
    while (first := next(iter(line), None)) is not None:
        batch = line.next_batch(budget)
        assert batch is not None
        assert first in batch.calls
        assert len(batch.sizes) * max(batch.sizes) <= budget
        assert batch.sizes == sorted(batch.sizes)
        longest = max(
            call.sizes[index]
            for call, index in batch.members
            if call.priority_s >= first.priority_s
        )
        assert max(batch.sizes) == longest
        served += batch.members
        assert line.tokens == sum(call.tokens_waiting for call in line)
    assert len(served) == len(set(served)) == sum(len(sizes) for sizes, _ in calls)
    assert line.tokens == 0


def test_a_trainer_finds_room_in_a_queue_that_others_have_filled() -> None:
    trainer = Account("trainer", DEFAULT_QUOTAS[0])
    other = Account("other", QuotaConfig(callers=("*",)))

    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        waiting = [asyncio.create_task(submit(batcher, [(n, 50)], other)) for n in (1, 2)]
        await queued(batcher, 100)
        with pytest.raises(Overloaded, match="100 of at most 100 tokens"):
            await submit(batcher, [(3, 1)], other)
        ahead = asyncio.create_task(submit(batcher, [(4, 25)], trainer))
        await queued(batcher, 125)
        with pytest.raises(Overloaded, match="125 of at most 125 tokens"):
            await submit(batcher, [(5, 1)], trainer)
        model.gate.set()
        await asyncio.gather(first, *waiting, ahead)

    batches = run(scenario, max_batch_tokens=50, max_queued_tokens=100).batches
    assert batches == [[-1], [4], [1], [2]]


def test_a_share_below_one_leaves_room_for_others() -> None:
    half = Account("half", QuotaConfig(callers=("*",), queue_share=0.5))

    async def scenario(model: Model, batcher: Any) -> None:
        with pytest.raises(InvalidRequest, match="60 tokens; at most 50 may wait"):
            await submit(batcher, [(1, 30), (2, 30)], half)
        await submit(batcher, [(1, 50)], half)

    run(scenario, max_batch_tokens=60, max_queued_tokens=100)


def test_a_call_that_would_be_late_is_refused_with_a_time_to_retry() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        batcher._pace.learn(100, 1.0)  # a hundred tokens a second, in batches of one second
        batcher._pace.arrived(10**6, 60, time.monotonic() - 100.0)  # a trainer, long ago
        waiting = asyncio.create_task(batcher.submit([(1, 300)]))
        await queued(batcher, 300)
        with pytest.raises(Overloaded, match=r"about 6\.0 s, as 401 tokens") as caught:
            await submit(batcher, [(2, 100)], None, left_s=5.0)
        assert caught.value.reason == "LATE"
        assert caught.value.retry_after_s == pytest.approx(2.0, abs=0.2)
        patient = asyncio.create_task(submit(batcher, [(3, 200)], None, left_s=10.0))
        await queued(batcher, 500)
        model.gate.set()
        await asyncio.gather(first, waiting, patient)

    run(scenario)


def test_a_call_that_nothing_is_before_is_tried_whatever_the_pace() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        batcher._pace.learn(1, 1.0)
        assert (await submit(batcher, [(2, 200)], None, left_s=5.0)).results == [4]

    run(scenario)


def test_tiny_calls_without_end_do_not_keep_a_large_one_out() -> None:
    """With one of them always before it, no batch would ever show what large ones take."""

    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        batcher._pace.learn(10, 1.0)  # ten tokens a second, one tiny call at a time
        tiny = asyncio.create_task(batcher.submit([(1, 10)]))
        await queued(batcher, 10)
        large = asyncio.create_task(
            submit(batcher, [(number, 500) for number in range(2, 12)], None, left_s=60.0)
        )
        await queued(batcher, 5010)
        model.gate.set()
        await asyncio.gather(first, tiny)
        assert (await large).results == [2 * number for number in range(2, 12)]

    run(scenario)


def test_the_pace_of_large_batches_is_that_of_large_calls() -> None:
    pace = Pace()
    assert pace.least_tokens(500, 1000) == 500
    pace.learn(10, 0.01)
    assert pace.least_tokens(5, 1000) == 5
    assert pace.least_tokens(500, 1000) == pytest.approx(10)
    assert pace.least_tokens(5000, 1000) == pytest.approx(50)
    pace = Pace()
    pace.learn(1000, 1.0)
    assert pace.least_tokens(5000, 1000) == 5000


def test_what_cannot_be_done_in_time_any_more_leaves_the_queue() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        late = asyncio.create_task(submit(batcher, [(1, 100)], None, left_s=5.0))
        stays = asyncio.create_task(submit(batcher, [(2, 100)], None, left_s=60.0))
        await queued(batcher, 200)
        batcher._pace.learn(1000, 100.0)  # ten seconds for a hundred tokens
        batcher._drop_late()
        with pytest.raises(Overloaded, match=r"another 10\.0 s, and its deadline is in [45]\.\d s"):
            await late
        assert batcher.queued_tokens == 100
        model.gate.set()
        assert (await stays).results == [4]
        await first

    assert run(scenario).batches == [[-1], [2]]


def test_the_pace_of_small_batches_says_little_about_large_work() -> None:
    pace = Pace()
    assert pace.seconds(10**6) == pace.least_s(10**6) == pace.batch_tokens == 0
    pace.learn(10, 0.01)
    assert pace.seconds(1000) == pytest.approx(1.0)
    assert pace.least_s(1000) == pytest.approx(0.01)
    assert pace.least_s(5) == pytest.approx(0.005)


def test_calls_that_go_first_are_counted_before_they_come() -> None:
    pace = Pace()
    pace.learn(100, 1.0)
    for tenth in range(200):  # fifty tokens a second of a trainer, ten of others
        pace.arrived(5, 60, tenth / 10)
        pace.arrived(1, 0, tenth / 10)
    assert pace.wait_s(100, 60) == pytest.approx(1.0)
    assert pace.wait_s(100, 0) == pytest.approx(2.0, rel=0.1)
    pace.look(40.0)  # nobody has come since
    assert pace.wait_s(100, 0) == pytest.approx(1.0, rel=0.01)
    for tenth in range(400, 600):  # more than the model can do
        pace.arrived(100, 60, tenth / 10)
    assert pace.wait_s(100, 0) == pytest.approx(4.0)


def test_a_first_call_is_no_rate_of_calls() -> None:
    pace = Pace()
    pace.learn(100, 1.0)
    pace.arrived(25, 60, 1000.0)
    assert pace.wait_s(100, 0) == pytest.approx(2.0)


def test_the_pace_counts_the_time_between_batches_while_calls_wait() -> None:
    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        rest = [asyncio.create_task(batcher.submit([(n, 50)])) for n in (1, 2)]
        await queued(batcher, 100)
        model.gate.set()
        await first
        assert batcher._ended is not None
        await asyncio.gather(*rest)
        assert batcher._ended is None
        batcher._ended = time.monotonic() - 100.0  # calls have waited since
        batcher._pace.tokens_per_s = 1000.0
        await batcher.submit([(3, 50)])
        # One part in five of the new average is half a token a second.
        assert batcher._pace.tokens_per_s == pytest.approx(800.1, abs=0.05)

    run(scenario, max_batch_tokens=50)


def test_refusing_needs_no_tokens_when_nothing_could_be_done_in_time() -> None:
    async def check(batcher: Any, left_s: float) -> None:
        set_remaining_s(left_s)
        batcher.check_turn()

    async def scenario(model: Model, batcher: Any) -> None:
        first = await hold(model, batcher)
        batcher._pace.learn(100, 1.0)
        await asyncio.create_task(check(batcher, 0.01))  # nothing waits: it may be tried
        waiting = asyncio.create_task(batcher.submit([(1, 300)]))
        await queued(batcher, 300)
        with pytest.raises(Overloaded, match=r"about 5\.0 s, as 301 tokens"):
            await asyncio.create_task(check(batcher, 5.0))
        await asyncio.create_task(check(batcher, 10.0))
        batcher.check_turn()  # without a deadline
        model.gate.set()
        await asyncio.gather(first, waiting)

    run(scenario)


def test_waits_are_stretched_by_what_overtakes_calls_of_their_priority() -> None:
    pace = Pace()
    pace.learn(100, 1.0)
    assert pace.wait_s(500, 0) == pytest.approx(5.0)
    for _ in range(200):
        pace.learn_wait(500, 0, 10.0)
        pace.learn_wait(500, 60, 2.5)
        pace.learn_wait(5, 0, 10.0)
    assert pace.wait_s(500, 0) == pytest.approx(10.0, rel=0.01)
    assert pace.wait_s(500, 60) == pytest.approx(5.0)
    for _ in range(200):
        pace.learn_wait(500, 0, 1000.0)
    assert pace.wait_s(500, 0) == pytest.approx(20.0)


def test_tokens_come_back_with_time_and_a_large_request_is_let_in_when_rested(clock: Clock) -> None:
    its = Account("a", QuotaConfig(callers=("a",), max_tokens_per_s=10, burst_tokens=50))
    its.take(45)
    with pytest.raises(Overloaded, match="'a' has 20 tokens, and 10 a second") as caught:
        its.take(20)
    assert caught.value.reason == "QUOTA"
    assert caught.value.retry_after_s == pytest.approx(1.5)
    clock.now += 1.5
    its.take(20)
    with pytest.raises(Overloaded, match="used up its tokens"):
        its.begin()
    clock.now += 5
    its.take(500)  # more than a burst, once it is full
    clock.now += 44
    with pytest.raises(Overloaded) as caught:
        its.begin()
    assert caught.value.retry_after_s == pytest.approx(1.1)
    clock.now += 1.2
    its.begin()
    assert not its.is_idle
    its.end()
    clock.now += 10
    assert its.is_idle


def test_the_first_entry_with_the_name_counts_and_running_calls_end() -> None:
    quotas = Quotas(
        [
            QuotaConfig(callers=("a*",), max_running_calls=1),
            QuotaConfig(callers=("*",), max_running_calls=2),
        ],
        trusts_claims=False,
    )
    claim = [("user-agent", "kleash-trainer/1 grpc-python/1.76")]
    for name, limit in (("ab", 1), ("b", 2), ("", 2)):
        for _ in range(limit):
            quotas.begin(name, claim)
        with pytest.raises(Overloaded, match="at a time"):
            quotas.begin(name, claim)
        quotas.end()
        quotas.begin(name, claim)


def test_claims_count_only_where_nobody_is_asked() -> None:
    claim = [("user-agent", "kleash-trainer/1 grpc-python/1.76")]
    for trusts_claims, expected in ((True, 60.0), (False, 0.0)):
        Quotas(DEFAULT_QUOTAS, trusts_claims=trusts_claims).begin("guest", claim)
        account = quota.account()
        assert account is not None
        assert account.priority_s == expected
        quota._account.set(None)


def test_accounts_of_names_that_were_made_up_are_forgotten() -> None:
    quotas = Quotas([], trusts_claims=True)
    for number in range(3 * quota.MAX_IDLE_ACCOUNTS):
        quotas.begin("", [("user-agent", f"name{number}")])
        quotas.end()
    assert len(quotas._accounts) <= quota.MAX_IDLE_ACCOUNTS


def test_a_burst_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="no effect"):
        QuotaConfig(callers=("*",), burst_tokens=5)
