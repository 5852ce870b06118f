"""One real call to every service that is deployed: what ``helm test`` runs.

Health of each, a conversation scored, log-probs of a few tokens, a few tokens generated, where the
trainer is. Clients alone: nothing is asked of the cluster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import grpc
import numpy as np
import pydantic
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kleash.base.config import Config
from kleash.base.errors import RemoteError
from kleash.client import policy, reference, reward, trainer
from kleash.client.types import Prompt, Sampling
from kleash.rpc.channel import connect
from kleash.rpc.errors import (
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    Unauthenticated,
    Unavailable,
    from_rpc_error,
)
from kleash.trainer.v1 import trainer_pb2

logger = logging.getLogger(__name__)

CONVERSATION = (
    {"role": "user", "content": "How do I boil an egg?"},
    {"role": "assistant", "content": "Eight minutes in boiling water, then cold water."},
)
NUM_PROMPT_TOKENS = 4
NUM_NEW_TOKENS = 4

CALL_S = 30.0
"""Most seconds of one call."""
TRY_AGAIN_S = 1.0
TELL_EVERY_S = 10.0
UPGRADE = "serve it with the version of kleash that this check has"
FINAL = (InvalidRequest, NotFound, PermissionDenied, Unauthenticated)
"""Errors that waiting does not mend."""


class CheckConfig(Config):
    """Call every service that is named, once it is up."""

    policy: str | None = None
    """Address of the policy service; null leaves it out, as with the others."""
    reward: str | None = None
    """Address of the reward service."""
    reference: str | None = None
    """Address of the reference service."""
    trainer: str | None = None
    """Address of the trainer."""
    timeout_s: float = pydantic.Field(default=120.0, gt=0)
    """Seconds to wait, in all, for services that are coming up."""

    @pydantic.model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if not (self.policy or self.reward or self.reference or self.trainer):
            raise ValueError("name a service: --policy, --reward, --reference or --trainer")
        return self


@dataclass(frozen=True)
class Outcome:
    """Of one check."""

    name: str
    is_ok: bool
    text: str
    """What was seen, or the sentence about what is wrong."""

    def __str__(self) -> str:
        return f"{'ok' if self.is_ok else 'failed'} {self.name}: {self.text}"


def check(config: CheckConfig, tell: Callable[[Outcome], None]) -> bool:
    """Do every check, ``tell`` how each ended, and return whether all are well.

    A service whose health is not well is not called. All share ``timeout_s``; after it each is
    still tried once.
    """
    deadline = time.monotonic() + config.timeout_s
    call_s = min(CALL_S, config.timeout_s)
    services = (
        ("reward", config.reward, reward.SERVICE, _check_reward),
        ("reference", config.reference, reference.SERVICE, _check_reference),
        ("policy", config.policy, policy.SERVICE, _check_policy),
        ("trainer", config.trainer, trainer.SERVICE, _check_trainer),
    )
    all_well = True
    for name, address, service, call in services:
        if address is None:
            continue
        steps = ((f"{name} health", partial(_check_health, name, service)), (name, call))
        for step, ask in steps:
            outcome = _outcome(step, ask, address, call_s, deadline)
            tell(outcome)
            all_well &= outcome.is_ok
            if not outcome.is_ok:
                break
    return all_well


class NotAsItShouldBe(RemoteError):  # noqa: N818  reads as the sentence that it is
    """A service answered, and the answer is wrong."""


def _outcome(
    name: str, ask: Callable[[str, float], str], address: str, call_s: float, deadline: float
) -> Outcome:
    """Ask until the answer is good or time is up."""
    told = time.monotonic()
    while True:
        try:
            return Outcome(name, True, ask(address, call_s))
        except RemoteError as error:
            left = deadline - time.monotonic()
            if left <= 0 or isinstance(error, FINAL):
                return Outcome(name, False, str(error))
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                logger.info("%s: %s (waiting for %.0f s more)", name, error, left)
            time.sleep(min(TRY_AGAIN_S, left))


def _check_health(name: str, service: str, address: str, call_s: float) -> str:
    """grpc.health.v1 of one service."""
    with connect(address, service=service, methods_to_retry=(), checks_health=False) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=call_s)
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error, address=address)
            if isinstance(error, NotFound):
                error = NotFound(
                    f"the server at {address} does not host {service}; correct --{name}."
                )
            raise error from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(
            f"{service} at {address} is {status}; the log of its pod says what it waits for.",
            reason=status,
        )
    return f"{service} at {address} is {status}"


def _check_reward(address: str, call_s: float) -> str:
    """A conversation is scored by the model that the service says it serves."""
    with reward.RewardClient(address, timeout_s=call_s) as client:
        told = client.get_model()
        model = told.model
        if not model.name or not model.revision:
            raise NotAsItShouldBe(
                f"the service at {address} names its model '{model.name}' of revision "
                f"'{model.revision}', and neither may be empty; {UPGRADE}."
            )
        if told.chat_template_sha256:
            (score,) = client.score_conversations([CONVERSATION])
            what = ""
        else:
            (score,) = client.score_texts([CONVERSATION[-1]["content"]])
            what = " of plain text, for the model has no chat template"
    if score.revision != model.revision:
        raise PreconditionFailed(
            f"GetModel names the revision {model.revision}, and the score is of "
            f"{score.revision}: a roll-out is under way.",
            reason="REVISION_CHANGED",
        )
    return f"score {score.score:.3f}{what} by {model.name} (revision {model.revision})"


def _check_reference(address: str, call_s: float) -> str:
    """Log-probs of a few tokens are log-probs."""
    with reference.ReferenceClient(address, timeout_s=call_s) as client:
        told = client.get_model()
        ids = _some_ids(told.vocab_size, NUM_PROMPT_TOKENS + NUM_NEW_TOKENS)
        (log_probs,) = client.log_probs(
            [_Sequence(ids, NUM_PROMPT_TOKENS)],
            temperature=1.0,
            tokenizer_sha256=told.tokenizer_sha256,
        )
    if not (log_probs <= 0).all():
        raise NotAsItShouldBe(
            f"the service at {address} gives a log-probability of {log_probs.max():g}, which is "
            f"not 0 or below; {UPGRADE}, or serve a model whose weights are finite."
        )
    return (
        f"{len(log_probs)} log-probs, mean {log_probs.mean():.3f}, by {told.model.name} "
        f"(revision {told.model.revision})"
    )


def _check_policy(address: str, call_s: float) -> str:
    """A few tokens are generated with the weights that are served."""
    with policy.PolicyClient(address, timeout_s=call_s) as client:
        told = client.get_policy()
        prompt = Prompt("check", _some_ids(told.vocab_size, NUM_PROMPT_TOKENS))
        sampling = Sampling(seed=0, max_new_tokens=NUM_NEW_TOKENS)
        (response,) = client.generate(
            [prompt],
            sampling,
            min_weights_version=told.weights_version,
            tokenizer_sha256=told.tokenizer_sha256,
        )
    if not ((response.ids >= 0) & (response.ids < told.vocab_size)).all():
        raise NotAsItShouldBe(
            f"the service at {address} generated id {int(response.ids.max())}, outside of its "
            f"{told.vocab_size} tokens; {UPGRADE}."
        )
    version = response.version_spans[-1].weights_version
    if not np.isfinite(response.log_probs).all():
        raise NotAsItShouldBe(
            f"the service at {address} generated with log-probabilities that are not finite, at "
            f"weights version {version}; publish weights that are."
        )
    return f"{len(response.ids)} tokens with weights version {version} of {told.model.name}"


def _check_trainer(address: str, call_s: float) -> str:
    """The run has not failed."""
    with trainer.TrainerClient(address, timeout_s=call_s) as client:
        run = client.get_run()
    state = trainer_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_")
    if run.state == trainer_pb2.RUN_STATE_FAILED:
        raise NotAsItShouldBe(
            f"the run {run.run_id} failed: {run.error_message.rstrip('.')}; correct that and start "
            "the trainer again, which goes on from its checkpoint."
        )
    return (
        f"run {run.run_id} is {state} at step {run.step} of {run.total_steps}, "
        f"weights version {run.weights_version}"
    )


@dataclass(frozen=True, eq=False)
class _Sequence:
    """What kleash.client.types.Tokens asks for."""

    ids: np.ndarray
    response_start: int


def _some_ids(vocab_size: int, count: int) -> np.ndarray:
    """From the middle of the vocabulary: special tokens are at its ends."""
    return ((vocab_size // 2 + np.arange(count)) % vocab_size).astype(np.int32)
