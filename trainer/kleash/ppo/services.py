"""The services that a trainer works with: clients or in-process objects with the same methods.

``connect`` opens the clients and waits; ``shake_hands`` proves that the services fit the run before
anything is computed: same tokenizer, the right reference, room for the longest sequence.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from kleash.base.errors import ConfigError
from kleash.client.policy import PolicyClient
from kleash.client.reference import ReferenceClient
from kleash.client.reward import RewardClient, Score
from kleash.client.types import GeneratedSequence, Prompt, Sampling, Tokens
from kleash.client.weights import WeightsClient
from kleash.policy.v1 import policy_pb2
from kleash.ppo.config import PPOConfig, ServicesConfig
from kleash.ppo.patience import Patience
from kleash.reference.v1 import reference_pb2
from kleash.reward.v1 import reward_pb2
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import NotFound, ServiceError, Unavailable
from kleash.weights.coordinator import Replicas

logger = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T")


class Policy(Protocol):
    """PolicyClient or LocalPolicy."""

    def get_policy(self) -> policy_pb2.GetPolicyResponse: ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        min_weights_version: int = 0,
        tokenizer_sha256: str = "",
    ) -> Generator[GeneratedSequence, None, None]: ...


class Reward(Protocol):
    """RewardClient or LocalReward."""

    def pinned(self, revision: str) -> Self: ...

    def get_model(self) -> reward_pb2.GetModelResponse: ...

    def score_tokens(
        self,
        sequences: Sequence[Tokens],
        *,
        tokenizer_sha256: str,
        normalize: bool = True,
        isolate: bool = False,
    ) -> list[Score]: ...


class Reference(Protocol):
    """ReferenceClient or LocalReference."""

    def get_model(self) -> reference_pb2.GetModelResponse: ...

    def log_probs(
        self,
        sequences: Sequence[Tokens],
        *,
        temperature: float,
        tokenizer_sha256: str,
        isolate: bool = False,
    ) -> list[np.ndarray]: ...


@dataclass(frozen=True, eq=False)
class Services:
    """Everything outside of the trainer. ``policies[i]`` and ``weights[i]`` are one replica.

    Where replicas come and go the two mappings change meanwhile, and a number is never used again:
    work with a snapshot, ``dict(policies)``, and expect that a replica leaves.
    """

    policies: Mapping[int, Policy]
    weights: Replicas
    reward: Reward
    reference: Reference


@contextlib.contextmanager
def connect(
    config: ServicesConfig, is_abandoned: Callable[[], bool] = lambda: False
) -> Iterator[Services]:
    """Open the clients of fixed addresses, wait until all answer, and close them at the end.

    Raises Unavailable that names the service, its address and how to start it.
    """
    with contextlib.ExitStack() as stack:
        policies, weights = {}, {}
        for index, address in enumerate(config.policy):
            policies[index] = stack.enter_context(open_policy(address, config))
            weights[index] = stack.enter_context(contextlib.closing(open_weights(address)))
        reward, reference = stack.enter_context(open_scorers(config))
        for index, address in enumerate(config.policy):
            wait_for("policy", address, policies[index].get_policy, config.wait_s, is_abandoned)
        wait_for_scorers(reward, reference, config, is_abandoned)
        yield Services(policies, weights, reward, reference)


def open_policy(address: str, config: ServicesConfig) -> PolicyClient:
    """A client of one replica, which answers GetPolicy before it has the weights of the run."""
    return PolicyClient(
        address,
        timeout_s=config.generate_timeout_s,
        checks_health=False,
        credentials=trainer_credentials(),
    )


def open_weights(address: str) -> WeightsClient:
    """A client of the weights of one replica."""
    return WeightsClient(address, credentials=trainer_credentials())


def trainer_credentials() -> Credentials:
    """Those of the environment, with the name by which a trainer goes first."""
    return Credentials.from_env(caller="trainer")


@contextlib.contextmanager
def open_scorers(config: ServicesConfig) -> Iterator[tuple[RewardClient, ReferenceClient]]:
    """Clients of the reward and the reference service."""
    credentials = trainer_credentials()
    with (
        RewardClient(
            config.reward, timeout_s=config.score_timeout_s, credentials=credentials
        ) as reward,
        ReferenceClient(
            config.reference, timeout_s=config.score_timeout_s, credentials=credentials
        ) as reference,
    ):
        yield reward, reference


def wait_for_scorers(
    reward: RewardClient,
    reference: ReferenceClient,
    config: ServicesConfig,
    is_abandoned: Callable[[], bool],
) -> None:
    """Until both answer."""
    wait_for("reward", config.reward, reward.get_model, config.wait_s, is_abandoned)
    wait_for("reference", config.reference, reference.get_model, config.wait_s, is_abandoned)


def wait_for(
    name: str,
    address: str,
    ask: Callable[[], T],
    wait_s: float,
    is_abandoned: Callable[[], bool] = lambda: False,
) -> T:
    """Ask until the service answers."""
    # A service that is still loading is no reason for a warning.
    patience = Patience(wait_s, is_abandoned, log_level=logging.DEBUG)
    logger.info("waiting for the %s service at %s", name, address)
    while True:
        try:
            return ask()
        except ServiceError as error:
            if not isinstance(error, Unavailable):
                raise
            try:
                patience.wait_after(error)
            except Unavailable:
                if is_abandoned():
                    raise
                port = address.rpartition(":")[2]
                raise Unavailable(
                    f"the {name} service at {address} did not answer within {wait_s:g} s "
                    f"({error.message.rstrip('.')}); "
                    f"start it with: kleash serve {name} --model=FOLDER --server.port={port}, "
                    f"or correct --services.{name}."
                ) from None


@dataclass(frozen=True)
class Handshake:
    """What the services said about themselves."""

    reward_revision: str
    reference_revision: str
    fence: int
    """Highest fence that a policy replica has seen."""


def shake_hands(
    services: Services,
    config: PPOConfig,
    *,
    tokenizer_sha256: str,
    reference_digest: Callable[[str], str],
    reward_revision: str = "",
) -> Handshake:
    """Check that the services fit the run.

    Args:
        tokenizer_sha256: digest of the SFT checkpoint's tokenizer.
        reference_digest: digest of the SFT checkpoint's weights in a data type.
        reward_revision: of the reward model that the run goes on with, which the service may hold
            beside a newer one; empty for a run that begins.

    Raises ConfigError with what was seen and the remedy.
    """
    reward = _held_or_newest(services.reward, reward_revision)
    reference = services.reference.get_model()
    told: list[tuple[str, Any]] = [("reward", reward), ("reference", reference)]
    policies = dict(services.policies)
    for replica, answer in _answers(policies, config, lambda its: its.get_policy()).items():
        name = "policy" if len(policies) == 1 else f"policy (replica {replica})"
        told.append((name, answer))
    for name, answer in told:
        if why := describe_misfit(answer, config, tokenizer_sha256):
            raise ConfigError(f"the {name} service {why}.")
    frozen = reference_digest(reference.dtype)
    if reference.model.revision != frozen:
        raise ConfigError(
            f"the reference service serves {reference.model.name} ({reference.model.revision}), "
            f"which is not the SFT checkpoint {config.model} ({frozen}); KL is measured from the "
            "policy's start, so serve that folder."
        )
    served = _answers(dict(services.weights), config, lambda its: its.get_weights())
    fence = max(answer.fence for answer in served.values())
    return Handshake(reward.model.revision, reference.model.revision, fence)


def _held_or_newest(reward: Reward, revision: str) -> reward_pb2.GetModelResponse:
    try:
        return reward.pinned(revision).get_model()
    except NotFound:
        return reward.get_model()


def describe_misfit(answer: Any, config: PPOConfig, tokenizer_sha256: str) -> str:
    """Why a service that says this of itself cannot work for the run, with the remedy; "" if it
    can. Goes on from "the service".
    """
    if answer.tokenizer_sha256 != tokenizer_sha256:
        return (
            f"has another tokenizer ({answer.tokenizer_sha256[:12]}) than {config.model} "
            f"({tokenizer_sha256[:12]}); serve a model that was trained from this SFT checkpoint"
        )
    if answer.limits.max_item_tokens < config.max_sequence_tokens:
        return (
            f"takes sequences of {answer.limits.max_item_tokens} tokens, but max_prompt_tokens "
            f"{config.max_prompt_tokens} plus sampling.max_new_tokens "
            f"{config.sampling.max_new_tokens} is {config.max_sequence_tokens}; lower these or "
            "raise the service's limit"
        )
    return ""


def _answers(replicas: Mapping[int, R], config: PPOConfig, ask: Callable[[R], T]) -> dict[int, T]:
    """What all replicas say; where they come and go, one that is just leaving is left out."""
    answers: dict[int, T] = {}
    missing: Unavailable | None = None
    for number, replica in replicas.items():
        try:
            answers[number] = ask(replica)
        except Unavailable as error:
            if not config.services.is_elastic:
                raise
            missing = error
    if not answers:
        raise missing or Unavailable(
            "every policy replica has left; kubectl get pods shows why, and the run goes on when "
            "one is there.",
            reason="NO_REPLICA",
        )
    return answers
