"""The one thread that decodes. Requests join and weights change between two of its steps.

    callers                              decoding thread
    submit ──► inbox ─► waiting ─► decoder.add ─► decoder.step ─┬─► deliver: what finished
    cancel ──► inbox ─► waiting and slots without it            │   in this step, per request
    run    ──► inbox ─► function(): something that needs ◄──────┤
                        the model for itself                    │
    commit ──► inbox ─► commits: function() changes weights, ◄──┘
                        and rows drain, go on, or end around it

All responses of a request enter the queue at once and in order, so that a request that is alone
always meets the same batches and gives the same bits.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from kleash.base import metrics
from kleash.base.exemplar import exemplar_of
from kleash.lm.decode import Decoded, Decoder, DecodeRequest
from kleash.lm.generate import refill_count
from kleash.policy.budget import TokenBudget
from kleash.policy.commits import Commit, CommitQueue, Committed, InFlight
from kleash.policy.generation import Deliver, Generation
from kleash.policy.requests import weights_too_old
from kleash.rpc.errors import InternalError, Overloaded, Unavailable

logger = logging.getLogger(__name__)

X = TypeVar("X")

REMAKE_PAUSE_S = 0.5
"""Before the second attempt to make a decoder after a failure."""


class DecodeLoop:
    """Decodes what is submitted; every public method may be called from any thread."""

    def __init__(
        self, make_decoder: Callable[[], Decoder], *, max_queued_tokens: int, model_name: str
    ) -> None:
        """``make_decoder`` is called once now, and again after a step has failed."""
        self._make_decoder = make_decoder
        self._budget = TokenBudget(max_queued_tokens)
        self.decoder = make_decoder()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[DecodeRequest] = deque()
        self._generation_of: dict[DecodeRequest, Generation] = {}
        self._generations: set[Generation] = set()
        self._commits = CommitQueue()
        self._lock = threading.Lock()  # guards the next two, and what enters the inbox
        self._make_refusal: Callable[[], Exception] | None = None
        self._is_accepting = True
        self._is_stopping = False
        self._has_failed = False
        self._is_idle = True
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="kleash-policy-model", daemon=True)
        labels = ("policy", model_name)
        self._queue_requests = metrics.QUEUE_REQUESTS.labels(*labels)
        self._queue_tokens = metrics.QUEUE_TOKENS.labels(*labels)
        self._running_requests = metrics.RUNNING_REQUESTS.labels(*labels)
        self._queue_wait = metrics.QUEUE_WAIT_SECONDS.labels(*labels)
        self._step_seconds = metrics.COMPUTE_SECONDS.labels(*labels)
        metrics.QUEUE_LIMIT_TOKENS.labels(*labels).set(max_queued_tokens)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, *, wait: bool = True) -> None:
        """Refuse new requests, finish the running ones and end the thread; ``wait`` for its end."""
        with self._lock:
            self._is_accepting = False
        if self.is_alive:
            self._inbox.put(self._stop_when_idle)
            if wait:
                self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    @property
    def is_running(self) -> bool:
        """Whether the thread lives and takes requests."""
        return self._is_accepting and self.is_alive

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the thread last showed a sign of life; 0 when it has nothing to do."""
        return 0.0 if self._is_idle else time.monotonic() - self._last_progress

    def submit(self, requests: Sequence[DecodeRequest], deliver: Deliver) -> Generation:
        """Queue ``requests``, all of them or none.

        Raises Overloaded when the queue has no room for all, Unavailable when the loop stops, and
        what ``refuse`` was told.
        """
        total = sum(map(self._cost, requests))
        with self._lock:
            self._check_running()
            if self._make_refusal is not None:
                raise self._make_refusal()
            try:
                self._budget.take(total)
            except Overloaded:
                metrics.REQUESTS_REJECTED.labels("policy", "queue_full").inc()
                raise
            generation = Generation(requests, deliver)
            self._inbox.put(lambda: self._enqueue(generation))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Give up what is left of a request; its slots are free at the next step."""
        if generation.open:
            self._inbox.put(lambda: self._cancel(generation))

    def run(self, function: Callable[[], X]) -> Future[X]:
        """Run ``function`` in the decoding thread, between two steps."""
        future: Future[X] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except BaseException as error:
                future.set_exception(error)
            else:
                self._end_too_old(self.decoder.running)
                future.set_result(result)

        with self._lock:
            self._check_running()
            self._inbox.put(command)
        return future

    def commit(
        self, function: Callable[[], X], mode: InFlight, *, timeout_s: float | None = None
    ) -> Future[Committed[X]]:
        """Change the weights: ``function`` runs in the decoding thread, between two steps.

        It changes them in place and sets ``decoder.weights_version``. When it raises, so does the
        future, and the running responses go on as they were. Commits run one after the other.

        Args:
            mode: "keep": running responses go on with the keys and values they have;
                "drain": those that wait do not start, and ``function`` runs when none is running;
                "reprefill": keys and values of running responses are computed again afterwards;
                "abort_partial": running responses end as they are, with reason "aborted".
            timeout_s: most seconds until ``function`` starts. Then the future raises
                DeadlineExceeded and nothing was changed, as after the future's ``cancel``.
        """
        commit = Commit(function, mode, timeout_s)
        with self._lock:
            self._check_running()
            self._inbox.put(lambda: self._commits.put(commit))
        return commit.future

    def refuse(self, make_error: Callable[[], Exception] | None) -> None:
        """End every request with an error and refuse new ones with it; None takes them again.

        For weights that may not generate. Called in ``function`` of ``commit`` or ``run``, it acts
        before the next step.
        """
        with self._lock:
            self._make_refusal = make_error
            if make_error is not None:
                self._inbox.put(lambda: self._end_all(make_error()))

    def _check_running(self) -> None:
        if self._has_failed:
            raise _died()
        if not self._is_accepting:
            metrics.REQUESTS_REJECTED.labels("policy", "draining").inc()
            raise Unavailable("the policy service is stopping; try another.", reason="DRAINING")

    def _serve(self) -> None:
        try:
            while self._obey():
                self._guard(self._advance)
        except BaseException:
            logger.exception("the decoding thread has died; every request is refused from now on")
            self._refuse_all()

    def _guard(self, function: Callable[[], None]) -> None:
        """Run what changes rows: after an error their keys and values may be half written."""
        try:
            function()
        except Exception as error:
            logger.exception("decoding failed; every running request is given up")
            self._end_all(error)
            self.decoder = self._new_decoder()

    def _refuse_all(self) -> None:
        """Nobody may wait for a thread that has died, whatever is still in its inbox."""
        with self._lock:
            self._has_failed, self._is_accepting = True, False
        while not self._inbox.empty():
            self._inbox.get()()
        self._commits.refuse(_died())
        self._end_all(_died())

    def _obey(self) -> bool:
        """Run the commands in the inbox, waiting for one when idle. False means: end."""
        while True:
            self._guard(self._commit_due)
            idle = not self._waiting and not self.decoder.num_active
            if idle and self._is_stopping:
                return False
            self._is_idle = idle
            if idle:
                self._show_queue()
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                self._show_queue()
                return True
            self._last_progress = time.monotonic()
            self._is_idle = False
            command()

    def _commit_due(self) -> None:
        while commit := self._commits.pop_due(self.decoder.num_active):
            self._commit(commit)

    def _commit(self, commit: Commit[Any]) -> None:
        begin = time.monotonic_ns()
        try:
            result = commit.function()
        except BaseException as error:
            commit.future.set_exception(error)
            return
        try:
            self._end_too_old(self.decoder.running)
            if commit.mode == "abort_partial":
                self._hand_out(self.decoder.abort())
            if commit.mode in ("reprefill", "abort_partial"):
                # Rows that had drawn nothing were not aborted: the new weights start them.
                self.decoder.refill_cache()
        finally:  # whatever became of the rows, the weights are in place
            self._last_progress = time.monotonic()
            pause_ns = time.monotonic_ns() - begin
            metrics.WEIGHTS_UPDATE_PAUSE_SECONDS.observe(pause_ns / 1e9)
            commit.future.set_result(Committed(result, pause_ns))

    def _advance(self) -> None:
        begin = time.monotonic()
        self._admit()
        count = self.decoder.num_active
        if not count:
            return
        finished = self.decoder.step()
        now = self._last_progress = time.monotonic()
        metrics.BATCHER_HEARTBEAT_TIMESTAMP.labels("policy").set_to_current_time()
        metrics.BATCH_ITEMS.labels("policy").observe(count)
        self._step_seconds.observe(now - begin)
        self._budget.saw_step(count, now - begin)
        self._hand_out(finished)

    def _admit(self) -> None:
        """Give free slots to requests that wait, unless a commit waits for the slots to be free."""
        if self._commits.is_draining:
            return
        while take := refill_count(self.decoder, len(self._waiting)):
            if not self._end_too_old(islice(self._waiting, take)):
                self._add([self._waiting.popleft() for _ in range(take)])
                return

    def _end_too_old(self, requests: Iterable[DecodeRequest]) -> bool:
        """End those among ``requests`` that the weights are too old for; whether there were any."""
        version = self.decoder.weights_version
        too_old = [request for request in requests if request.min_version > version]
        for request in too_old:
            if generation := self._generation_of.get(request):
                self._end(generation, weights_too_old(request.min_version, version))
        return bool(too_old)

    def _hand_out(self, finished: list[Decoded]) -> None:
        by_generation: dict[Generation, list[Decoded]] = {}
        for decoded in finished:
            by_generation.setdefault(self._generation_of[decoded.request], []).append(decoded)
        for generation, responses in by_generation.items():
            self._deliver(generation, responses)

    def _add(self, requests: list[DecodeRequest]) -> None:
        now = time.monotonic()
        self._budget.give_back(sum(map(self._cost, requests)))
        for generation in {self._generation_of[request] for request in requests}:
            if not generation.is_running:
                generation.started = now
                self._queue_wait.observe(now - generation.submitted, exemplar_of(generation.span))
        self.decoder.add(requests)

    def _deliver(self, generation: Generation, responses: list[Decoded]) -> None:
        for decoded in responses:
            metrics.ITEM_TOKENS.labels("policy").observe(
                len(decoded.request.prompt) + len(decoded.ids)
            )
            if not np.isfinite(decoded.log_probs).all():
                metrics.ITEMS.labels("policy", "NON_FINITE").inc()
                self._end(
                    generation,
                    InternalError(
                        f"prompt '{decoded.request.prompt_id}' got log-probabilities that are not "
                        f"finite from weights version {decoded.versions[-1][2]}; "
                        "publish weights that are.",
                        reason="NON_FINITE",
                    ),
                )
                return
        metrics.ITEMS.labels("policy", "OK").inc(len(responses))
        metrics.POLICY_GENERATED_TOKENS.inc(sum(len(decoded.ids) for decoded in responses))
        for decoded in responses:
            generation.open.discard(decoded.request)
            del self._generation_of[decoded.request]
        if not generation.open:
            self._generations.discard(generation)
        generation.deliver(responses)

    def _enqueue(self, generation: Generation) -> None:
        self._generations.add(generation)
        self._waiting.extend(generation.requests)
        self._generation_of.update(dict.fromkeys(generation.requests, generation))

    def _cancel(self, generation: Generation) -> None:
        if generation in self._generations:
            stage = "computing" if generation.is_running else "queued"
            metrics.CANCELLED.labels("policy", stage).inc()
            self._forget(generation)

    def _end_all(self, error: Exception) -> None:
        for generation in list(self._generations):
            self._end(generation, error)

    def _end(self, generation: Generation, error: Exception) -> None:
        self._forget(generation)
        generation.deliver(error)

    def _forget(self, generation: Generation) -> None:
        """Take a request out of the queue and of the slots."""
        self._generations.discard(generation)
        dropped = [request for request in self._waiting if request in generation.open]
        if dropped:
            self._waiting = deque(its for its in self._waiting if its not in generation.open)
            self._budget.give_back(sum(map(self._cost, dropped)))
        for request in generation.open:
            self.decoder.remove(request)
            del self._generation_of[request]
        generation.open.clear()

    def _new_decoder(self) -> Decoder:
        """Made and warmed up; what just failed may fail once more, and then the thread dies."""
        try:
            decoder = self._make_decoder()
        except Exception:
            logger.exception("no new decoder could be made; trying once more")
            time.sleep(REMAKE_PAUSE_S)
            decoder = self._make_decoder()
        decoder.weights_version = self.decoder.weights_version
        return decoder

    def _stop_when_idle(self) -> None:
        self._is_stopping = True

    def _cost(self, request: DecodeRequest) -> int:
        """Tokens that a response may need."""
        return min(len(request.prompt) + request.max_new_tokens, self.decoder.max_length)

    def _show_queue(self) -> None:
        running = sum(generation.is_running for generation in self._generations)
        self._running_requests.set(running)
        self._queue_requests.set(len(self._generations) - running)
        self._queue_tokens.set(self._budget.num_tokens)


def _died() -> Unavailable:
    return Unavailable("the policy's decoding thread has died; try another.", reason="DEAD")


def finished_or_error(event: list[Decoded] | Exception) -> list[Decoded]:
    """The responses of an event; an error is raised."""
    if isinstance(event, Exception):
        raise event
    return event
