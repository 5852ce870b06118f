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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kleash.weights.digest import MASK, sum_change, tensor_sum
from kleash.weights.frames import CodecError, compress, decompress
from kleash.weights.ordered import ordered, unordered, unzigzag, zigzag

BLOCK = 1 << 17
"""Words compared at a time: two inputs and a mask that stay in the cache."""

BATCH = 1 << 14
"""Changed words that are encoded at a time: enough that numpy's calls cost little, and few enough
that they stay in the cache."""

ESCAPE = 255
SPARSE_MOST = 0.4
"""Changed fraction up to which gaps are shorter than planes of zeros: they cross between 0.3 and
0.6, depending on how large the steps are."""

SAMPLE_BYTES = 1 << 20
PAYS = 0.97
"""Planes are kept when a sample of them is smaller than this share of the words."""

_HEADER = struct.Struct("<7I")
_EMPTY = np.empty(0, np.uint8)

Buffer = bytes | memoryview


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
    assert len(new) < 1 << 32, "a part has less than 2^32 elements: its gaps are 32 bits wide"
    if old is None:
        return _encode_full(new, tensor_sum(new, first))
    streams, change = _SparseStreams(), 0
    for indices, before, after in _changed_words(old, new):
        if streams.num_changed + len(indices) > SPARSE_MOST * len(new):
            return _encode_dense(old, new, first)
        streams.add(indices, ordered(after) - ordered(before))
        indices += first
        change += sum_change(indices, before, after)
    if not streams.num_changed:
        return None
    data = streams.encode()
    if len(data) < new.nbytes:
        return Encoded(Codec.SPARSE_DELTA, data, streams.num_changed, change & MASK)
    return _encode_dense(old, new, first)


def _changed_words(
    old: np.ndarray, new: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ascending int64 indices at which two arrays of words differ, and both words there."""
    found, count = [], 0
    for start in range(0, len(new), BLOCK):
        end = start + BLOCK
        indices, before, after = _changed_in_block(old[start:end], new[start:end])
        indices += start
        found.append((indices, before, after))
        count += len(indices)
        if count >= BATCH or (count and end >= len(new)):
            indices, before, after = map(np.concatenate, zip(*found, strict=True))
            yield indices, before, after
            found, count = [], 0


def _changed_in_block(
    old: np.ndarray, new: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``_changed_words``.

    Eight bytes are compared at a time: finding the few that differ is what takes the time.
    """
    if new.nbytes % 8:
        (indices,) = (old != new).nonzero()
        return indices, old[indices], new[indices]
    old_groups, new_groups = old.view(np.uint64), new.view(np.uint64)
    (groups,) = (old_groups != new_groups).nonzero()
    old, new = old_groups[groups].view(old.dtype), new_groups[groups].view(new.dtype)
    (places,) = (old != new).nonzero()
    shift = (8 // new.itemsize).bit_length() - 1
    indices = groups[places >> shift]
    indices <<= shift
    indices += places & ((1 << shift) - 1)
    return indices, old[places], new[places]


def _encode_dense(old: np.ndarray, new: np.ndarray, first: int) -> Encoded:
    change = (tensor_sum(new, first) - tensor_sum(old, first)) & MASK
    steps, num_changed = np.empty_like(new), 0
    for start in range(0, len(new), BLOCK):
        part = slice(start, start + BLOCK)
        steps[part] = zigzag(ordered(new[part]) - ordered(old[part]))
        num_changed += int(np.count_nonzero(steps[part]))
    data = _planes(steps, are_draws=True)
    if len(data) < PAYS * new.nbytes:
        return Encoded(Codec.DENSE_DELTA, data, num_changed, change)
    return _encode_full(new, change)


def _encode_full(new: np.ndarray, change: int) -> Encoded:
    if new.nbytes > 0:
        sample = new[: SAMPLE_BYTES // new.itemsize]
        if len(_planes(sample)) < PAYS * sample.nbytes:
            planes = _planes(new)
            if len(planes) < new.nbytes:
                return Encoded(Codec.FULL_PLANES, planes, len(new), change)
    return Encoded(Codec.FULL, new.tobytes(), len(new), change)


class _SparseStreams:
    """The streams of a sparse delta, added to in the order of the indices."""

    def __init__(self) -> None:
        self.num_changed = 0
        self._next = 0
        self._short_gaps: list[np.ndarray] = []
        self._short_steps: list[np.ndarray] = []
        self._far: list[np.ndarray] = []
        self._large: list[np.ndarray] = []

    def add(self, indices: np.ndarray, steps: np.ndarray) -> None:
        """Steps at int64 indices greater than those added before; at least one."""
        gaps = np.empty(len(indices), np.int64)
        gaps[0] = indices[0] - self._next
        np.subtract(indices[1:], indices[:-1], out=gaps[1:])
        gaps[1:] -= 1
        self._short_gaps.append(_shorten(gaps, np.dtype(np.uint32), self._far))
        codes = zigzag(steps)
        self._short_steps.append(_shorten(codes, codes.dtype, self._large))
        self._next = int(indices[-1]) + 1
        self.num_changed += len(indices)

    def encode(self) -> bytes:
        """Header and streams."""
        far, large = (np.concatenate(it) if it else _EMPTY for it in (self._far, self._large))
        short = (np.concatenate(self._short_gaps), np.concatenate(self._short_steps))
        streams = [compress(it, are_draws=True) for it in (*short, far, large)]
        header = _HEADER.pack(self.num_changed, len(far), len(large), *map(len, streams))
        return b"".join((header, *streams))


def _shorten(values: np.ndarray, dtype: np.dtype, escaped: list[np.ndarray]) -> np.ndarray:
    """Values as bytes; those that do not fit are appended to ``escaped``."""
    short = values.astype(np.uint8)
    is_long = values >= ESCAPE
    if is_long.any():
        escaped.append(values[is_long].astype(dtype))
        short[is_long] = ESCAPE
    return short


def _planes(words: np.ndarray, *, are_draws: bool = False) -> bytes:
    columns = words.view(np.uint8).reshape(-1, words.itemsize)
    planes = [
        compress(np.ascontiguousarray(columns[:, byte]), are_draws=are_draws)
        for byte in range(words.itemsize)
    ]
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
        return Change(None, unzigzag(_join_planes(view, num_elements, dtype)))
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
        streams.append(decompress(view[start : start + length], size))
        start += length
    gaps = _unescape(streams[0], streams[2].view(np.uint32), np.dtype(np.int64))
    steps = _unescape(streams[1], streams[3].view(dtype), dtype)
    gaps += 1
    indices = np.cumsum(gaps, out=gaps)
    indices -= 1
    if indices[-1] >= num_elements:
        raise CodecError(f"a sparse delta of {num_elements} elements changes {indices[-1]}.")
    return Change(indices, unzigzag(steps))


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
        columns[:, byte] = decompress(view[start : start + length], num_elements)
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


def apply_encoded(words: np.ndarray, codec: Codec, data: Buffer) -> None:
    """Change a part's words in place as its encoding says. Raises CodecError before it writes."""
    if codec in (Codec.FULL, Codec.FULL_PLANES):
        words[:] = decode_full(codec, data, len(words), words.dtype)
    else:
        apply_change(words, decode_delta(codec, data, len(words), words.dtype))


def changed_values(old: np.ndarray, steps: np.ndarray, *, undo: bool = False) -> np.ndarray:
    """The words that ``old`` become."""
    values = ordered(old)
    return unordered(values - steps if undo else values + steps)


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
    return Encoded(Codec.DENSE_DELTA, _planes(zigzag(total), are_draws=True), len(indices))


def _encode_steps(indices: np.ndarray, steps: np.ndarray) -> Encoded | None:
    if not len(indices):
        return None
    streams = _SparseStreams()
    streams.add(indices, steps)
    return Encoded(Codec.SPARSE_DELTA, streams.encode(), len(indices))
