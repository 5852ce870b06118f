"""zstd frames of a delta's streams and of planes of bytes, checked when they are unpacked."""

from __future__ import annotations

import threading

import numpy as np
import zstandard

ZSTD_LEVEL = 1


class CodecError(ValueError):
    """Bytes that no encoder wrote."""


_local = threading.local()


def compress(array: np.ndarray, *, are_draws: bool = False) -> bytes:
    """A zstd frame. ``are_draws``: bytes that are nearly independent draws, as gaps and steps are.

    Those the entropy coder takes as they are: the short repetitions that a match finder sees by
    chance would take more bits and time.
    """
    if not array.nbytes:
        return b""
    if not hasattr(_local, "compressors"):
        for_draws = zstandard.ZstdCompressionParameters.from_level(
            ZSTD_LEVEL, min_match=7, hash_log=6
        )
        _local.compressors = {
            False: zstandard.ZstdCompressor(level=ZSTD_LEVEL),
            True: zstandard.ZstdCompressor(compression_params=for_draws),
        }
    return _local.compressors[are_draws].compress(array.data)


def decompress(view: memoryview, size: int) -> np.ndarray:
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
        data = _local.decompressor.decompress(view, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"a stream cannot be unpacked: {error}.") from None
    if len(data) != size:
        raise CodecError(f"a stream has {len(data)} bytes instead of {size}.")
    return np.frombuffer(data, np.uint8)
