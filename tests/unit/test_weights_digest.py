"""The digest of a model: a sum over elements that follows changes, and sees each of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kleash.lm.digest import canonical_tensors, model_digest, schema_digest, tensor_words
from kleash.lm.load import load_causal_lm
from kleash.weights.digest import (
    BLOCK,
    MASK,
    as_words,
    combine_digests,
    digest_bytes,
    sum_change,
    tensor_sum,
)

pytestmark = pytest.mark.unit

GOLDEN_WORDS = np.array([0, 1, 0x8000, 0x7FC1, 0xFFFF, 0x3F80, 257], np.uint16)
GOLDEN_SUM = 0x444F5C0116CB1B08
GOLDEN_SUM_AT = (BLOCK - 3, 0x6DAC7A5717E939A8)
GOLDEN_MODEL = "sha256:4c7470b9fcef68e226c14ce7d4f133520fb50ee3042b69ad7c8b43ee5d1199ab"

# No example database and no random start: a failure must not depend on the machine or the day.
quickly = settings(max_examples=60, deadline=None, database=None, derandomize=True)
dtypes = st.sampled_from([np.uint8, np.uint16, np.uint32])
seeds = st.integers(0, 1 << 20)


def random_words(seed: int, size: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Any bits."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)


def plain_sum(words: np.ndarray, first: int) -> int:
    """The formula of the module, element by element, in Python's own integers."""

    def mixed(state: int) -> int:
        x = (state + 1) * 0x9E3779B97F4A7C15 & MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
        return (x ^ x >> 31) | 1

    total = 0
    for i, bits in enumerate(words.tolist(), first):
        total += mixed((i >> 16) + (1 << 32)) * mixed(i & 0xFFFF) * bits
    return total & MASK


@quickly
@given(dtypes, st.integers(0, 60), st.sampled_from([0, 5, BLOCK - 20, 7 * BLOCK - 1, 1 << 36]))
def test_the_sum_is_the_formula(dtype: type[np.unsignedinteger], size: int, first: int) -> None:
    """SplitMix64's outputs, made odd, are the factors (Steele, Lea, Flood 2014)."""
    words = random_words(size, size, dtype)
    assert tensor_sum(words, first) == plain_sum(words, first)


@quickly
@given(dtypes, seeds, st.integers(0, 5 * BLOCK), st.lists(st.integers(0, 200_000), max_size=5))
def test_sums_of_any_split_add_up_in_any_order(
    dtype: type[np.unsignedinteger], seed: int, first: int, cuts: list[int]
) -> None:
    words = random_words(seed, 200_000, dtype)
    edges = [0, *sorted(cuts), len(words)]
    parts = [
        tensor_sum(words[start:end], first + start) for start, end in itertools.pairwise(edges)
    ]
    np.random.default_rng(seed).shuffle(parts)
    assert sum(parts) & MASK == tensor_sum(words, first)


@quickly
@given(dtypes, seeds, st.sampled_from([1, 2, 5, 40, 1000, 150_000]), st.integers(0, 3 * BLOCK))
def test_a_change_is_followed_as_if_all_were_summed_again(
    dtype: type[np.unsignedinteger], seed: int, num_changed: int, first: int
) -> None:
    """Over five blocks: a few elements leave whole blocks without one, many fill several rounds."""
    rng = np.random.default_rng(seed)
    old = random_words(seed, 5 * BLOCK - 77, dtype)
    indices = np.sort(rng.choice(len(old), num_changed, replace=False))
    new = old.copy()
    new[indices] = random_words(seed + 1, num_changed, dtype)
    change = sum_change(indices + first, old[indices], new[indices])
    assert (tensor_sum(old, first) + change) & MASK == tensor_sum(new, first)
    back = sum_change(indices + first, new[indices], old[indices])
    assert (change + back) & MASK == 0


@quickly
@given(dtypes, seeds, st.integers(0, 1 << 40), st.data())
def test_no_change_of_one_element_goes_unseen(
    dtype: type[np.unsignedinteger], seed: int, place: int, data: st.DataObject
) -> None:
    """Factors are odd, so a step that is not 0 modulo 2^64 stays so."""
    words = st.integers(0, int(np.iinfo(dtype).max))
    old, new = data.draw(words), data.draw(words)
    change = sum_change(np.array([place]), np.array([old], dtype), np.array([new], dtype))
    assert (change == 0) == (old == new)


@quickly
@given(dtypes, seeds, st.integers(0, 139_999), st.integers(0, 139_999))
def test_two_elements_that_trade_places_are_seen(
    dtype: type[np.unsignedinteger], seed: int, one: int, other: int
) -> None:
    words = random_words(seed, 140_000, dtype)
    swapped = words.copy()
    swapped[[one, other]] = words[[other, one]]
    assert (tensor_sum(swapped) == tensor_sum(words)) == (words[one] == words[other])


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 2), (0, 3)])
def test_blocks_that_trade_places_are_seen(one: int, other: int) -> None:
    words = random_words(0, 4 * BLOCK, np.uint16).reshape(4, BLOCK)
    order = np.arange(4)
    order[[one, other]] = other, one
    assert tensor_sum(words[order].reshape(-1)) != tensor_sum(words.reshape(-1))
    assert tensor_sum(np.roll(words.reshape(-1), 1)) != tensor_sum(words.reshape(-1))


def test_nothing_sums_to_zero_and_zeros_too() -> None:
    empty = np.empty(0, np.uint16)
    assert tensor_sum(empty, 12) == 0
    assert sum_change(np.empty(0, np.int64), empty, empty) == 0
    assert tensor_sum(np.zeros(70_000, np.uint16)) == 0


@pytest.mark.parametrize(
    ("dtype", "num_words", "word_type"),
    [
        (np.float64, 2, np.uint32),
        (np.int64, 2, np.uint32),
        (np.float32, 1, np.uint32),
        (np.float16, 1, np.uint16),
        (np.bool_, 1, np.uint8),
    ],
)
def test_words_are_views_of_the_bits(
    dtype: type[np.generic], num_words: int, word_type: type[np.generic]
) -> None:
    array = np.arange(12).astype(dtype).reshape(3, 4)
    words = as_words(array)
    assert words.dtype == word_type
    assert words.shape == (12 * num_words,)
    assert np.shares_memory(words, array)
    assert words.tobytes() == array.tobytes()


def test_an_element_of_eight_bytes_is_seen_whole() -> None:
    array = np.array([1.5, -2.25, np.pi])
    before = tensor_sum(as_words(array))
    for half in range(6):
        changed = array.copy()
        as_words(changed)[half] ^= 1
        assert tensor_sum(as_words(changed)) != before


def test_the_model_digest_does_not_depend_on_the_order_and_on_nothing_else() -> None:
    entries = [("b", "F32", (2, 3), b"12345678"), ("a", "F32", (6,), b"abcdefgh")]
    digest = combine_digests(entries)
    assert digest == combine_digests(entries[::-1])
    assert digest.startswith("sha256:")
    others = [
        [("c", "F32", (2, 3), b"12345678"), entries[1]],
        [("b", "BF16", (2, 3), b"12345678"), entries[1]],
        [("b", "F32", (3, 2), b"12345678"), entries[1]],
        [("b", "F32", (2, 3), b"12345679"), entries[1]],
        entries[:1],
    ]
    assert len({digest, *map(combine_digests, others)}) == 6


def test_a_model_keeps_its_digest_over_a_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_causal_lm(tiny_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + 1e-3)
    model.save_pretrained(tmp_path / "saved")
    again = load_causal_lm(tmp_path / "saved")
    assert model_digest(again) == model_digest(model) != model_digest(load_causal_lm(tiny_folder))
    with torch.no_grad():
        again.model.norm.weight[3] = torch.nextafter(
            again.model.norm.weight[3], torch.tensor(torch.inf)
        )
    assert model_digest(again) != model_digest(model)
    assert schema_digest(canonical_tensors(again)) == schema_digest(canonical_tensors(model))


def test_digests_stay_what_they_are() -> None:
    """Frozen: replicas and checkpoints of different releases compare their digests."""
    first, at_an_edge = GOLDEN_SUM_AT
    assert tensor_sum(GOLDEN_WORDS) == GOLDEN_SUM
    assert tensor_sum(GOLDEN_WORDS, first) == at_an_edge
    tensor = torch.tensor([[1.0, -0.0, 3.5], [torch.inf, 1e-3, -2.0]], dtype=torch.bfloat16)
    sums = digest_bytes(tensor_sum(tensor_words(tensor)))
    assert combine_digests([("norm.weight", "BF16", (2, 3), sums)]) == GOLDEN_MODEL
