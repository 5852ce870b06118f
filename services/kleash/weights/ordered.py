"""Bits of floats as integers that count up with the value, and steps between them as small numbers.

Arrays are flat unsigned words of 1, 2 or 4 bytes; arithmetic is modulo 2^bits.
"""

from __future__ import annotations

import numpy as np


def ordered(words: np.ndarray) -> np.ndarray:
    """Bits to integers that count up with the float: negative ones flip all bits but the sign."""
    if words.itemsize == 1:
        return words
    signed = words.view(f"i{words.itemsize}")
    bits = words.itemsize * 8
    flip = (signed >> (bits - 1)).view(words.dtype) >> words.dtype.type(1)
    return words ^ flip


unordered = ordered
"""The sign bit stays, so flipping twice gives the bits back."""


def zigzag(steps: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    signed = steps.view(f"i{steps.itemsize}")
    bits = steps.itemsize * 8
    return (steps << steps.dtype.type(1)) ^ (signed >> (bits - 1)).view(steps.dtype)


def unzigzag(values: np.ndarray) -> np.ndarray:
    """0, 1, 2, 3, ... to 0, -1, 1, -2, ..."""
    one = values.dtype.type(1)
    return (values >> one) ^ (~(values & one) + one)
