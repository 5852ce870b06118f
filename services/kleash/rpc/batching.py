"""Which items share a forward pass: neighbours in length, within a budget of padded tokens."""

from __future__ import annotations

from collections.abc import Sequence

# A forward pass costs about as much as this many tokens before it computes any: padding below it
# is cheaper than a pass of its own.
PASS_OVERHEAD_TOKENS = 256
# Padding beyond that may be this share of the real tokens.
PADDING_SHARE = 1 / 8


def choose_batch(sizes: Sequence[int], seed: int, max_padded_tokens: int) -> slice:
    """The run of ``sizes`` (ascending) around ``seed`` that is computed together.

    Grows by the neighbour that costs less padding while items x longest stays within
    ``max_padded_tokens`` and the padding is worth a forward pass saved. Item ``seed`` is always in.
    """
    low = high = seed
    real = sizes[seed]
    while True:
        options = []
        for new_low, new_high in ((low - 1, high), (low, high + 1)):
            if new_low < 0 or new_high >= len(sizes):
                continue
            new_real = real + sizes[new_low if new_low < low else new_high]
            padded = (new_high - new_low + 1) * sizes[new_high]
            padding = padded - new_real
            if (
                padded <= max_padded_tokens
                and padding <= PASS_OVERHEAD_TOKENS + PADDING_SHARE * new_real
            ):
                options.append((padding, new_low, new_high, new_real))
        if not options:
            return slice(low, high + 1)
        _, low, high, real = min(options)
