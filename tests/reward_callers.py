"""Applications beside the trainer that call a reward service: most well, some badly.

Each caller is a thread. Together they give every panel of the dashboards something to show: calls
of every method and of most statuses, items that fail, a queue that is full for moments.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import grpc
import numpy as np

from kleash.client import RewardClient
from kleash.common.v1 import common_pb2
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.codec import encode_ids
from kleash.rpc.errors import ServiceError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "says", "hello"]
TOO_LONG = " ".join(WORDS * 90)
"""More tokens than a tiny model has positions."""
BURST_CALLS, BURST_ITEMS = 48, 12
"""More tokens at a time than LIMITS lets wait."""
LIMITS = {"max_queued_tokens": 16_384, "max_batch_tokens": 4096}
"""Of a service that a burst fills."""


class RewardCallers:
    """Use it in a ``with`` block; ``seen`` counts the statuses that callers were given."""

    def __init__(self, address: str, *, seed: int = 0) -> None:
        self.address = address
        self.seen: Counter[str] = Counter()
        """By name of the gRPC status, OK among them."""
        self._random = random.Random(seed)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        channel_options = [("grpc.enable_retries", 0)]
        self._channel = grpc.insecure_channel(self.address, options=channel_options)
        self._stub: Any = reward_pb2_grpc.RewardServiceStub(self._channel)
        self._client = RewardClient(self.address, timeout_s=10, max_wait_s=0)
        callers: list[tuple[Callable[[], object], float]] = [
            (self._score, 0.03),
            (self._score, 0.05),
            (self._compare, 0.2),
            (self._ask, 1.0),
            (self._send_bad_items, 0.7),
            (self._send_too_many_items, 1.5),
            (self._ask_for_another_model, 2.0),
            (self._use_another_tokenizer, 2.5),
            (self._want_it_at_once, 4.0),
            (self._leave, 1.0),
            (self._burst, 4.0),
        ]
        self._threads = [
            threading.Thread(target=self._repeat, args=(call, pause_s), name=call.__name__)
            for call, pause_s in callers
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._client.close()
        self._channel.close()

    def _repeat(self, call: Callable[[], object], pause_s: float) -> None:
        while not self._ended.wait(pause_s * self._random.uniform(0.5, 1.5)):
            try:
                call()
                self._note("OK")
            except grpc.RpcError as error:
                self._note(error.code().name)  # pyright: ignore[reportAttributeAccessIssue]
            except grpc.FutureCancelledError:
                self._note("CANCELLED")
            except ServiceError as error:
                self._note(error.code.name)

    def _note(self, status: str) -> None:
        with self._lock:
            self.seen[status] += 1

    def _text(self, most_words: int = 40) -> str:
        return " ".join(self._random.choices(WORDS, k=self._random.randint(1, most_words)))

    def _request(self, count: int, words: int = 40) -> reward_pb2.ScoreRequest:
        items = [reward_pb2.ScoreItem(text=self._text(words)) for _ in range(count)]
        return reward_pb2.ScoreRequest(items=items)

    def _score(self) -> None:
        self._client.score_texts([self._text() for _ in range(self._random.randint(1, 6))])

    def _compare(self) -> None:
        self._client.compare("Which is bigger, 9 or 12?", [self._text() for _ in range(4)])

    def _ask(self) -> None:
        self._client.get_model()
        self._client.count_tokens([self._text()])

    def _send_bad_items(self) -> None:
        """One too long, one empty, one good."""
        items = [reward_pb2.ScoreItem(text=text) for text in (TOO_LONG, "", "hello")]
        self._stub.Score(reward_pb2.ScoreRequest(items=items), timeout=10)

    def _send_too_many_items(self) -> None:
        self._stub.Score(self._request(1100, words=1), timeout=10)

    def _ask_for_another_model(self) -> None:
        self._stub.GetModel(reward_pb2.GetModelRequest(model="no-such-model"), timeout=10)

    def _use_another_tokenizer(self) -> None:
        sequence = common_pb2.TokenSequence(
            tokens=encode_ids(np.array([5, 6, 7], dtype=np.int32)), tokenizer_sha256="0" * 64
        )
        item = reward_pb2.ScoreItem(tokens=sequence)
        self._stub.Score(reward_pb2.ScoreRequest(items=[item]), timeout=10)

    def _want_it_at_once(self) -> None:
        """With less time than it takes."""
        self._stub.Score(self._request(64), timeout=0.004)

    def _leave(self) -> None:
        """Hang up before the answer."""
        call = self._stub.Score.future(self._request(64), timeout=10)
        time.sleep(0.005)
        call.cancel()
        call.result()

    def _burst(self) -> None:
        """More than may wait: most are told to come back later."""
        calls = [
            self._stub.Score.future(self._request(BURST_ITEMS), timeout=10)
            for _ in range(BURST_CALLS)
        ]
        for call in calls:
            call.exception()
        statuses = [call.code().name for call in calls]
        with self._lock:
            self.seen.update(statuses)
