"""The loss of supervised fine-tuning: tensors in, tensors out.

B sequences, T response positions; everything is (B, T) float32.
"""

from __future__ import annotations

import torch


def cross_entropy(log_probs: torch.Tensor, mask: torch.Tensor, *, num_tokens: int) -> torch.Tensor:
    """Negative log-likelihood of the masked tokens divided by ``num_tokens``, a scalar in nats.

    Args:
        log_probs: log-probability of each token given those before it.
        mask: bool, the tokens to learn; the end-of-sequence token is one of them.
        num_tokens: tokens to learn in the WHOLE optimizer batch, so that the losses of its
            micro-batches add up to the mean over its tokens (a mean of means weighs tokens of
            short responses more).
    """
    return -(log_probs * mask).sum() / num_tokens
