"""A million inputs to the reward service's requests, in this process.

python -m tests.fuzz.reward [--count=1000000] [--seed=1] [--folder=MODEL_FOLDER]

Every input is bytes: a message as messages.py makes it, or one with spoiled bytes. They go through
the scan, the parser, the checks, the tokenizer and the answer, as calls do. One in ``REAL`` is also
computed; the others get scores from a stand-in, which may be NaN or infinite. A failure prints the
input's number, method and bytes, and ends with status 1. reward_atheris.py chooses its inputs.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tests.fuzz.messages import Source, build, numbers_of, spoiled
from tests.fuzz.verdict import check_error, check_response

from kleash.reward.classifier import ClassifierModel
from kleash.reward.model import RawScore, ScoreJob
from kleash.reward.requests import RewardRequests
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import InternalError, ServiceError
from kleash.rpc.guard import as_service_error
from kleash.rpc.requests import Limits
from kleash.rpc.wire import check_fields
from kleash.rpc.work import answer_in_process

REAL = 50
LIMITS = Limits(max_items=8, max_item_tokens=64, max_batch_tokens=512, max_queued_tokens=512)
METHODS: dict[str, Any] = {
    "Score": reward_pb2.ScoreRequest,
    "ScoreStream": reward_pb2.ScoreStreamRequest,
    "Compare": reward_pb2.CompareRequest,
    "CountTokens": reward_pb2.CountTokensRequest,
}
ODD_SCORES = (0.0, 1.0, -1e30, 3e38, float("nan"), float("inf"), float("-inf"))


class Target:
    """The requests of one model."""

    def __init__(self, model: ClassifierModel) -> None:
        self._model = model
        self._requests = RewardRequests(model, LIMITS)
        facts = model.facts
        self.hints = {
            "tokenizer_sha256": [facts.tokenizer_sha256],
            "role": ["user", "assistant", "system"],
            "response_start": [0, 1, 5],
            "truncation": [0, 1, 2, 3],
        }

    def feed(self, method: str, raw: bytes, source: Source, *, is_real: bool) -> str:
        """What comes of one input: the name of a status. Raises AssertionError for a fault."""
        try:
            check_fields(raw, METHODS[method].DESCRIPTOR)
            response = self._answer(
                method, METHODS[method].FromString(raw), source, is_real=is_real
            )
        except Exception as error:
            fault = as_service_error(error, f"RewardService/{method}")
            if isinstance(fault, InternalError) and not isinstance(error, ServiceError):
                raise AssertionError(f"{type(error).__name__} got out: {error}") from error
            check_error(fault)
            kind = "undecodable" if isinstance(error, DecodeError) else type(fault).__name__
            return f"{method} {kind}"
        check_response(response)
        response.SerializeToString()
        return f"{method} OK"

    def _answer(self, method: str, request: Any, source: Source, *, is_real: bool) -> Any:
        requests = self._requests
        if method == "CountTokens":
            return requests.count_tokens(request)

        def begin() -> Any:
            if method == "Score":
                return requests.score(request)
            if method == "Compare":
                return requests.compare(request)
            return requests.stream_item(request.item, request.options)

        def stand_in(jobs: list[ScoreJob]) -> list[RawScore]:
            return [_score(job, source) for job in jobs]

        compute = self._model.compute if is_real else stand_in
        return answer_in_process(begin, compute, max_batch_tokens=LIMITS.max_batch_tokens)


def _score(job: ScoreJob, source: Source) -> RawScore:
    assert 0 < job.num_tokens <= LIMITS.max_item_tokens
    values = None
    if job.wants_token_scores:
        values = np.zeros(job.num_tokens, dtype=np.float32)
        values[source(0, job.num_tokens - 1)] = odd_score(source)
    return RawScore(odd_score(source), values)


def odd_score(source: Source) -> float:
    """A stand-in's, one in nine not finite."""
    return ODD_SCORES[source(0, len(ODD_SCORES) - 1)] if source(0, 3) == 0 else source(-9, 9) / 4


def one_input(source: Source, hints: Any) -> tuple[str, bytes]:
    """A method, and bytes for it: one in three spoiled, some random from the start."""
    method = list(METHODS)[source(0, len(METHODS) - 1)]
    if source(0, 19) == 0:
        return method, bytes(source(0, 255) for _ in range(source(0, 60)))
    raw = build(METHODS[method], source, hints).SerializeToString()
    return method, raw if source(0, 2) else spoiled(raw, source)


def run(target: Target, count: int, seed: int) -> Counter[str]:
    """Feed ``count`` inputs; each is a function of ``seed`` and its number."""
    outcomes: Counter[str] = Counter()
    began = time.monotonic()
    for number in range(count):
        source = numbers_of(random.Random((seed << 40) + number))
        method, raw = one_input(source, target.hints)
        try:
            outcomes[target.feed(method, raw, source, is_real=number % REAL == 0)] += 1
        except BaseException:
            print(f"input {number} of seed {seed}: {method} {raw.hex()}", file=sys.stderr)
            raise
        if (number + 1) % 50_000 == 0:
            rate = (number + 1) / (time.monotonic() - began)
            print(f"{number + 1} inputs, {rate:.0f}/s", file=sys.stderr, flush=True)
    return outcomes


def tiny_target(folder: Path) -> Target:
    """A small random model, made in ``folder``."""
    from kleash.lm.heads import Normalization, reward_model_from_causal_lm
    from kleash.lm.load import load_tokenizer, save_checkpoint_folder
    from kleash.lm.tiny import write_tiny_folder

    base = write_tiny_folder(folder / "base", "llama", ["3 plus 4 is 7", "hello world"])
    model = reward_model_from_causal_lm(base, seed=1)
    Normalization(0.25, 2.0).store(model.config)
    save_checkpoint_folder(model, load_tokenizer(base), folder / "reward", {"stage": "x"})
    return target_of(folder / "reward")


def target_of(folder: Path) -> Target:
    """A model in a folder."""
    from kleash.lm.config import FrozenModelConfig

    return Target(ClassifierModel.load(FrozenModelConfig(model=folder), LIMITS))


def main(arguments: list[str]) -> None:
    """See the module's text."""
    import torch

    torch.set_num_threads(1)
    pairs = (each[2:].partition("=") for each in arguments if each.startswith("--"))
    flags = {key: value for key, _, value in pairs}
    with tempfile.TemporaryDirectory() as folder:
        given = flags.get("folder")
        target = target_of(Path(given)) if given else tiny_target(Path(folder))
        outcomes = run(target, int(flags.get("count", 1_000_000)), int(flags.get("seed", 1)))
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:9d}  {outcome}")
    print(f"{outcomes.total():9d}  inputs, no fault")


if __name__ == "__main__":
    main(sys.argv[1:])
