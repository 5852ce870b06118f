"""Log-probabilities of response tokens under a causal language model.

B sequences, S positions, T response positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from kleash.lm.sequences import PackedBatch


def response_logits(model: Any, batch: PackedBatch, temperature: float = 1.0) -> torch.Tensor:
    """Logits that predict each response token: (B, T, V) float32, divided by ``temperature``.

    Position ``response_start - 1 + t`` predicts response token t. Log-probs are those of the
    processed distribution, softmax(logits / temperature), in sampler, trainer and reference alike.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need a positive one.")
    first = int(batch.response_starts.min()) - 1
    if first < 0:
        raise ValueError("a response needs a prompt token before it; response_start is 0.")
    width = batch.ids.shape[1]
    logits = model(input_ids=batch.ids, use_cache=False, logits_to_keep=width - first).logits
    columns = batch.response_columns(offset=-1) - first
    chosen = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1])).float()
    # Dividing by 1 changes no bit but copies the largest tensor of the step.
    return chosen if temperature == 1 else chosen / temperature


def token_log_probs(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[ids], (B, T), zero outside of ``mask``. logits (B, T, V) float32.

    Filled, not multiplied: a pad position may hold infinity or NaN, and 0 * NaN is NaN.
    """
    chosen = logits.gather(-1, ids[..., None]).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).masked_fill(~mask, 0.0)


def response_log_probs(model: Any, batch: PackedBatch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of every response token in nats, (B, T) float32, zero outside of the mask."""
    logits = response_logits(model, batch, temperature)
    return token_log_probs(logits, batch.response_ids, batch.response_mask)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(logits) over the last axis, in nats."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
