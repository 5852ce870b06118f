"""A frozen model as a scoring service holds it: where it runs, what identifies and bounds it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kleash.base.errors import ModelError
from kleash.lm.config import Dtype, DtypeChoice, FrozenModelConfig
from kleash.lm.digest import chat_template_sha256, model_digest, tokenizer_sha256
from kleash.lm.load import check_device, load_tokenizer, max_positions

BATCH_TOLERANCE: dict[Dtype, float] = {"float32": 5e-5, "float16": 0.05, "bfloat16": 0.25}
"""How far the score of a row alone may be from its score in a batch, for scores within +-10: two to
five times the most that was seen over 17 kinds of models (docs/decisions.md, 2026-11-25)."""

BFLOAT16_GAIN = 1.5
"""How much faster a CPU must be in bfloat16 for "auto" to choose it: chips with AMX are several
times faster, some with AVX512-BF16 alone are slower, and none that was seen is in between."""

TRIAL_ROWS, TRIAL_SIZE, NUM_TRIALS = 512, 512, 5


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A loaded model, its tokenizer and the facts that GetModel tells."""

    model: Any
    tokenizer: Any
    device: torch.device
    name: str
    revision: str
    """Digest of the weights."""
    tokenizer_sha256: str
    chat_template_sha256: str
    """Empty without a chat template."""
    dtype: Dtype
    vocab_size: int
    """Number of token ids that have an embedding."""
    max_item_tokens: int
    """Longest input that is accepted, in tokens."""


def load_frozen(
    config: FrozenModelConfig,
    load: Callable[..., Any],
    *,
    max_item_tokens: int,
    max_batch_tokens: int,
    needs_eos: bool = True,
) -> FrozenModel:
    """Load the model with ``load`` (a function of kleash.lm.load) and identify it.

    Args:
        max_item_tokens: longest input to accept; 0 means as many as the model and a batch take.
        max_batch_tokens: tokens in one forward pass.
        needs_eos: refuse a tokenizer without an end-of-sequence token.

    Raises UserError with the place and the remedy.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    tokenizer = load_tokenizer(
        config.model,
        pad_token=config.pad_token,
        chat_template=config.chat_template,
        needs_eos=needs_eos,
    )
    # A folder may hold a training run's truncation and padding. The first call would reset them,
    # and that call may be one of two threads at a time.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    try:
        model = load(config.model, dtype=dtype, device=str(device))
    except torch.OutOfMemoryError:
        raise ModelError(
            f"the model in {config.model} does not fit into the memory of {device}; "
            "use --dtype=bfloat16 or a larger device."
        ) from None
    model.requires_grad_(False)
    most = min(max_positions(model), max_batch_tokens)
    if max_item_tokens > most:
        raise ModelError(
            f"limits.max_item_tokens is {max_item_tokens} and can be at most {most}: the model in "
            f"{config.model} accepts {max_positions(model)} and limits.max_batch_tokens is "
            f"{max_batch_tokens}; lower it, or leave it at 0."
        )
    return FrozenModel(
        model=model,
        tokenizer=tokenizer,
        device=device,
        name=config.name or config.model.resolve().name,
        revision=model_digest(model),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=chat_template_sha256(tokenizer),
        dtype=dtype,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_item_tokens=max_item_tokens or most,
    )


def choose_device(name: str) -> torch.device:
    """The torch device called ``name``; "auto" is cuda when there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return check_device(name)


def choose_dtype(name: DtypeChoice, device: torch.device) -> Dtype:
    """The data type called ``name``; "auto" is bfloat16 where ``device`` is faster in it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        seconds = {each: _product_s(each) for each in (torch.float32, torch.bfloat16)}
        is_faster = seconds[torch.bfloat16] * BFLOAT16_GAIN < seconds[torch.float32]
    return "bfloat16" if is_faster else "float32"


@torch.inference_mode()
def _product_s(dtype: torch.dtype) -> float:
    """CPU seconds of this thread for a matrix product as large as a batch's; the best of some."""
    rows = torch.ones(TRIAL_ROWS, TRIAL_SIZE, dtype=dtype)
    weights = torch.ones(TRIAL_SIZE, TRIAL_SIZE, dtype=dtype)
    seconds = []
    for _ in range(NUM_TRIALS):
        began = time.thread_time()
        torch.nn.functional.linear(rows, weights)
        seconds.append(time.thread_time() - began)
    return min(seconds)


def warm_up(
    frozen: FrozenModel, max_batch_tokens: int, forward: Callable[[list[int]], object]
) -> None:
    """``forward`` with the lengths of a first batch; raises ModelError when it does not fit."""
    lengths = warm_up_lengths(frozen.device, frozen.max_item_tokens, max_batch_tokens)
    try:
        forward(lengths)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"a batch of {sum(lengths)} tokens does not fit into the memory of {frozen.device} "
            "beside the model; lower limits.max_batch_tokens or limits.max_item_tokens."
        ) from None


def warm_up_lengths(device: torch.device, max_item_tokens: int, max_batch_tokens: int) -> list[int]:
    """Lengths of the rows of a first forward pass.

    On a GPU it is as large as a batch may be, so that a batch which does not fit fails the start
    and not a caller; on a CPU a small one, which would otherwise take minutes.
    """
    if device.type == "cpu":
        return [min(16, max_item_tokens)] * 2
    length = min(max_item_tokens, max_batch_tokens)
    return [length] * max(max_batch_tokens // length, 1)
