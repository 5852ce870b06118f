"""Client of the policy service: responses as they finish."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import grpc

from kleash.client.types import FinishReason, GeneratedSequence, Prompt, Sampling, VersionSpan
from kleash.policy.v1 import policy_pb2, policy_pb2_grpc
from kleash.rpc.call_spans import client_call
from kleash.rpc.channel import connect
from kleash.rpc.codec import decode_floats, decode_ids, encode_ids
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import InternalError, from_rpc_error

SERVICE = "kleash.policy.v1.PolicyService"

_FINISH_REASONS: dict[int, FinishReason] = {
    policy_pb2.FINISH_REASON_STOP: "stop",
    policy_pb2.FINISH_REASON_LENGTH: "length",
    policy_pb2.FINISH_REASON_ABORTED: "aborted",
}


class PolicyCalls:
    """The typed calls, over whatever carries them: gRPC here, a method call in LocalPolicy."""

    def __init__(
        self,
        call_get_policy: Callable[[policy_pb2.GetPolicyRequest], policy_pb2.GetPolicyResponse],
        call_generate: Callable[
            [policy_pb2.GenerateRequest], Iterable[policy_pb2.GenerateResponse]
        ],
    ) -> None:
        self._call_get_policy = call_get_policy
        self._call_generate = call_generate

    def get_policy(self) -> policy_pb2.GetPolicyResponse:
        """Model, weights version, tokenizer digest and limits."""
        return self._call_get_policy(policy_pb2.GetPolicyRequest())

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        min_weights_version: int = 0,
        max_lag: int | None = None,
        tokenizer_sha256: str = "",
    ) -> Generator[GeneratedSequence, None, None]:
        """Yield each response as it finishes; nothing is sent before the first one is asked for.

        Closing the generator cancels what is left. The same call on the same weights draws the
        same tokens, so that what is missing after an error may be asked for again.

        Args:
            min_weights_version: raise PreconditionFailed (WEIGHTS_TOO_OLD) rather than use older.
            max_lag: raise it rather than use weights that are more versions behind the newest
                committed one that the server knows of; None allows any number.
            tokenizer_sha256: raise PreconditionFailed (TOKENIZER_MISMATCH) when the server's
                differs; empty skips the check.
        """
        request = policy_pb2.GenerateRequest(
            prompts=[_prompt(prompt) for prompt in prompts],
            sampling=_sampling(sampling),
            min_weights_version=min_weights_version,
            max_lag=max_lag,
            tokenizer_sha256=tokenizer_sha256,
        )
        num_missing = sum(max(prompt.num_samples, 1) for prompt in prompts)
        for response in self._call_generate(request):
            for sequence in response.sequences:
                num_missing -= 1
                yield _generated(sequence)
        if num_missing:
            raise InternalError(
                f"the policy service ended its stream {num_missing} responses short."
            )


class PolicyClient(PolicyCalls):
    """A connection to a policy service. Safe to use from several threads."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 600.0,
        checks_health: bool = True,
        credentials: Credentials | None = None,
    ) -> None:
        """Args:
        address: "host:port", or a gRPC target such as "dns:///policy:50051".
        timeout_s: deadline of a call, the whole stream of a Generate included.
        checks_health: skip servers that are not ready, which a replica is not before it has
            the weights that its trainer requires.
        credentials: TLS and token; None takes those of the environment, KLEASH_TLS_* and
            KLEASH_TOKEN*.
        """
        self._address = address
        self._timeout_s = timeout_s
        self._channel = connect(
            address,
            service=SERVICE,
            methods_to_retry=("GetPolicy",),
            checks_health=checks_health,
            credentials=credentials,
        )
        self._stub = policy_pb2_grpc.PolicyServiceStub(self._channel)
        super().__init__(self._get_policy, self._generate)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get_policy(self, request: policy_pb2.GetPolicyRequest) -> policy_pb2.GetPolicyResponse:
        try:
            with client_call(SERVICE, "GetPolicy", self._address) as trace:
                return self._stub.GetPolicy(request, timeout=self._timeout_s, metadata=trace)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self._address) from None

    def _generate(
        self, request: policy_pb2.GenerateRequest
    ) -> Iterator[policy_pb2.GenerateResponse]:
        with client_call(SERVICE, "Generate", self._address) as trace:
            call = self._stub.Generate(request, timeout=self._timeout_s, metadata=trace)
            try:
                yield from call
            except grpc.RpcError as error:
                raise from_rpc_error(error, address=self._address) from None
            finally:
                call.cancel()


def _prompt(prompt: Prompt) -> policy_pb2.Prompt:
    return policy_pb2.Prompt(
        prompt_id=prompt.prompt_id,
        tokens=encode_ids(prompt.ids),
        num_samples=prompt.num_samples,
        first_sample_index=prompt.first_sample_index,
    )


def _sampling(sampling: Sampling) -> policy_pb2.SamplingParams:
    return policy_pb2.SamplingParams(
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        stop_token_ids=sampling.stop_token_ids,
    )


def _generated(sequence: policy_pb2.GeneratedSequence) -> GeneratedSequence:
    ids = decode_ids(sequence.tokens, field="sequences.tokens")
    log_probs = decode_floats(sequence.log_probs, field="sequences.log_probs")
    if len(ids) != len(log_probs) or not len(ids):
        raise InternalError(
            f"the policy service sent {len(ids)} tokens and {len(log_probs)} log-probabilities for "
            f"prompt '{sequence.prompt_id}'."
        )
    if sequence.finish_reason not in _FINISH_REASONS:
        raise InternalError(
            f"the policy service sent finish reason {sequence.finish_reason} for prompt "
            f"'{sequence.prompt_id}', which this client does not know; use its version."
        )
    return GeneratedSequence(
        prompt_id=sequence.prompt_id,
        sample_index=sequence.sample_index,
        ids=ids,
        log_probs=log_probs,
        finish_reason=_FINISH_REASONS[sequence.finish_reason],
        version_spans=tuple(
            VersionSpan(span.start, span.end, span.weights_version)
            for span in sequence.version_spans
        ),
    )
