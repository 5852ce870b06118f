"""One request to a frozen model, in three parts: begin (decode, check), compute, finish (encode).

           answer():  begin ──► batcher (queue) ──► finish    begin and finish in a thread, off the
                                                              server's event loop, unless the
                                                              request is tiny
answer_in_process():  begin ──► batches ──────────► finish    all in the calling thread
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from kleash.base import metrics, tracing
from kleash.common.v1 import common_pb2
from kleash.rpc import audit
from kleash.rpc.batcher import Batcher
from kleash.rpc.batching import choose_batch
from kleash.rpc.errors import ServiceError
from kleash.rpc.requests import TOKENIZER_MISMATCH, TOO_LARGE

TINY_BYTES = 2048
"""Requests of at most so many are begun and finished on the event loop: that takes some tenths of a
millisecond, and to hand them to a thread and back takes as long, of the loop alone."""

# Tokenizers and numpy release the interpreter lock; a second thread keeps a large text from
# holding up the requests behind it.
NUM_REQUEST_THREADS = 2

_REJECTIONS = {TOO_LARGE: "too_large", TOKENIZER_MISMATCH: "tokenizer"}
"""Reasons of errors as the metric of refused requests names them."""

J = TypeVar("J")
R = TypeVar("R")
A = TypeVar("A")


@dataclass(frozen=True)
class Work(Generic[J, R, A]):
    """A request whose rows are ready for the model."""

    jobs: list[J]
    lengths: list[int]
    """Tokens of each job."""
    isolate: bool
    """Compute in forward passes of their own."""
    finish: Callable[[list[R], common_pb2.Usage], A]
    """The response, from one result per job and what the call took."""


def request_threads(service: str) -> ThreadPoolExecutor:
    """Where the requests of a service are begun and finished, off its server's event loop."""
    return ThreadPoolExecutor(NUM_REQUEST_THREADS, f"kleash-{service}-requests")


async def answer(
    begin: Callable[[], Work[J, R, A]],
    batcher: Batcher[J, R],
    threads: Executor,
    *,
    service: str,
    model_name: str,
    num_bytes: int,
) -> A:
    """Run a request of ``num_bytes`` through the batcher; the names label the metrics."""
    batcher.check_turn()
    is_tiny = num_bytes <= TINY_BYTES
    loop = asyncio.get_running_loop()
    began = time.perf_counter_ns()
    try:
        with tracing.span("tokenize"):
            if is_tiny:
                work = begin()
            else:
                # With the call's context, which holds its deadline.
                work = await loop.run_in_executor(threads, contextvars.copy_context().run, begin)
    except ServiceError as error:
        count_rejection(service, error)
        raise
    tokenize_ns = time.perf_counter_ns() - began
    metrics.TOKENIZE_SECONDS.labels(service, model_name).observe(tokenize_ns / 1e9)
    usage = common_pb2.Usage(tokens=sum(work.lengths), tokenize_ns=tokenize_ns)
    audit.note(num_tokens=usage.tokens)
    timing = await batcher.submit(work.jobs, isolate=work.isolate)
    usage.queue_ns, usage.compute_ns = timing.queue_ns, timing.compute_ns
    with tracing.span("encode"):
        if is_tiny:
            return work.finish(timing.results, usage)
        return await loop.run_in_executor(threads, work.finish, timing.results, usage)


def count_rejection(service: str, error: ServiceError) -> None:
    """Count a request that was refused before it reached the queue."""
    if reason := _REJECTIONS.get(error.reason):
        metrics.REQUESTS_REJECTED.labels(service, reason).inc()


def answer_in_process(
    begin: Callable[[], Work[J, R, A]],
    compute: Callable[[list[J]], list[R]],
    *,
    max_batch_tokens: int,
) -> A:
    """Run a request here, in the batches of one isolated call of the server: the same bits."""
    began = time.perf_counter_ns()
    work = begin()
    ready = time.perf_counter_ns()
    results: dict[int, R] = {}
    for batch in isolated_batches(work.lengths, max_batch_tokens):
        answers = compute([work.jobs[index] for index in batch])
        results.update(zip(batch, answers, strict=True))
    usage = common_pb2.Usage(
        tokens=sum(work.lengths),
        tokenize_ns=ready - began,
        compute_ns=time.perf_counter_ns() - ready,
    )
    return work.finish([results[index] for index in range(len(work.jobs))], usage)


def isolated_batches(lengths: list[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices of each batch into which the batcher splits one isolated call."""
    waiting = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    batches = []
    while waiting:
        sizes = [lengths[index] for index in waiting]
        chosen = choose_batch(sizes, len(sizes) - 1, max_batch_tokens)
        batches.append(waiting[chosen])
        waiting = waiting[: chosen.start]
    return batches
