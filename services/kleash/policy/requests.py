"""What a Generate request means: checks with field paths, decode requests, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kleash.base.version import software_version
from kleash.common.v1 import common_pb2
from kleash.lm.decode import Decoded, DecodeRequest, FinishReason
from kleash.lm.frozen import FrozenModel
from kleash.policy.config import PolicyConfig
from kleash.policy.v1 import policy_pb2
from kleash.rpc.codec import decode_ids, encode_floats, encode_ids
from kleash.rpc.errors import InvalidRequest, PreconditionFailed, Unavailable
from kleash.rpc.requests import TOKENIZER_MISMATCH, TOO_LARGE, check_size, unknown_id
from kleash.weights.v1 import weights_pb2

MIN_TEMPERATURE = 1e-4
"""Below it, dividing logits overflows float32; the distribution is greedy long before."""

MAX_MESSAGE_TOKENS = 1 << 20
"""Tokens in one message of the stream: 8 MiB."""


WEIGHTS_TOO_OLD = "WEIGHTS_TOO_OLD"

QUARANTINE_RETRY_S = 5.0
"""A quarantined replica is good again when it has fetched a whole version."""

_FINISH_REASONS: dict[FinishReason, policy_pb2.FinishReason] = {
    "stop": policy_pb2.FINISH_REASON_STOP,
    "length": policy_pb2.FINISH_REASON_LENGTH,
    "aborted": policy_pb2.FINISH_REASON_ABORTED,
}


class PolicyRequests:
    """Reads requests against one model's vocabulary and limits."""

    def __init__(
        self,
        config: PolicyConfig,
        frozen: FrozenModel,
        *,
        max_sequence_tokens: int,
        served: Callable[[], weights_pb2.GetWeightsResponse],
    ) -> None:
        """``served`` tells what is served, required and known at the time of the call."""
        self._config = config
        self._limits = config.limits
        self._frozen = frozen
        self._max_sequence_tokens = max_sequence_tokens
        self._served = served
        self._eos_ids = eos_ids(frozen)

    @property
    def name(self) -> str:
        """Of the served model."""
        return self._frozen.name

    def get_policy(self) -> policy_pb2.GetPolicyResponse:
        """Describe the policy."""
        served = self._served()
        return policy_pb2.GetPolicyResponse(
            model=common_pb2.ServedModel(name=self.name, revision=served.digest),
            weights_version=served.version,
            tokenizer_sha256=self._frozen.tokenizer_sha256,
            chat_template_sha256=self._frozen.chat_template_sha256,
            dtype=self._frozen.dtype,
            vocab_size=self._frozen.vocab_size,
            limits=self._limits.to_message(self._max_sequence_tokens),
            max_running_sequences=self._config.max_running_sequences,
            server_version=software_version(),
        )

    def generate(self, request: policy_pb2.GenerateRequest) -> list[DecodeRequest]:
        """One decode request per sample, in order.

        Raises InvalidRequest with the culprit's path, PreconditionFailed for another tokenizer or
        weights that are too old, or Unavailable while no known weights are in place.
        """
        min_version = self._check_preconditions(request)
        prompts = request.prompts
        num_samples = [prompt.num_samples or 1 for prompt in prompts]
        if not prompts:
            raise InvalidRequest("prompts is empty; send at least one.", field="prompts")
        check_size(request, sum(num_samples), self._limits, field="prompts")
        sampling = self._sampling(request.sampling)
        requests: list[DecodeRequest] = []
        seen: dict[str, int] = {}
        for index, (prompt, count) in enumerate(zip(prompts, num_samples, strict=True)):
            if (first := seen.setdefault(prompt.prompt_id, index)) != index:
                raise InvalidRequest(
                    f"prompts[{index}].prompt_id '{prompt.prompt_id}' is that of prompts[{first}] "
                    "too; ids are part of the sampling counter and must differ.",
                    field=f"prompts[{index}].prompt_id",
                )
            ids = self._prompt_ids(prompt, index)
            if prompt.first_sample_index + count > 2**32:
                raise InvalidRequest(
                    f"prompts[{index}].first_sample_index {prompt.first_sample_index} plus {count} "
                    "samples is over 4294967296; use lower indices.",
                    field=f"prompts[{index}].first_sample_index",
                )
            for sample_index in range(prompt.first_sample_index, prompt.first_sample_index + count):
                requests.append(
                    DecodeRequest(
                        prompt=ids,
                        prompt_id=prompt.prompt_id,
                        sample_index=sample_index,
                        seed=request.sampling.seed,
                        min_version=min_version,
                        **sampling,
                    )
                )
        self._check_queue(requests)
        return requests

    def _check_preconditions(self, request: policy_pb2.GenerateRequest) -> int:
        """Returns the oldest weights version that may draw: weights change while requests wait."""
        own = self._frozen.tokenizer_sha256
        if request.tokenizer_sha256 not in ("", own):
            raise PreconditionFailed(
                f"the request was made with tokenizer {request.tokenizer_sha256} and this server's "
                f"is {own}; use the server's tokenizer.",
                reason=TOKENIZER_MISMATCH,
                field="tokenizer_sha256",
                metadata={"requested": request.tokenizer_sha256, "served": own},
            )
        served = self._served()
        if served.state == weights_pb2.REPLICA_STATE_QUARANTINED:
            raise quarantined()
        version, required = served.version, served.required_version
        if version < request.min_weights_version:
            raise weights_too_old(request.min_weights_version, version, field="min_weights_version")
        if not request.HasField("max_lag"):
            return request.min_weights_version
        if required - version > request.max_lag:
            raise PreconditionFailed(
                f"weights version {version} is served, which is {required - version} behind "
                f"version {required}, and max_lag is {request.max_lag}; wait until the replica has "
                "caught up, or allow more.",
                reason=WEIGHTS_TOO_OLD,
                field="max_lag",
                metadata={
                    "requested": str(required - request.max_lag),
                    "served": str(version),
                },
            )
        return max(request.min_weights_version, required - request.max_lag)

    def _prompt_ids(self, prompt: policy_pb2.Prompt, index: int) -> np.ndarray:
        field = f"prompts[{index}].tokens"
        ids = decode_ids(prompt.tokens, field=field)
        if not len(ids):
            raise InvalidRequest(f"{field} is empty; a prompt needs a token.", field=field)
        if len(ids) >= self._max_sequence_tokens:
            raise InvalidRequest(
                f"{field} has {len(ids)} tokens and a sequence has at most "
                f"{self._max_sequence_tokens}, prompt and response; send a shorter prompt.",
                reason=TOO_LARGE,
                field=field,
            )
        if sentence := unknown_id(ids, self._frozen.vocab_size):
            raise InvalidRequest(f"{field}: {sentence}", field=field)
        return ids

    def _sampling(self, sampling: policy_pb2.SamplingParams) -> dict:
        """Checked settings, as DecodeRequest names them."""
        temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
        top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
        if not sampling.max_new_tokens:
            raise InvalidRequest(
                "sampling.max_new_tokens is 0; say how many tokens a response may have.",
                field="sampling.max_new_tokens",
            )
        if not math.isfinite(temperature) or (temperature != 0 and temperature < MIN_TEMPERATURE):
            raise InvalidRequest(
                f"sampling.temperature is {temperature:g}; it is 0 (greedy) or at least "
                f"{MIN_TEMPERATURE:g}.",
                field="sampling.temperature",
            )
        if not 0 < top_p <= 1:
            raise InvalidRequest(
                f"sampling.top_p is {top_p:g}; it is above 0 and at most 1.", field="sampling.top_p"
            )
        for index, token in enumerate(sampling.stop_token_ids):
            if token >= self._frozen.vocab_size:
                raise InvalidRequest(
                    f"sampling.stop_token_ids[{index}] is {token} and the vocabulary has "
                    f"{self._frozen.vocab_size} ids.",
                    field=f"sampling.stop_token_ids[{index}]",
                )
        return {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": temperature,
            "top_k": sampling.top_k,
            "top_p": top_p,
            "stop_ids": frozenset(sampling.stop_token_ids) or self._eos_ids,
        }

    def _check_queue(self, requests: Sequence[DecodeRequest]) -> None:
        total = sum(
            min(len(its.prompt) + its.max_new_tokens, self._max_sequence_tokens) for its in requests
        )
        if total > self._limits.max_queued_tokens:
            raise InvalidRequest(
                f"the request may need {total} tokens and the queue takes "
                f"{self._limits.max_queued_tokens}; send fewer prompts in one request.",
                reason=TOO_LARGE,
                field="prompts",
            )


def eos_ids(frozen: FrozenModel) -> frozenset[int]:
    """Ids that end a response where the caller names none: the model's, else the tokenizer's."""
    for config in (frozen.model.generation_config, frozen.model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset([frozen.tokenizer.eos_token_id])


def weights_too_old(required: int, served: int, *, field: str = "") -> PreconditionFailed:
    """The answer to a request for newer weights than are served."""
    return PreconditionFailed(
        f"weights version {required} is required and version {served} is served; publish it or ask "
        "for less.",
        reason=WEIGHTS_TOO_OLD,
        field=field,
        metadata={"requested": str(required), "served": str(served)},
    )


def quarantined() -> Unavailable:
    """The answer of a replica that does not know which weights it holds."""
    return Unavailable(
        "the replica is quarantined: its weights are not known to be those of a version. Try "
        "another until it has fetched a whole version.",
        reason="QUARANTINED",
        retry_after_s=QUARANTINE_RETRY_S,
    )


def encode(finished: Sequence[Decoded]) -> Iterator[policy_pb2.GenerateResponse]:
    """Messages of the stream: one, unless the responses are long."""
    sequences: list[policy_pb2.GeneratedSequence] = []
    num_tokens = 0
    for decoded in finished:
        if sequences and num_tokens + len(decoded.ids) > MAX_MESSAGE_TOKENS:
            yield policy_pb2.GenerateResponse(sequences=sequences)
            sequences, num_tokens = [], 0
        sequences.append(_encode_one(decoded))
        num_tokens += len(decoded.ids)
    yield policy_pb2.GenerateResponse(sequences=sequences)


def _encode_one(decoded: Decoded) -> policy_pb2.GeneratedSequence:
    return policy_pb2.GeneratedSequence(
        prompt_id=decoded.request.prompt_id,
        sample_index=decoded.request.sample_index,
        tokens=encode_ids(decoded.ids),
        log_probs=encode_floats(decoded.log_probs),
        finish_reason=_FINISH_REASONS[decoded.finish_reason],
        version_spans=[
            policy_pb2.VersionSpan(start=start, end=end, weights_version=version)
            for start, end, version in decoded.versions
        ],
    )
