"""The calls of the reference service without gRPC: a request in, a response out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kleash.base.version import software_version
from kleash.common.v1 import common_pb2
from kleash.lm.sequences import TokenSequence
from kleash.reference.scorer import LogProbsJob, ReferenceScorer
from kleash.reference.v1 import reference_pb2
from kleash.rpc.codec import encode_floats
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.requests import Limits, check_size, decode_sequence, too_long, unknown_id
from kleash.rpc.work import Work


class ReferenceRequests:
    """Checks requests, makes rows of them, and makes responses of log-probs. Thread-safe."""

    def __init__(self, scorer: ReferenceScorer, limits: Limits) -> None:
        self._scorer = scorer
        self._limits = limits
        self.served = common_pb2.ServedModel(
            name=scorer.frozen.name, revision=scorer.frozen.revision
        )

    def log_probs(
        self, request: reference_pb2.LogProbsRequest
    ) -> Work[LogProbsJob, np.ndarray, reference_pb2.LogProbsResponse]:
        """Begin a LogProbs."""
        check_size(request, len(request.items), self._limits, field="items")
        temperature = _temperature(request)
        results = [reference_pb2.LogProbsResult(item_id=item.item_id) for item in request.items]
        rows: list[int] = []
        jobs: list[LogProbsJob] = []
        for index, item in enumerate(request.items):
            ids, response_start = self._decode(item, f"items[{index}].tokens")
            if fault := unknown_id(ids, self._scorer.frozen.vocab_size):
                results[index].code = common_pb2.ITEM_STATUS_CODE_INVALID_INPUT
                results[index].error_message = fault
            elif fault := too_long(len(ids), self._scorer.frozen.max_item_tokens):
                results[index].code = common_pb2.ITEM_STATUS_CODE_INPUT_TOO_LONG
                results[index].error_message = fault
            else:
                rows.append(index)
                jobs.append(LogProbsJob(TokenSequence(ids, response_start), temperature))

        def finish(
            log_probs: list[np.ndarray], usage: common_pb2.Usage
        ) -> reference_pb2.LogProbsResponse:
            _complete([results[index] for index in rows], log_probs)
            return reference_pb2.LogProbsResponse(results=results, model=self.served, usage=usage)

        return Work(jobs, [len(job.sequence.ids) for job in jobs], request.isolate, finish)

    def get_model(self) -> reference_pb2.GetModelResponse:
        """Describe the model."""
        frozen = self._scorer.frozen
        return reference_pb2.GetModelResponse(
            model=self.served,
            tokenizer_sha256=frozen.tokenizer_sha256,
            chat_template_sha256=frozen.chat_template_sha256,
            dtype=frozen.dtype,
            vocab_size=frozen.vocab_size,
            limits=self._limits.to_message(frozen.max_item_tokens),
            server_version=software_version(),
        )

    def _decode(self, item: reference_pb2.LogProbsItem, field: str) -> tuple[np.ndarray, int]:
        ids, response_start = decode_sequence(
            item.tokens, tokenizer_sha256=self._scorer.frozen.tokenizer_sha256, field=field
        )
        if response_start < 1:
            raise InvalidRequest(
                f"{field}.response_start is 0; a response needs a prompt token before it.",
                field=f"{field}.response_start",
            )
        return ids, response_start


def _temperature(request: reference_pb2.LogProbsRequest) -> float:
    if not request.HasField("temperature"):
        return 1.0
    if not (math.isfinite(request.temperature) and request.temperature > 0):
        raise InvalidRequest(
            f"temperature is {request.temperature}; log-probabilities need a positive one "
            "(leave it out for 1).",
            field="temperature",
        )
    return request.temperature


def _complete(
    results: Sequence[reference_pb2.LogProbsResult], log_probs: Sequence[np.ndarray]
) -> None:
    """Fill in the model's answers. NaN and infinity become a status and never leave."""
    for result, values in zip(results, log_probs, strict=True):
        if np.isfinite(values).all():
            result.code = common_pb2.ITEM_STATUS_CODE_OK
            result.log_probs.CopyFrom(encode_floats(values))
        else:
            position = int(np.isfinite(values).argmin())
            result.code = common_pb2.ITEM_STATUS_CODE_NON_FINITE
            result.error_message = (
                f"the log-probability of response token {position} is {values[position]}."
            )
