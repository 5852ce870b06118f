"""The digest of a model as a sum: a change of a few elements changes it in time for those elements.

    tensor sum    sum over elements i of B(i >> 16) * T(i & 0xffff) * bits_i   mod 2^64
    model digest  sha256 over (name, data type, shape, tensor sum) of every tensor

T and B are fixed odd 64-bit numbers, so that no change of a single element goes unseen; they are
drawn with SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
Sums of disjoint ranges add, in any order: the ranks of a sharded trainer each sum their own share.
This guards against accidents, not against somebody who wants a collision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache

import numpy as np

MASK = (1 << 64) - 1
BLOCK_BITS = 16
BLOCK = 1 << BLOCK_BITS
"""Elements that share B; their T are 512 KiB, which stay in the cache."""

FIRST_BLOCK_SEED = 1 << 32
"""B starts here in the sequence whose start is T."""


def as_words(array: np.ndarray) -> np.ndarray:
    """A contiguous array's bits as flat unsigned words, not copied; 8-byte items become two."""
    size = min(array.itemsize, 4)
    return array.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[size])


def tensor_sum(words: np.ndarray, first: int = 0) -> int:
    """Digest sum of flat unsigned ``words`` whose first has the flat index ``first``."""
    total, start = 0, 0
    factors, scratch = _factors(), np.empty(BLOCK, np.uint64)
    while start < len(words):
        block, place = divmod(first + start, BLOCK)
        part = words[start : start + BLOCK - place]
        product = scratch[: len(part)]
        np.multiply(factors[place : place + len(part)], part, out=product)
        total += int(product.sum()) * _block_factor(block)
        start += len(part)
    return total & MASK


def sum_change(indices: np.ndarray, old: np.ndarray, new: np.ndarray) -> int:
    """How a tensor's sum changes when the elements at ascending flat int64 ``indices`` do."""
    total = 0
    factors = _factors()
    for start in range(0, len(indices), BLOCK):
        places = indices[start : start + BLOCK]
        steps = new[start : start + BLOCK].astype(np.uint64)
        steps -= old[start : start + BLOCK]
        steps *= factors[places & (BLOCK - 1)]
        first_block, last_block = int(places[0]) >> BLOCK_BITS, int(places[-1]) >> BLOCK_BITS
        if first_block == last_block:
            total += int(steps.sum()) * _block_factor(first_block)
            continue
        blocks = np.arange(first_block, last_block + 1)
        starts = np.searchsorted(places, blocks << BLOCK_BITS)
        is_filled = np.diff(starts, append=len(places)) > 0
        sums = np.add.reduceat(steps, starts[is_filled])
        sums *= _mixed(blocks[is_filled].astype(np.uint64) + np.uint64(FIRST_BLOCK_SEED))
        total += int(sums.sum())
    return total & MASK


@cache
def _factors() -> np.ndarray:
    """T, uint64 (BLOCK,)."""
    return _mixed(np.arange(BLOCK, dtype=np.uint64))


@cache
def _block_factor(block: int) -> int:
    """B of one block."""
    return int(_mixed(np.array([block + FIRST_BLOCK_SEED], np.uint64))[0])


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output for each state, made odd."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def digest_bytes(total: int) -> bytes:
    """A tensor sum as 8 little-endian bytes."""
    return total.to_bytes(8, "little")


def combine_digests(entries: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """Model digest from (name, dtype, shape, tensor digest) of every tensor, in any order."""
    digest = hashlib.sha256()
    for name, dtype, shape, tensor in sorted(entries):
        digest.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode() + tensor)
    return "sha256:" + digest.hexdigest()
