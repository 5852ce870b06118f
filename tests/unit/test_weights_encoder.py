"""Versions from the shadow: whole, as a change, from several ranks; and what a manifest must be."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kleash.rpc.errors import InvalidRequest, PreconditionFailed, ServiceError
from kleash.weights.codec import Codec
from kleash.weights.digest import tensor_sum
from kleash.weights.encoder import Shadow, Shard, digest_of, encode_shards, merge
from kleash.weights.manifest import (
    FULL_CODECS,
    TensorShape,
    check_manifest,
    encoded_bytes,
    manifest_hash,
    num_changed,
    places,
    schema_digest,
)
from kleash.weights.v1 import weights_pb2

pytestmark = pytest.mark.unit

SCHEMA = {
    "embed.weight": TensorShape((300, 10), "BF16"),
    "head.bias": TensorShape((7,), "F64"),
    "nil.weight": TensorShape((0, 4), "F32"),
    "norm.mask": TensorShape((90,), "BOOL"),
    "norm.weight": TensorShape((40, 50), "F32"),
    "scale": TensorShape((), "F32"),
}
SCHEMA_DIGEST = schema_digest(SCHEMA)

Words = dict[str, np.ndarray]
Spoil = Callable[[weights_pb2.Manifest], None]


def random_words(seed: int) -> Words:
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, np.iinfo(it.word_type).max, it.num_words, it.word_type)
        for name, it in SCHEMA.items()
    }


def changed(words: Words, seed: int, fraction: float = 0.05) -> Words:
    rng = np.random.default_rng(seed)
    return {
        name: its + (rng.random(len(its)) < fraction).astype(its.dtype)
        for name, its in words.items()
    }


def shards_of(words: Words) -> Callable[[str], Shard]:
    return lambda name: Shard(words[name])


def version_of(
    folder: Path, new: Words, old: Words | None, version: int = 1
) -> tuple[weights_pb2.Manifest, Path, dict[str, int]]:
    """Manifest, object and sums of ``new`` as a change of ``old``, or as an anchor."""
    shadow = None if old is None else Shadow.of(SCHEMA, shards_of(old))
    made = encode_shards(SCHEMA, shadow, shards_of(new), folder)
    base = (version - 1, shadow.digest) if shadow else (0, "")
    return *merged([made], folder, base, version), made.sums


def merged(
    ranks: Sequence[Any], folder: Path, base: tuple[int, str], version: int = 1
) -> tuple[weights_pb2.Manifest, Path]:
    return merge(SCHEMA, ranks, folder, run_id="run", fence=1, version=version, base=base)


def digest(words: Words) -> str:
    return digest_of(SCHEMA, {name: tensor_sum(its) for name, its in words.items()})


def same(shadow: Shadow, words: Words) -> bool:
    return all(np.array_equal(shadow.shards[name].words, words[name]) for name in SCHEMA)


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 1000 words, so that small tensors have several."""
    monkeypatch.setattr("kleash.weights.encoder.PART_WORDS", 1000)


# ---------------------------------------------------------------------------------------- encoding


def test_the_shadow_becomes_the_version(tmp_path: Path, many_parts: None) -> None:
    words = random_words(0)
    shadow = Shadow.of(SCHEMA, shards_of(words))
    assert shadow.num_bytes == 2 * 3000 + 8 * 7 + 90 + 4 * 2000 + 4
    old = words
    for version, fraction in enumerate((0.02, 0.3, 1.0), 1):
        new = changed(old, seed=version, fraction=fraction)
        base = shadow.digest
        assert base == digest(old)
        made = encode_shards(SCHEMA, shadow, shards_of(new), tmp_path)
        manifest, file = merged([made], tmp_path, (version - 1, base), version)
        assert same(shadow, old)  # nothing moves before the commit
        check_manifest(manifest, SCHEMA, SCHEMA_DIGEST)
        assert manifest.result_digest == digest(new) != base
        assert (manifest.base_version, manifest.base_digest) == (version - 1, base)
        assert file.stat().st_size == encoded_bytes(manifest)
        shadow.advance(manifest, np.fromfile(file, np.uint8), made.sums)
        assert same(shadow, new)
        assert shadow.digest == manifest.result_digest
        old = new
    assert same(Shadow.of(SCHEMA, shards_of(words)), random_words(0))  # a copy, not the weights


def test_the_manifest_counts_what_changes(tmp_path: Path, many_parts: None) -> None:
    old = random_words(0)
    new = {name: its.copy() for name, its in old.items()}
    new["embed.weight"][[5, 2999]] += 1
    new["scale"] += 1
    manifest, _, _ = version_of(tmp_path, new, old)
    parts = {entry.name: list(entry.parts) for entry in manifest.tensors}
    assert list(parts) == sorted(SCHEMA)
    assert [(it.first_element, it.num_elements) for it in parts["embed.weight"]] == [
        (0, 1000),
        (2000, 1000),
    ]
    assert [len(parts[name]) for name in SCHEMA] == [2, 0, 0, 0, 0, 1]
    assert num_changed(manifest) == 3
    first, second, third = places(manifest)
    assert first.offset == 0
    assert second.offset == first.part.encoded_bytes
    assert third.offset == second.offset + second.part.encoded_bytes


def test_weights_that_did_not_change_have_no_parts(tmp_path: Path) -> None:
    words = random_words(0)
    manifest, file, _ = version_of(tmp_path, words, words)
    assert not list(places(manifest))
    assert manifest.base_digest == manifest.result_digest == digest(words)
    assert file.stat().st_size == encoded_bytes(manifest) == num_changed(manifest) == 0
    check_manifest(manifest, SCHEMA, SCHEMA_DIGEST)


def test_an_anchor_holds_everything(tmp_path: Path, many_parts: None) -> None:
    words = random_words(0)
    manifest, file, sums = version_of(tmp_path, words, None)
    check_manifest(manifest, SCHEMA, SCHEMA_DIGEST)
    assert {part.codec for _, part, _ in places(manifest)} <= set(map(int, FULL_CODECS))
    assert num_changed(manifest) == sum(shape.num_words for shape in SCHEMA.values())
    assert manifest.result_digest == digest(words)
    other = Shadow.of(SCHEMA, shards_of(random_words(1)))
    other.advance(manifest, np.fromfile(file, np.uint8), sums)
    assert same(other, words)


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def fails(name: str) -> Shard:
        if name == "norm.weight":
            raise RuntimeError("the device is gone")
        return Shard(random_words(0)[name])

    with pytest.raises(RuntimeError):
        encode_shards(SCHEMA, None, fails, tmp_path)
    assert not list(tmp_path.iterdir())


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(st.integers(1, 1 << 20), st.sampled_from([0.0, 0.01, 0.5]), st.booleans(), st.data())
def test_ranks_that_hold_any_flat_ranges_make_the_same_version(
    seed: int, fraction: float, is_anchor: bool, data: st.DataObject
) -> None:
    """Three ranks, every tensor cut at any two places; a rank may hold nothing of one."""
    old = random_words(seed)
    new = changed(old, seed + 1, fraction)
    edges = {}
    for name, shape in SCHEMA.items():
        cut = st.integers(0, shape.num_words)
        edges[name] = [0, *sorted((data.draw(cut), data.draw(cut))), shape.num_words]

    def shards(words: Words, rank: int) -> Callable[[str], Shard]:
        ranges = {name: list(pairwise(its))[rank] for name, its in edges.items()}
        return lambda name: Shard(words[name][slice(*ranges[name])], ranges[name][0])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shadows = [Shadow.of(SCHEMA, shards(old, rank)) for rank in range(3)]
        ranks = [
            encode_shards(SCHEMA, None if is_anchor else its, shards(new, rank), folder)
            for rank, its in enumerate(shadows)
        ]
        base = (0, "") if is_anchor else (0, digest(old))
        manifest, file = merged(data.draw(st.permutations(ranks)), folder, base)
        assert list(folder.iterdir()) == [file]
        check_manifest(manifest, SCHEMA, SCHEMA_DIGEST)
        single, _, sums = version_of(folder, new, None if is_anchor else old)
        assert manifest.result_digest == single.result_digest == digest(new)
        content = np.fromfile(file, np.uint8)
        whole = Shadow.of(SCHEMA, shards_of(random_words(0) if is_anchor else old))
        whole.advance(manifest, content, sums)
        assert same(whole, new)
        for rank, shadow in enumerate(shadows):  # of all parts each rank takes its own
            shadow.advance(manifest, content, ranks[rank].sums)
            for tensor in SCHEMA:
                share = shards(new, rank)(tensor).words
                assert np.array_equal(shadow.shards[tensor].words, share)


# --------------------------------------------------------------------------------------- manifests


def refused(
    manifest: weights_pb2.Manifest, error: type[ServiceError], *, hash_again: bool = True
) -> ServiceError:
    if hash_again:
        manifest.manifest_hash = manifest_hash(manifest)
    with pytest.raises(error) as caught:
        check_manifest(manifest, SCHEMA, SCHEMA_DIGEST)
    return caught.value


def rename(manifest: weights_pb2.Manifest) -> None:
    manifest.tensors[0].name = "embed.unknown"


def reshape(manifest: weights_pb2.Manifest) -> None:
    manifest.tensors[0].shape[0] += 1


def transpose(manifest: weights_pb2.Manifest) -> None:
    manifest.tensors[4].shape[:] = [50, 40]


def retype(manifest: weights_pb2.Manifest) -> None:
    manifest.tensors[0].dtype = "F16"


def drop(manifest: weights_pb2.Manifest) -> None:
    del manifest.tensors[-1]


def add(manifest: weights_pb2.Manifest) -> None:
    manifest.tensors.add(name="zero", dtype="F32")


def repeat(manifest: weights_pb2.Manifest) -> None:
    manifest.tensors.append(manifest.tensors[-1])


def lie(manifest: weights_pb2.Manifest) -> None:
    manifest.schema_digest = "sha256:0"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (rename, "'embed.unknown' is not in it"),
        (reshape, r"'embed.weight' is BF16 \[301, 10\] and here BF16 \[300, 10\]"),
        (transpose, r"'norm.weight' is F32 \[50, 40\] and here F32 \[40, 50\]"),
        (retype, r"'embed.weight' is F16 \[300, 10\] and here BF16 \[300, 10\]"),
        (drop, "'scale' is missing"),
        (add, "'zero' is not in it"),
        (repeat, "the digest or the number of its tensors differs"),
        (lie, "the digest or the number of its tensors differs"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, spoil: Spoil, sentence: str) -> None:
    manifest, _, _ = version_of(tmp_path, random_words(0), None)
    spoil(manifest)
    error = refused(manifest, PreconditionFailed)
    assert error.reason == "SCHEMA_MISMATCH"
    assert re.search(sentence, error.message)
    assert error.metadata == {"published": manifest.schema_digest, "served": SCHEMA_DIGEST}


def test_an_unknown_data_type_is_refused(tmp_path: Path) -> None:
    manifest, _, _ = version_of(tmp_path, random_words(0), None)
    manifest.tensors[3].dtype = "F8_E4M3"
    assert refused(manifest, InvalidRequest).field == "manifest.tensors[3].dtype"


@pytest.mark.parametrize(
    "field", ["run_id", "fence", "version", "base_version", "base_digest", "manifest_hash"]
)
def test_a_manifest_without_its_hash_is_refused(tmp_path: Path, field: str) -> None:
    old = random_words(0)
    manifest, _, _ = version_of(tmp_path, changed(old, 1), old)
    value = getattr(manifest, field)
    other = value + (1 if isinstance(value, int) else "x" if isinstance(value, str) else b"x")
    setattr(manifest, field, other)
    error = refused(manifest, PreconditionFailed, hash_again=False)
    assert (error.reason, error.field) == ("DIGEST_MISMATCH", "manifest.manifest_hash")
    assert error.metadata["layer"] == "manifest"


def test_every_field_of_a_part_is_hashed(tmp_path: Path) -> None:
    manifest, _, _ = version_of(tmp_path, random_words(0), None)
    hashes = {manifest.manifest_hash}
    fields = ("first_element", "num_elements", "codec", "encoded_bytes", "num_changed")
    for field in fields:
        part = manifest.tensors[0].parts[0]
        setattr(part, field, getattr(part, field) + 1)
        hashes.add(manifest_hash(manifest))
    manifest.tensors[0].parts[0].xxh3_128 = bytes(16)
    hashes.add(manifest_hash(manifest))
    assert len(hashes) == len(fields) + 2


def test_a_result_that_the_tensors_do_not_make_is_refused(tmp_path: Path) -> None:
    for spoil in (0, 1):
        manifest, _, _ = version_of(tmp_path, random_words(0), None)
        if spoil:
            manifest.tensors[1].digest = bytes(8)
        else:
            manifest.result_digest = "sha256:0"
        error = refused(manifest, PreconditionFailed)
        assert (error.reason, error.field) == ("DIGEST_MISMATCH", "manifest.result_digest")
        assert error.metadata["layer"] == "model"


PARTS: list[tuple[bool, dict[str, int], int, str]] = [
    # Whether it is an anchor; fields of a part of tensor 0 and its number; the field at fault.
    (True, {"codec": 0}, 1, "parts[1].codec"),
    (False, {"codec": 9}, 0, "parts[0].codec"),
    (True, {"codec": Codec.SPARSE_DELTA}, 2, "parts[2].codec"),
    (True, {"codec": Codec.DENSE_DELTA}, 0, "parts[0].codec"),
    (True, {"codec": Codec.FULL, "encoded_bytes": 1999}, 1, "parts[1].encoded_bytes"),
    (False, {"codec": Codec.FULL, "encoded_bytes": 1 << 50}, 1, "parts[1].encoded_bytes"),
    (False, {"first_element": 999}, 1, "parts[1].first_element"),
    (False, {"first_element": 0}, 2, "parts[2].first_element"),
    (False, {"num_elements": 0}, 1, "parts[1].first_element"),
    (False, {"num_elements": 1001}, 0, "parts[1].first_element"),
    (False, {"first_element": 2001}, 2, "parts"),
    (False, {"num_elements": 1 << 63}, 2, "parts"),
    (True, {"first_element": 2001, "num_elements": 999, "encoded_bytes": 1998}, 2, "parts"),
]


@pytest.mark.parametrize(("is_anchor", "fields", "number", "at_fault"), PARTS)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path,
    many_parts: None,
    is_anchor: bool,
    fields: dict[str, int],
    number: int,
    at_fault: str,
) -> None:
    old = random_words(0)
    manifest, _, _ = version_of(tmp_path, changed(old, 1), None if is_anchor else old)
    assert len(manifest.tensors[0].parts) == 3
    for name, value in fields.items():
        setattr(manifest.tensors[0].parts[number], name, value)
    assert refused(manifest, InvalidRequest).field == f"manifest.tensors[0].{at_fault}"


def test_a_tensor_that_an_anchor_leaves_out_is_refused(tmp_path: Path) -> None:
    manifest, _, _ = version_of(tmp_path, random_words(0), None)
    del manifest.tensors[1].parts[:]
    error = refused(manifest, InvalidRequest)
    assert error.field == "manifest.tensors[1].parts"
    assert "hold 0 of its 14 elements" in error.message
