"""A stream is exactly one zstd frame of exactly the size that its header promises."""

from __future__ import annotations

import numpy as np
import pytest

from kleash.weights.frames import CodecError, compress, decompress

pytestmark = pytest.mark.unit

BYTES = np.random.default_rng(0).integers(0, 9, 5000).astype(np.uint8)


@pytest.mark.parametrize("are_draws", [False, True])
def test_a_frame_gives_its_bytes_back(are_draws: bool) -> None:
    frame = compress(BYTES, are_draws=are_draws)
    assert len(frame) < BYTES.nbytes
    np.testing.assert_array_equal(decompress(memoryview(frame), len(BYTES)), BYTES)


def test_nothing_is_an_empty_stream() -> None:
    assert compress(BYTES[:0]) == b""
    assert len(decompress(memoryview(b""), 0)) == 0


@pytest.mark.parametrize(
    ("spoil", "size"),
    [
        (lambda frame: frame + b"junk", len(BYTES)),
        (lambda frame: frame + frame, len(BYTES)),
        (lambda frame: frame[:-3], len(BYTES)),
        (lambda frame: frame[4:], len(BYTES)),
        (lambda frame: b"", len(BYTES)),
        (lambda frame: frame, len(BYTES) - 1),
        (lambda frame: frame, len(BYTES) + 1),
        (lambda frame: frame, 0),
    ],
)
def test_anything_else_is_refused(spoil, size: int) -> None:
    with pytest.raises(CodecError):
        decompress(memoryview(spoil(compress(BYTES))), size)
