"""Encodings of weights: every bit survives, deltas invert and add up, bad bytes are refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kleash.lm.digest import canonical_tensors, tensor_words
from kleash.lm.tiny import build_causal_lm
from kleash.weights.codec import (
    Change,
    Codec,
    CodecError,
    Encoded,
    apply_change,
    decode_delta,
    decode_full,
    encode,
    squash,
)
from kleash.weights.digest import MASK, tensor_sum

pytestmark = pytest.mark.unit

FULL = (Codec.FULL, Codec.FULL_PLANES)
WORDS = (np.uint8, np.uint16, np.uint32)
SPECIAL_BF16 = (0x0000, 0x8000, 0x0001, 0x8001, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7F7F)
"""+0, -0, the smallest numbers, infinities, NaNs with a payload, the largest number."""

# No example database and no random start: a failure must not depend on the machine or the day.
quickly = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def some(encoded: Encoded | None) -> Encoded:
    """An encoding that must be there."""
    assert encoded is not None
    return encoded


def decoded(encoded: Encoded, old: np.ndarray | None, like: np.ndarray) -> np.ndarray:
    """What ``old`` becomes."""
    if encoded.codec in FULL:
        return decode_full(encoded.codec, encoded.data, len(like), like.dtype)
    assert old is not None
    words = old.copy()
    apply_change(words, decode_delta(encoded.codec, encoded.data, len(like), like.dtype))
    return words


def check(old: np.ndarray, new: np.ndarray, first: int = 0) -> Encoded | None:
    """Encode, decode, apply, undo, and compare every bit and the digest."""
    encoded = encode(old, new, first)
    if encoded is None:
        assert old.tobytes() == new.tobytes()
        return None
    assert decoded(encoded, old, new).tobytes() == new.tobytes()
    total = tensor_sum(old, first) + encoded.sum_change
    assert total & MASK == tensor_sum(new, first)
    if encoded.codec in FULL:
        assert encoded.num_changed == len(new)
        return encoded
    assert encoded.num_changed == np.count_nonzero(old != new)
    words = new.copy()
    change = decode_delta(encoded.codec, encoded.data, len(new), new.dtype)
    apply_change(words, change, undo=True)
    assert words.tobytes() == old.tobytes()
    return encoded


def floats(seed: int, size: int, dtype: type[np.unsignedinteger] = np.uint16) -> np.ndarray:
    """Bits of normal weights of standard deviation 0.02: bf16, or fp32."""
    bits = np.random.default_rng(seed).normal(0, 0.02, size).astype(np.float32).view(np.uint32)
    return bits if dtype == np.uint32 else (bits >> 16).astype(np.uint16)


def step_some(words: np.ndarray, fraction: float, seed: int, largest: int = 1) -> np.ndarray:
    """Words of which a share has moved by -largest to largest."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(-largest, largest + 1, len(words)).astype(words.dtype)
    steps[rng.random(len(words)) >= fraction] = 0
    return words + steps


@st.composite
def pairs(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of any words, of which none, some or all elements differ."""
    dtype = draw(st.sampled_from(WORDS))
    size = draw(st.integers(0, 400))
    words = arrays.arrays(dtype, size, elements=st.integers(0, int(np.iinfo(dtype).max)))
    old, other = draw(words), draw(words)
    if draw(st.booleans()):
        return old, other
    is_changed = draw(arrays.arrays(np.bool_, size, fill=st.just(False)))
    return old, np.where(is_changed, other, old)


@quickly
@given(pairs(), st.integers(0, 1 << 34))
def test_every_bit_pattern_comes_back(pair: tuple[np.ndarray, np.ndarray], first: int) -> None:
    check(*pair, first)


@quickly
@given(
    st.sampled_from(WORDS),
    st.integers(1, 300_000),
    st.floats(0, 1) | st.sampled_from([0.0001, 0.01, 0.03]),
    st.sampled_from([1, 3, 126, 127, 128, 60_000]),
    st.integers(0, 1 << 20),
)
def test_few_and_many_changes_come_back(
    dtype: type[np.unsignedinteger], size: int, fraction: float, largest: int, seed: int
) -> None:
    """Arrays of several blocks, with steps on both sides of the escape of a byte."""
    words = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, size, dtype)
    check(words, step_some(words, fraction, seed, largest))


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("size", [0, 1])
def test_empty_arrays_and_single_elements(dtype: type[np.unsignedinteger], size: int) -> None:
    zeros, ones = np.zeros(size, dtype), np.ones(size, dtype)
    assert encode(zeros, zeros.copy()) is None
    whole = some(encode(None, ones, 5))
    assert whole.sum_change == tensor_sum(ones, 5)
    assert decoded(whole, None, ones).tobytes() == ones.tobytes()
    assert (check(zeros, ones) is None) == (size == 0)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 65_534, 65_535, 65_536, 200_000])
@pytest.mark.parametrize("dtype", WORDS)
def test_gaps_of_every_length(gap: int, dtype: type[np.unsignedinteger]) -> None:
    old = np.zeros(3 * (gap + 1) + 40, dtype)
    new = old.copy()
    new[gap :: gap + 1][:3] = (1, 200, 3)
    encoded = some(check(old, new))
    if gap > 253:
        assert (encoded.codec, encoded.num_changed) == (Codec.SPARSE_DELTA, 3)
        with pytest.raises(CodecError, match="changes"):  # in a part that ends before the last one
            decode_delta(encoded.codec, encoded.data, 3 * (gap + 1) - 1, old.dtype)


@pytest.mark.parametrize("fraction", [0.01, 1.0])
def test_special_values_change_into_each_other(fraction: float) -> None:
    rng = np.random.default_rng(0)
    old = rng.choice(np.array(SPECIAL_BF16, np.uint16), 4000)
    other = rng.choice(np.array(SPECIAL_BF16, np.uint16), 4000)
    new = np.where(rng.random(4000) < fraction, other, old)
    check(old, new)
    check(old.astype(np.uint32) << 16 | 3, new.astype(np.uint32) << 16 | 5)


def test_the_codec_follows_the_change() -> None:
    bf16, fp32 = floats(0, 1_000_000), floats(1, 100_000, np.uint32)
    sparse = some(check(bf16, step_some(bf16, 0.04, seed=2)))
    dense = some(check(fp32, step_some(fp32, 1.0, seed=3, largest=90)))
    noise = np.random.default_rng(4).integers(0, 1 << 32, 100_000, np.uint32)
    unrelated = some(check(fp32, noise))
    assert sparse.codec == Codec.SPARSE_DELTA  # of several batches
    assert sparse.num_changed == pytest.approx(26_700, rel=0.05)  # a third of the steps is zero
    assert len(sparse.data) < bf16.nbytes / 40
    assert dense.codec == Codec.DENSE_DELTA
    assert len(dense.data) < 0.3 * fp32.nbytes
    assert unrelated.codec == Codec.FULL
    assert unrelated.data == noise.tobytes()


def test_planes_are_chosen_for_weights_and_not_for_noise() -> None:
    weights = floats(0, 100_000)
    encoded = some(encode(None, weights, 7))
    assert encoded.codec == Codec.FULL_PLANES
    assert len(encoded.data) < 0.75 * weights.nbytes
    assert decoded(encoded, None, weights).tobytes() == weights.tobytes()
    assert encoded.sum_change == tensor_sum(weights, 7)
    noise = np.random.default_rng(4).integers(0, 1 << 16, 100_000, np.uint16)
    encoded = some(encode(None, noise))
    assert encoded.codec == Codec.FULL


def test_a_unit_in_the_last_place_is_a_step_of_one_also_across_zero() -> None:
    """nextafter gives the neighbour; -0 and +0 are neighbours too, one step apart."""
    values = np.array([1.0, -1.0, 0.02, -0.02, 2.0, -2.0, 1e-45, -1e-45], np.float32)
    for step in (1, -1):
        old, new = np.zeros(800, np.uint32), np.zeros(800, np.uint32)
        old[::100] = values.view(np.uint32)
        new[::100] = np.nextafter(values, np.float32(step * np.inf)).view(np.uint32)
        encoded = some(check(old, new))
        change = decode_delta(encoded.codec, encoded.data, 800, np.dtype(np.uint32))
        assert change.indices is not None
        assert change.indices.tolist() == list(range(0, 800, 100))
        assert change.steps.view(np.int32).tolist() == [step] * 8
    # The bits of -0, +0 and the smallest numbers on both sides, one after another.
    chain = np.array([0x8001, 0x8000, 0x0000, 0x0001], np.uint16)
    change = Change(None, np.ones(3, np.uint16))
    words = chain[:3].copy()
    apply_change(words, change)
    assert words.tolist() == chain[1:].tolist()
    apply_change(words, change, undo=True)
    assert words.tolist() == chain[:3].tolist()


# ------------------------------------------------------------------------------------------ squash


@quickly
@given(st.sampled_from(WORDS), st.integers(1, 5000), st.integers(0, 1 << 20), st.data())
def test_a_squash_has_the_effect_of_the_chain(
    dtype: type[np.unsignedinteger], size: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    start = rng.integers(0, np.iinfo(dtype).max, size, dtype)
    words, chain = start, []
    for fraction in data.draw(st.lists(st.sampled_from([0.01, 0.1, 0.6, 2.0]), max_size=6)):
        if fraction > 1:
            new = rng.integers(0, np.iinfo(dtype).max, size, dtype)
            whole = encode(None, new)
        else:
            new = step_some(words, fraction, seed + len(chain), largest=140)
            whole = encode(words, new)
        if whole is not None:
            chain.append((whole.codec, whole.data))
            words = new
    if not chain:
        return
    one = squash(chain, size, np.dtype(dtype))
    if one is None:
        assert words.tobytes() == start.tobytes()
        return
    assert decoded(one, start, words).tobytes() == words.tobytes()
    is_full = any(codec in FULL for codec, _ in chain)
    assert (one.codec in FULL) == is_full
    assert one.num_changed == (size if is_full else np.count_nonzero(words != start))


@pytest.mark.parametrize("fraction", [0.02, 1.0])
def test_changes_that_cancel_squash_to_nothing(fraction: float) -> None:
    old = floats(0, 50_000, np.uint32)
    new = step_some(old, fraction, seed=1, largest=50)
    there, back = some(encode(old, new)), some(encode(new, old))
    chain = [(there.codec, there.data), (back.codec, back.data)]
    assert squash(chain, len(old), old.dtype) is None
    again = some(squash([*chain, chain[0]], len(old), old.dtype))
    assert decoded(again, old, new).tobytes() == new.tobytes()


def test_elements_that_are_back_are_left_out_of_a_squash() -> None:
    """Dense changes that leave a few elements different become one sparse delta."""
    old = floats(0, 50_000, np.uint32)
    middle, new = step_some(old, 1.0, seed=1, largest=50), step_some(old, 0.001, seed=2)
    parts = [encode(old, middle), encode(middle, new)]
    one = some(squash([(it.codec, it.data) for it in parts if it], len(old), old.dtype))
    assert one.codec == Codec.SPARSE_DELTA
    assert one.num_changed == np.count_nonzero(old != new) < 60
    assert decoded(one, old, new).tobytes() == new.tobytes()


# --------------------------------------------------------------------------------------- bad bytes


def samples() -> dict[str, tuple[Encoded, np.ndarray]]:
    """An encoded part of each codec, and the words before it."""
    old = floats(0, 3000)
    fp32 = floats(1, 3000, np.uint32)
    sparse = step_some(old, 0.05, seed=2, largest=300)
    sparse[:1000] = old[:1000]  # a long gap
    parts = {
        "sparse": (encode(old, sparse), old),
        "dense": (encode(fp32, step_some(fp32, 1.0, seed=3, largest=90)), fp32),
        "planes": (encode(None, old), old),
        "full": (encode(None, step_some(fp32, 1.0, 5, largest=1 << 30)), fp32),
    }
    return {name: (some(part), words) for name, (part, words) in parts.items()}


SAMPLES = samples()


def decode_anything(codec: Codec, data: bytes, size: int, dtype: np.dtype) -> None:
    """Decode spoiled bytes: CodecError, or words and places that fit the part."""
    try:
        if codec in FULL:
            assert decode_full(codec, data, size, dtype).shape == (size,)
            return
        change = decode_delta(codec, data, size, dtype)
    except CodecError:
        return
    if change.indices is None:
        assert change.steps.shape == (size,)
        return
    assert change.indices.shape == change.steps.shape
    assert change.indices[0] >= 0
    assert change.indices[-1] < size
    assert (np.diff(change.indices) > 0).all()


def test_samples_are_of_every_codec() -> None:
    assert {part.codec for part, _ in SAMPLES.values()} == set(Codec)


@settings(quickly, max_examples=300)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_spoiled_bytes_are_refused_or_stay_in_range(name: str, data: st.DataObject) -> None:
    part, words = SAMPLES[name]
    spoiled = bytearray(part.data)
    # Half of the flips hit the header and the frames' own headers, where they do most.
    place = st.integers(0, 60) | st.integers(0, len(spoiled) - 1)
    for at in data.draw(st.lists(place, max_size=4)):
        spoiled[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del spoiled[data.draw(st.integers(0, len(spoiled))) :]
    if data.draw(st.booleans()):
        spoiled += data.draw(st.binary(max_size=40))
    codec = data.draw(st.just(part.codec) | st.sampled_from(Codec))
    size = data.draw(st.just(len(words)) | st.integers(0, 2 * len(words)))
    decode_anything(codec, bytes(spoiled), size, words.dtype)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_cut_bytes_and_bytes_too_many_are_refused(name: str) -> None:
    part, words = SAMPLES[name]
    decode = decode_full if part.codec in FULL else decode_delta
    for data in (b"", part.data[:3], part.data[:-1], part.data + b"\0"):
        with pytest.raises(CodecError):
            decode(part.codec, data, len(words), words.dtype)
    with pytest.raises(CodecError):
        decode(part.codec, part.data, len(words) // 100, words.dtype)


def test_a_codec_of_the_other_kind_is_refused() -> None:
    with pytest.raises(CodecError, match="is a delta"):
        decode_full(Codec.SPARSE_DELTA, b"", 0, np.dtype(np.uint16))
    with pytest.raises(CodecError, match="is no delta"):
        decode_delta(Codec.FULL, b"", 0, np.dtype(np.uint16))


def test_no_count_in_a_header_is_believed() -> None:
    """Every u32 of the headers set to its most, and frames that unpack to far more than a part."""
    bomb = some(encode(None, np.zeros(1 << 25, np.uint16)))
    spoiled = [(bomb.codec, bomb.data, 3000, np.dtype(np.uint16))]
    for part, words in SAMPLES.values():
        for at in range(0, 28, 4):
            data = bytearray(part.data)
            data[at : at + 4] = b"\xff" * 4
            spoiled.append((part.codec, bytes(data), len(words), words.dtype))
    tracemalloc.start()
    try:
        for codec, data, size, dtype in spoiled:
            decode_anything(codec, data, size, dtype)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


# --------------------------------------------------------------------------------- a training step


def test_closed_form_predicts_the_changed_fraction_of_a_training_step() -> None:
    """E[min(1, |dw| / ulp(w))], with dw of the fp32 master weights and ulp of the bf16 weights.

    Rounding to bf16 changes the bits when a step crosses the middle between two neighbours, which
    lie one unit in the last place apart; where w lies between them is as good as random.
    """
    model = build_causal_lm(
        "llama", vocab_size=320, hidden_size=128, num_layers=3, initializer_range=0.08
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)

    def take_step() -> None:
        ids = torch.randint(5, 320, (2, 48), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    for _ in range(8):
        take_step()
    before = {name: its.clone() for name, its in canonical_tensors(model).items()}
    optimizer.param_groups[0]["lr"] = 1e-6
    take_step()
    num_changed, predicted, num_elements = 0, 0.0, 0
    for name, after in canonical_tensors(model).items():
        old, new = (tensor_words(its.bfloat16()) for its in (before[name], after))
        encoded = check(old, new)
        assert encoded is None or encoded.codec == Codec.SPARSE_DELTA
        num_changed += encoded.num_changed if encoded else 0
        exponent = np.maximum(old >> 7 & 0xFF, 1).astype(np.int64)
        step_size = np.abs((after.double() - before[name].double()).numpy().reshape(-1))
        predicted += np.minimum(1.0, step_size / np.exp2(exponent - 127.0 - 7)).sum()
        num_elements += len(new)
    assert num_elements > 500_000
    assert 0.001 < num_changed / num_elements < 0.1
    assert num_changed == pytest.approx(predicted, rel=0.05)
