"""Drawing tokens with counter-based random numbers.

The number that draws a token is a function of (seed, prompt id, sample index, position) alone, so a
retry, a resumed run or another replica draws the same token from the same distribution.
B sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def uniforms(seed: int, prompt_id: str, sample_index: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) for positions 0..count-1 of one response, float64, shape (count,).

    A Philox stream (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") whose
    128-bit key is a hash of (seed, prompt id, sample index). The first n numbers do not depend on
    ``count``.
    """
    digest = hashlib.blake2b(
        f"{seed}\0{sample_index}\0{prompt_id}".encode(), digest_size=16
    ).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


def sample_tokens(
    logits: torch.Tensor,
    random: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: (B, V) raw logits.
        random: (B,) float64 in [0, 1).
        temperature: divides the logits; 0 takes the most probable token, with log-probability 0.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: then keep the smallest set of tokens whose probability reaches this; 1 keeps all.

    Returns:
        tokens (B,) int64 and their log-probabilities (B,) float32 under the distribution that
        they were drawn from.
    """
    if temperature == 0:
        highest, tokens = logits.float().max(-1)
        return tokens, highest - highest  # zero, or NaN when the logits are
    scaled = _keep_top(logits.float() / temperature, top_k, top_p)
    cumulative = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
    # Scaling by the last entry keeps the target below the end whatever the rounding of the sum is,
    # and right=True steps over tokens of probability zero.
    tokens = torch.searchsorted(cumulative, (random * cumulative[:, -1])[:, None], right=True)
    # NaN logits compare with nothing: the token stays in the vocabulary, its log-prob is NaN.
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(-1), (
        scaled.gather(-1, tokens) - scaled.logsumexp(-1, keepdim=True)
    ).squeeze(-1)


def _keep_top(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set every logit that top-k or top-p drops to minus infinity."""
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        dropped = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return logits
