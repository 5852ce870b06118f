"""What every scoring service checks of a request: limits, model name, tokenizer digest, token ids.

A fault of the request raises a ServiceError with the field's path. A fault of one item is a
sentence that becomes that item's status, so that it never sinks the items beside it.
"""

from __future__ import annotations

import numpy as np
import pydantic
from google.protobuf.message import Message

from kleash.base.config import Config
from kleash.common.v1 import common_pb2
from kleash.rpc.codec import decode_ids
from kleash.rpc.errors import InvalidRequest, NotFound, PreconditionFailed

TOO_LARGE = "TOO_LARGE"
TOKENIZER_MISMATCH = "TOKENIZER_MISMATCH"


class Limits(Config):
    """Limits that a scoring service enforces and advertises; bundled clients split work to them."""

    max_items: int = pydantic.Field(default=1024, ge=1, lt=2**32)
    """Items in one request."""
    max_item_tokens: int = pydantic.Field(default=0, ge=0, lt=2**32)
    """Tokens in one item; 0 means as many as the model accepts and one batch takes."""
    max_message_bytes: int = pydantic.Field(default=64 * 1024 * 1024, ge=1024)
    """Bytes in one request; the server's own max_message_bytes must not be smaller."""
    max_queued_tokens: int = pydantic.Field(default=1_048_576, ge=1)
    """Tokens that may wait for the model; past it a call is refused with a time to retry."""
    max_batch_tokens: int = pydantic.Field(default=32_768, ge=1, lt=2**32)
    """Padded tokens in one forward pass."""

    @pydantic.model_validator(mode="after")
    def _queue_holds_a_batch(self) -> Limits:
        if self.max_queued_tokens < self.max_batch_tokens:
            raise ValueError(
                f"max_queued_tokens is {self.max_queued_tokens}, less than max_batch_tokens "
                f"({self.max_batch_tokens}): a full batch could never wait; raise it"
            )
        return self

    def to_message(self, max_item_tokens: int) -> common_pb2.Limits:
        """As GetModel advertises them; ``max_item_tokens`` is what holds for the loaded model."""
        return common_pb2.Limits(
            max_items=self.max_items,
            max_item_tokens=max_item_tokens,
            max_message_bytes=self.max_message_bytes,
            max_queued_tokens=self.max_queued_tokens,
            max_batch_tokens=self.max_batch_tokens,
        )


def check_size(request: Message, num_items: int, limits: Limits, *, field: str) -> None:
    """Raise InvalidRequest for more items or bytes than the limits allow."""
    if num_items > limits.max_items:
        raise InvalidRequest(
            f"{field} holds {num_items} entries and the limit is {limits.max_items}; "
            "send fewer in one request.",
            reason=TOO_LARGE,
            field=field,
        )
    if (num_bytes := request.ByteSize()) > limits.max_message_bytes:
        raise InvalidRequest(
            f"the request has {num_bytes} bytes and the limit is {limits.max_message_bytes}; "
            "send fewer items in one request.",
            reason=TOO_LARGE,
            field=field,
        )


def check_model(model: str, revision: str, *, served: common_pb2.ServedModel) -> None:
    """Raise NotFound unless model and revision are the served ones; empty means any."""
    for field, wanted, have in (
        ("model", model, served.name),
        ("revision", revision, served.revision),
    ):
        if wanted and wanted != have:
            raise NotFound(
                f"{field} '{wanted}' is not served here; this server has '{have}'.",
                reason=f"{field.upper()}_NOT_SERVED",
                field=field,
                metadata={"requested": wanted, "served": have},
            )


def decode_sequence(
    message: common_pb2.TokenSequence, *, tokenizer_sha256: str, field: str
) -> tuple[np.ndarray, int]:
    """Token ids (int32, read-only) and the index of the first response token.

    Raises InvalidRequest for a malformed message, and PreconditionFailed with both digests when
    another tokenizer made the ids: a score of foreign ids would be a wrong number, not an error.
    """
    if not message.tokenizer_sha256:
        raise InvalidRequest(
            f"{field}.tokenizer_sha256 is empty; name the tokenizer that made the ids "
            f"(GetModel tells this server's: {tokenizer_sha256}).",
            field=f"{field}.tokenizer_sha256",
        )
    if message.tokenizer_sha256 != tokenizer_sha256:
        raise PreconditionFailed(
            f"{field} was made by tokenizer {message.tokenizer_sha256} and this server's is "
            f"{tokenizer_sha256}; use the server's tokenizer or send text.",
            reason=TOKENIZER_MISMATCH,
            field=f"{field}.tokenizer_sha256",
            metadata={"requested": message.tokenizer_sha256, "served": tokenizer_sha256},
        )
    ids = decode_ids(message.tokens, field=f"{field}.tokens")
    if message.response_start > len(ids):
        raise InvalidRequest(
            f"{field}.response_start is {message.response_start} and there are {len(ids)} tokens; "
            "it is the index of the first response token.",
            field=f"{field}.response_start",
        )
    return ids, message.response_start


def unknown_id(ids: np.ndarray, vocab_size: int) -> str:
    """A sentence about the first id without an embedding in the model; empty when all have one."""
    outside = (ids < 0) | (ids >= vocab_size)
    if not outside.any():
        return ""
    position = int(outside.argmax())
    return (
        f"token id {int(ids[position])} at position {position} is outside of the model's "
        f"vocabulary of {vocab_size} ids."
    )


def too_long(num_tokens: int, max_item_tokens: int) -> str:
    """A sentence about an item over the length limit; empty when it is not."""
    if num_tokens <= max_item_tokens:
        return ""
    return f"the input has {num_tokens} tokens and the limit is {max_item_tokens}."
