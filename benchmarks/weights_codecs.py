"""Encodings of a weight delta side by side, on the same bytes: weights.py prints what comes out.

Every codec encodes tensor after tensor and changes a copy of the old words in place. Rates are CPU
seconds of the whole process, best of several rounds, so that a codec's own threads count.
"""

from __future__ import annotations

import importlib
import struct
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from kleash.weights.codec import apply_change, decode_delta, decode_full, encode
from kleash.weights.digest import sum_change
from kleash.weights.manifest import FULL_CODECS

GIB = 2**30
SLOW = ("arc_v3",)
"""Codecs that are measured once."""

Pairs = Sequence[tuple[np.ndarray, np.ndarray]]
"""Old and new flat words of every tensor."""


@dataclass(frozen=True)
class Layout:
    """A way to encode one tensor's new words, given the old ones."""

    name: str
    encode: Callable[[np.ndarray, np.ndarray], Any]
    size: Callable[[Any], int]
    apply: Callable[[np.ndarray, Any], None]
    """Changes the old words in place."""


def layouts() -> list[Layout]:
    """All that can be measured here; the Fireworks ones when their package is installed."""
    found = [
        Layout("kleash", encode, lambda it: len(it.data) if it else 0, _apply_own),
        Layout("u32 index + value", _encode_pairs, len, _apply_pairs),
        Layout(
            "i32 index + value, zstd-1",
            lambda old, new: _zstd(_encode_pairs(old, new)),
            len,
            lambda words, data: _apply_pairs(words, _unzstd(data)),
        ),
        Layout("XOR of all + zstd-1", lambda old, new: _zstd((old ^ new).data), len, _apply_xor),
        Layout(
            "full, planes + zstd-1",
            lambda _, new: encode(None, new),
            lambda it: len(it.data),
            _apply_own,
        ),
    ]
    return found + _fireworks()


def measure(layout: Layout, pairs: Pairs, rounds: int) -> dict[str, float]:
    """Ratio to the dense words, bits per changed element, and rates in GiB/s of dense words."""
    rounds = 1 if layout.name in SLOW else rounds
    dense = sum(new.nbytes for _, new in pairs)
    changed = sum(int(np.count_nonzero(old != new)) for old, new in pairs)
    encode_s = apply_s = float("inf")
    encoded: list[Any] = []
    for _ in range(rounds):
        begin = time.process_time()
        encoded = [layout.encode(old, new) for old, new in pairs]
        encode_s = min(encode_s, time.process_time() - begin)
        copies = [old.copy() for old, _ in pairs]
        begin = time.process_time()
        for words, data in zip(copies, encoded, strict=True):
            layout.apply(words, data)
        apply_s = min(apply_s, time.process_time() - begin)
        for words, (_, new) in zip(copies, pairs, strict=True):
            assert np.array_equal(words, new), f"{layout.name} is not bit-exact"
    size = sum(map(layout.size, encoded))
    return {
        "ratio": dense / size,
        "bits_per_changed": 8 * size / max(changed, 1),
        "encode_gib_per_s": dense / GIB / encode_s,
        "apply_gib_per_s": dense / GIB / apply_s,
    }


def digest_seconds(pairs: Pairs, rounds: int) -> float:
    """CPU seconds of the digest update, which is a part of kleash's encode."""
    found = [(np.flatnonzero(old != new), old, new) for old, new in pairs]
    changes = [(indices, old[indices], new[indices]) for indices, old, new in found]
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        for change in changes:
            sum_change(*change)
        best = min(best, time.process_time() - begin)
    return best


def find_seconds(pairs: Pairs, rounds: int) -> float:
    """CPU seconds of numpy.flatnonzero(old != new) alone, which a plain encoder begins with."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        for old, new in pairs:
            np.flatnonzero(old != new)
        best = min(best, time.process_time() - begin)
    return best


def _apply_own(words: np.ndarray, made: Any) -> None:
    if made is None:
        return
    if made.codec in FULL_CODECS:
        words[:] = decode_full(made.codec, made.data, len(words), words.dtype)
    else:
        apply_change(words, decode_delta(made.codec, made.data, len(words), words.dtype))


def _encode_pairs(old: np.ndarray, new: np.ndarray) -> bytes:
    indices = np.flatnonzero(old != new)
    return b"".join(
        (struct.pack("<I", len(indices)), indices.astype(np.uint32).data, new[indices].data)
    )


def _apply_pairs(words: np.ndarray, data: bytes) -> None:
    (count,) = struct.unpack_from("<I", data)
    indices = np.frombuffer(data, np.uint32, count, 4)
    words[indices] = np.frombuffer(data, words.dtype, count, 4 + 4 * count)


def _apply_xor(words: np.ndarray, data: bytes) -> None:
    words ^= np.frombuffer(_unzstd(data), words.dtype)


def _zstd(data: Any) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def _unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


def _fireworks() -> list[Layout]:
    """ARC v2 and v3 of fireworks-delta-compression, which needs the package zstd too."""
    try:
        package = importlib.import_module("fireworks_delta_compression")
    except ImportError:
        return []
    # They read what zstd gives them as tensors and do not write to them.
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    return [_arc(package, name) for name in ("arc_v2", "arc_v3")]


def _arc(package: Any, name: str) -> Layout:
    import torch

    def tensor(words: np.ndarray) -> torch.Tensor:
        floats = {2: torch.bfloat16, 4: torch.float32}
        return torch.from_numpy(words.view(f"i{words.itemsize}")).view(floats[words.itemsize])

    def encode_tensor(old: np.ndarray, new: np.ndarray) -> Any:
        return package.delta_compress(src=tensor(old), dst=tensor(new), compression_format=name)

    def apply(words: np.ndarray, made: Any) -> None:
        data, checksum = made
        new = package.delta_decompress(
            src=tensor(words), compressed_diff=data, checksum=checksum, compression_format=name
        )
        tensor(words).copy_(new)

    return Layout(name, encode_tensor, lambda made: made[0].numel(), apply)
