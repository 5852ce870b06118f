"""The services of a trainer with a witness at each: what is asked and answered is written down.

    Collector ──► Recording... ──► client or in-process object
                      │ while a step is recorded
                      └──► CallLog

A call outside of a recorded step is passed on, and one that ends after it forgotten.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar

import numpy as np

from kleash.client.reward import Score
from kleash.client.types import GeneratedSequence, Prompt, Sampling, Tokens
from kleash.policy.v1 import policy_pb2
from kleash.ppo import recorded_calls as calls
from kleash.ppo.recorded_calls import Call
from kleash.ppo.services import Policy, Reference, Reward, Services
from kleash.reference.v1 import reference_pb2
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import ServiceError

R = TypeVar("R")


class CallLog:
    """The file that calls go to, while there is one. Its methods may be called from any thread.

    None of them raises for the file's sake: ``failure`` says what went wrong with it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._began = 0.0
        self.failure: OSError | None = None
        """Why calls are missing in the file; None when none are."""

    @property
    def is_open(self) -> bool:
        """Whether calls go to a file now."""
        return self._file is not None

    def open(self, path: Path) -> None:
        """From now on calls go to ``path``."""
        with self._lock:
            self.failure, self._began = None, time.monotonic()
            try:
                self._file = path.open("w", encoding="utf-8")
            except OSError as error:
                self.failure = error

    def close(self) -> None:
        """From now on calls go nowhere."""
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                try:
                    file.close()
                except OSError as error:  # of what waited to be written
                    self.failure = error

    def now_s(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._began

    def add(
        self,
        service: str,
        method: str,
        request: dict[str, Any],
        began_s: float,
        *,
        reply: Any = None,
        error: BaseException | None = None,
        replica: int | None = None,
    ) -> None:
        """A call has ended."""
        call = Call(
            service,
            method,
            request,
            reply,
            _describe(error),
            began_s=round(began_s, 6),
            ended_s=round(self.now_s(), 6),
            replica=replica,
        )
        with self._lock:
            if self._file is not None and self.failure is None:
                try:
                    self._file.write(call.to_line())
                except OSError as failure:
                    self.failure = failure

    def watch(
        self,
        service: str,
        method: str,
        ask: Callable[[], R],
        *,
        request: Callable[[], dict[str, Any]],
        to_json: Callable[[R], Any],
    ) -> R:
        """What ``ask`` returns or raises, written down; nothing is encoded while no step is."""
        if not self.is_open:
            return ask()
        began_s, asked = self.now_s(), request()
        try:
            reply = ask()
        except BaseException as error:
            self.add(service, method, asked, began_s, error=error)
            raise
        self.add(service, method, asked, began_s, reply=to_json(reply))
        return reply


def record_services(services: Services, log: CallLog) -> Services:
    """The same services; ``log`` hears of every call that a rollout makes."""
    return Services(
        policies=RecordingPolicies(services.policies, log),
        weights=services.weights,
        reward=RecordingReward(services.reward, log),
        reference=RecordingReference(services.reference, log),
    )


class RecordingPolicies(Mapping[int, Policy]):
    """The replicas that are there now."""

    def __init__(self, policies: Mapping[int, Policy], log: CallLog) -> None:
        self._policies = policies
        self._log = log

    def __getitem__(self, replica: int) -> Policy:
        policy = self._policies[replica]
        return RecordingPolicy(policy, replica, self._log) if self._log.is_open else policy

    def __iter__(self) -> Iterator[int]:
        return iter(self._policies)

    def __len__(self) -> int:
        return len(self._policies)


class RecordingPolicy:
    """One replica."""

    def __init__(self, policy: Policy, replica: int, log: CallLog) -> None:
        self._policy = policy
        self._replica = replica
        self._log = log

    def get_policy(self) -> policy_pb2.GetPolicyResponse:
        """Not part of a rollout."""
        return self._policy.get_policy()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        min_weights_version: int = 0,
        tokenizer_sha256: str = "",
    ) -> Generator[GeneratedSequence, None, None]:
        """A stream that its reader leaves early is written down as far as it was read."""
        log, began_s = self._log, self._log.now_s()
        request = calls.generate_request(
            prompts,
            sampling,
            min_weights_version=min_weights_version,
            tokenizer_sha256=tokenizer_sha256,
        )
        reply: list[dict[str, Any]] = []
        failure: BaseException | None = None
        stream = self._policy.generate(
            prompts,
            sampling,
            min_weights_version=min_weights_version,
            tokenizer_sha256=tokenizer_sha256,
        )
        try:
            for generated in stream:
                reply.append(calls.generated_to_json(generated, round(log.now_s(), 6)))
                yield generated
        except BaseException as error:
            failure = error
            raise
        finally:
            stream.close()
            log.add(
                "policy",
                "Generate",
                request,
                began_s,
                reply=reply,
                error=failure,
                replica=self._replica,
            )


class RecordingReward:
    """The reward service, or one revision of its model."""

    def __init__(self, reward: Reward, log: CallLog, revision: str = "") -> None:
        self._reward = reward
        self._log = log
        self._revision = revision

    def pinned(self, revision: str) -> Self:
        """One that asks for this revision."""
        return type(self)(self._reward.pinned(revision), self._log, revision)

    def get_model(self) -> reward_pb2.GetModelResponse:
        """What is served."""
        return self._log.watch(
            "reward",
            "GetModel",
            self._reward.get_model,
            request=lambda: {"revision": self._revision},
            to_json=calls.message_to_json,
        )

    def score_tokens(
        self,
        sequences: Sequence[Tokens],
        *,
        tokenizer_sha256: str,
        normalize: bool = True,
        isolate: bool = False,
    ) -> list[Score]:
        """Scores of a group."""
        options = {
            "tokenizer_sha256": tokenizer_sha256,
            "normalize": normalize,
            "isolate": isolate,
        }
        return self._log.watch(
            "reward",
            "Score",
            lambda: self._reward.score_tokens(sequences, **options),
            request=lambda: calls.score_request(sequences, revision=self._revision, **options),
            to_json=calls.scores_to_json,
        )


class RecordingReference:
    """The reference service."""

    def __init__(self, reference: Reference, log: CallLog) -> None:
        self._reference = reference
        self._log = log

    def get_model(self) -> reference_pb2.GetModelResponse:
        """What is served."""
        return self._log.watch(
            "reference",
            "GetModel",
            self._reference.get_model,
            request=dict,
            to_json=calls.message_to_json,
        )

    def log_probs(
        self,
        sequences: Sequence[Tokens],
        *,
        temperature: float,
        tokenizer_sha256: str,
        isolate: bool = False,
    ) -> list[np.ndarray]:
        """Log-probs of a group."""
        options = {
            "temperature": temperature,
            "tokenizer_sha256": tokenizer_sha256,
            "isolate": isolate,
        }
        return self._log.watch(
            "reference",
            "LogProbs",
            lambda: self._reference.log_probs(sequences, **options),
            request=lambda: calls.log_probs_request(sequences, **options),
            to_json=calls.log_probs_to_json,
        )


def _describe(error: BaseException | None) -> dict[str, str] | None:
    if error is None or isinstance(error, GeneratorExit):
        return None
    if isinstance(error, ServiceError):
        return {"code": error.code.name, "reason": error.reason, "message": error.message}
    return {"code": "UNKNOWN", "reason": type(error).__name__, "message": str(error)}
