"""Lossless encodings of one part of a tensor: whole, or as the change from the bits before.

Elements are flat unsigned words of 1, 2 or 4 bytes: the bits of bool/uint8, fp16/bf16, fp32. All
arithmetic is modulo 2^bits, so every bit pattern survives: NaN payloads, -0, infinities.

    FULL          the words
    FULL_PLANES   lengths (u32 a plane), then for each byte of a word, lowest first, zstd(plane)
    SPARSE_DELTA  header: num_changed, num_gap_escapes, num_step_escapes, then the lengths of
                  the four streams (7 x u32); then
                  zstd(gap u8)       unchanged elements since the last changed one; 255: escaped
                  zstd(step u8)      zig-zag of the step; 255: escaped
                  zstd(gap u32)      escaped gaps
                  zstd(step)         escaped zig-zag steps, as words
    DENSE_DELTA   lengths, then planes of the zig-zag steps of all elements, as in FULL_PLANES

A step is the difference of two words as ordered integers: floats count up through their values in
units of the last place, so that -0 and +0 are neighbours and a small update is a small number.
Steps of one element add up, so consecutive deltas squash into one without knowing the weights.
"""

from __future__ import annotations

import enum
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from kleash.weights.digest import MASK, sum_change, tensor_sum

BLOCK = 1 << 16
"""Words compared at a time: two inputs and a mask that stay in the cache."""

ESCAPE = 255
SPARSE_MOST = 0.2
"""Changed fraction up to which gaps are shorter than planes of zeros."""

SAMPLE_BYTES = 1 << 20
PAYS = 0.97
"""Planes are kept when a sample of them is smaller than this share of the words."""

ZSTD_LEVEL = 1
_HEADER = struct.Struct("<7I")
_BYTES = np.dtype(np.uint8)

Buffer = bytes | memoryview


class CodecError(ValueError):
    """Bytes that no encoder wrote."""


class Codec(enum.IntEnum):
    """Numbers of kleash.weights.v1.Codec."""

    FULL = 1
    FULL_PLANES = 2
    SPARSE_DELTA = 3
    DENSE_DELTA = 4


@dataclass(frozen=True, eq=False)
class Encoded:
    """An encoded part."""

    codec: Codec
    data: bytes
    num_changed: int
    """Elements whose bits change; all of them in a full codec."""
    sum_change: int = 0
    """How it changes the tensor's digest sum, modulo 2^64."""


@dataclass(frozen=True, eq=False)
class Change:
    """A decoded delta."""

    indices: np.ndarray | None
    """Ascending int64 indices in the part; None means every element."""
    steps: np.ndarray
    """Difference of the ordered integers at these indices, modulo 2^bits."""


# ------------------------------------------------------------------------------------------ encode


def encode(old: np.ndarray | None, new: np.ndarray, first: int = 0) -> Encoded | None:
    """The shortest encoding of ``new``, given ``old``; None when no bit differs.

    Without ``old`` the encoding is a full one. ``first`` is the part's first flat index in its
    tensor, for the digest.
    """
    if old is None:
        return _encode_full(new, tensor_sum(new, first))
    indices = changed_indices(old, new)
    if not len(indices):
        return None
    if len(indices) <= SPARSE_MOST * len(new):
        before, after = old[indices], new[indices]
        data = _sparse(indices, _ordered(after) - _ordered(before))
        if len(data) < new.nbytes:
            change = sum_change(indices + first if first else indices, before, after)
            return Encoded(Codec.SPARSE_DELTA, data, len(indices), change)
    change = (tensor_sum(new, first) - tensor_sum(old, first)) & MASK
    dense = _planes(_zigzag(_ordered(new) - _ordered(old)))
    if len(dense) < PAYS * new.nbytes:
        return Encoded(Codec.DENSE_DELTA, dense, len(indices), change)
    return _encode_full(new, change)


def changed_indices(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Ascending int64 indices at which two arrays of words differ."""
    found = []
    mask = np.empty(BLOCK, np.bool_)
    for start in range(0, len(new), BLOCK):
        part = new[start : start + BLOCK]
        differs = np.not_equal(old[start : start + BLOCK], part, out=mask[: len(part)])
        indices = np.flatnonzero(differs)
        if len(indices):
            found.append(indices + start if start else indices)
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _encode_full(new: np.ndarray, change: int) -> Encoded:
    if new.nbytes > 0:
        sample = new[: SAMPLE_BYTES // new.itemsize]
        if len(_planes(sample)) < PAYS * sample.nbytes:
            planes = _planes(new)
            if len(planes) < new.nbytes:
                return Encoded(Codec.FULL_PLANES, planes, len(new), change)
    return Encoded(Codec.FULL, new.tobytes(), len(new), change)


def _sparse(indices: np.ndarray, steps: np.ndarray) -> bytes:
    gaps = np.empty(len(indices), np.int64)
    gaps[0] = indices[0]
    np.subtract(indices[1:], indices[:-1], out=gaps[1:])
    gaps[1:] -= 1
    is_far = gaps >= ESCAPE
    far = gaps[is_far].astype(np.uint32)
    zigzag = _zigzag(steps)
    is_large = zigzag >= ESCAPE
    large = zigzag[is_large]
    short_gaps, short_steps = gaps.astype(np.uint8), zigzag.astype(np.uint8)
    if len(far):
        short_gaps[is_far] = ESCAPE
    if len(large):
        short_steps[is_large] = ESCAPE
    streams = [_compress(stream) for stream in (short_gaps, short_steps, far, large)]
    header = _HEADER.pack(len(indices), len(far), len(large), *map(len, streams))
    return b"".join((header, *streams))


def _planes(words: np.ndarray) -> bytes:
    columns = words.view(np.uint8).reshape(-1, words.itemsize)
    planes = [_compress(np.ascontiguousarray(columns[:, byte])) for byte in range(words.itemsize)]
    return b"".join((struct.pack(f"<{len(planes)}I", *map(len, planes)), *planes))


# ------------------------------------------------------------------------------------------ decode


def decode_full(codec: Codec, data: Buffer, num_elements: int, dtype: np.dtype) -> np.ndarray:
    """The words of a full part. Raises CodecError."""
    dtype, view = np.dtype(dtype), memoryview(data).cast("B")
    if codec == Codec.FULL_PLANES:
        return _join_planes(view, num_elements, dtype)
    if codec != Codec.FULL:
        raise CodecError(f"{codec!r} is a delta; decode_delta reads it.")
    if len(view) != num_elements * dtype.itemsize:
        raise CodecError(f"a full part of {num_elements} {dtype} has {len(view)} bytes.")
    return np.frombuffer(view, dtype)


def decode_delta(codec: Codec, data: Buffer, num_elements: int, dtype: np.dtype) -> Change:
    """The change that a delta part makes. Raises CodecError; never reads or points out of range."""
    dtype, view = np.dtype(dtype), memoryview(data).cast("B")
    if codec == Codec.DENSE_DELTA:
        return Change(None, _unzigzag(_join_planes(view, num_elements, dtype)))
    if codec != Codec.SPARSE_DELTA:
        raise CodecError(f"{codec!r} is no delta; decode_full reads it.")
    if len(view) < _HEADER.size:
        raise CodecError(f"a sparse delta has {len(view)} bytes, less than its header.")
    num_changed, num_far, num_large, *lengths = _HEADER.unpack(view[: _HEADER.size])
    if not 0 < num_changed <= num_elements or max(num_far, num_large) > num_changed:
        raise CodecError(
            f"a sparse delta of {num_elements} elements says that {num_changed} change, with "
            f"{num_far} and {num_large} escapes."
        )
    if _HEADER.size + sum(lengths) != len(view):
        raise CodecError(f"the streams of a sparse delta do not add up to its {len(view)} bytes.")
    streams, start = [], _HEADER.size
    sizes = (num_changed, num_changed, num_far * 4, num_large * dtype.itemsize)
    for length, size in zip(lengths, sizes, strict=True):
        streams.append(_decompress(view[start : start + length], size))
        start += length
    gaps = _unescape(streams[0], streams[2].view(np.uint32), np.dtype(np.int64))
    steps = _unescape(streams[1], streams[3].view(dtype), dtype)
    gaps += 1
    indices = np.cumsum(gaps, out=gaps)
    indices -= 1
    if indices[-1] >= num_elements:
        raise CodecError(f"a sparse delta of {num_elements} elements changes {indices[-1]}.")
    return Change(indices, _unzigzag(steps))


def _unescape(short: np.ndarray, escaped: np.ndarray, dtype: np.dtype) -> np.ndarray:
    values = short.astype(dtype)
    places = np.flatnonzero(short == ESCAPE)
    if len(places) != len(escaped):
        raise CodecError(f"a sparse delta has {len(escaped)} escapes and {len(places)} places.")
    values[places] = escaped
    return values


def _join_planes(view: memoryview, num_elements: int, dtype: np.dtype) -> np.ndarray:
    size = dtype.itemsize
    if len(view) < 4 * size:
        raise CodecError(f"planes of {dtype} have {len(view)} bytes, less than their lengths.")
    lengths = struct.unpack(f"<{size}I", view[: 4 * size])
    if 4 * size + sum(lengths) != len(view):
        raise CodecError(f"the planes do not add up to {len(view)} bytes.")
    columns, start = np.empty((num_elements, size), np.uint8), 4 * size
    for byte, length in enumerate(lengths):
        columns[:, byte] = _decompress(view[start : start + length], num_elements)
        start += length
    return columns.reshape(-1).view(dtype)


# ------------------------------------------------------------------------------------------- apply


def apply_change(words: np.ndarray, change: Change, *, undo: bool = False) -> None:
    """Change a part's words in place; ``undo`` takes the same change back."""
    if change.indices is None:
        words[:] = changed_values(words, change.steps, undo=undo)
    else:
        values = changed_values(words[change.indices], change.steps, undo=undo)
        words[change.indices] = values


def changed_values(old: np.ndarray, steps: np.ndarray, *, undo: bool = False) -> np.ndarray:
    """The words that ``old`` become."""
    ordered = _ordered(old)
    return _unordered(ordered - steps if undo else ordered + steps)


def squash(
    parts: Sequence[tuple[Codec, Buffer]], num_elements: int, dtype: np.dtype
) -> Encoded | None:
    """One encoding with the effect of several, oldest first; None when nothing changes in the end.

    A full part makes those before it irrelevant and the result full. Digest sums are not
    computed. Raises CodecError.
    """
    dtype = np.dtype(dtype)
    full: np.ndarray | None = None
    changes: list[Change] = []
    for codec, data in parts:
        if codec in (Codec.FULL, Codec.FULL_PLANES):
            full, changes = decode_full(codec, data, num_elements, dtype).copy(), []
        elif full is not None:
            apply_change(full, decode_delta(codec, data, num_elements, dtype))
        else:
            changes.append(decode_delta(codec, data, num_elements, dtype))
    if full is not None:
        return _encode_full(full, 0)
    if any(change.indices is None for change in changes) or (
        sum(len(change.steps) for change in changes) > SPARSE_MOST * num_elements
    ):
        return _squash_dense(changes, num_elements, dtype)
    where = np.concatenate([change.indices for change in changes if change.indices is not None])
    indices, places = np.unique(where, return_inverse=True)
    total = np.zeros(len(indices), dtype)
    start = 0
    for change in changes:
        end = start + len(change.steps)
        total[places[start:end]] += change.steps  # indices within one change differ
        start = end
    return _encode_steps(indices[total != 0], total[total != 0])


def _squash_dense(changes: Sequence[Change], num_elements: int, dtype: np.dtype) -> Encoded | None:
    total = np.zeros(num_elements, dtype)
    for change in changes:
        if change.indices is None:
            total += change.steps
        else:
            total[change.indices] += change.steps
    indices = np.flatnonzero(total)
    if len(indices) <= SPARSE_MOST * num_elements:
        return _encode_steps(indices, total[indices])
    return Encoded(Codec.DENSE_DELTA, _planes(_zigzag(total)), len(indices))


def _encode_steps(indices: np.ndarray, steps: np.ndarray) -> Encoded | None:
    if not len(indices):
        return None
    return Encoded(Codec.SPARSE_DELTA, _sparse(indices, steps), len(indices))


# -------------------------------------------------------------------------------------------- bits


def _ordered(words: np.ndarray) -> np.ndarray:
    """Bits to integers that count up with the float: negative ones flip all bits but the sign."""
    if words.itemsize == 1:
        return words
    signed = words.view(f"i{words.itemsize}")
    bits = words.itemsize * 8
    flip = (signed >> (bits - 1)).view(words.dtype) >> words.dtype.type(1)
    return words ^ flip


_unordered = _ordered
"""The sign bit stays, so flipping twice gives the bits back."""


def _zigzag(steps: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    signed = steps.view(f"i{steps.itemsize}")
    bits = steps.itemsize * 8
    return (steps << steps.dtype.type(1)) ^ (signed >> (bits - 1)).view(steps.dtype)


def _unzigzag(values: np.ndarray) -> np.ndarray:
    one = values.dtype.type(1)
    return (values >> one) ^ (~(values & one) + one)


# -------------------------------------------------------------------------------------------- zstd

_local = threading.local()


def _compress(array: np.ndarray) -> bytes:
    if not array.nbytes:
        return b""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    return _local.compressor.compress(array.data)


def _decompress(view: memoryview, size: int) -> np.ndarray:
    """Exactly ``size`` bytes, or CodecError."""
    if not size:
        if len(view):
            raise CodecError(f"a stream of {len(view)} bytes stands for nothing.")
        return np.empty(0, np.uint8)
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    try:
        # The frame names its size; a frame that lies about it is refused before it is unpacked.
        declared = zstandard.frame_content_size(view)
        if declared != size:
            raise CodecError(f"a stream of {size} bytes says that it has {declared}.")
        data = _local.decompressor.decompress(view, max_output_size=size)
    except zstandard.ZstdError as error:
        raise CodecError(f"a stream cannot be unpacked: {error}.") from None
    if len(data) != size:
        raise CodecError(f"a stream has {len(data)} bytes instead of {size}.")
    return np.frombuffer(data, np.uint8)
