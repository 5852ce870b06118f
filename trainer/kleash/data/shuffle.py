"""Orders of training data, pure functions of (seed, epoch): a resumed run continues its own."""

from __future__ import annotations

import hashlib

import numpy as np


def shuffled(num_items: int, *, seed: int, epoch: int = 0, purpose: str = "train") -> np.ndarray:
    """A permutation of 0..num_items-1, int64; ``purpose`` separates uses of one seed."""
    digest = hashlib.blake2b(f"{purpose}\0{seed}\0{epoch}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return generator.permutation(num_items)
