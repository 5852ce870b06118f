"""What a replica accepts of a published version, and that every refusal leaves it as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kleash.lm.digest import canonical_tensors, model_digest
from kleash.lm.load import load_causal_lm
from kleash.policy.config import PolicyConfig, PolicyLimits
from kleash.policy.engine import Engine
from kleash.ppo.publish import build_manifest, cast_to_schema, chunks
from kleash.rpc.errors import (
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    PreconditionFailed,
    ServiceError,
)
from kleash.weights.v1 import weights_pb2

pytestmark = pytest.mark.unit

Chunks = list[weights_pb2.Chunk]


@pytest.fixture
def engine(tiny_folder: Path) -> Iterator[Engine]:
    limits = PolicyLimits(max_item_tokens=32)
    config = PolicyConfig(model=tiny_folder, max_running_sequences=2, limits=limits)
    engine = Engine.load(config)
    yield engine
    engine.loop.stop()


@pytest.fixture
def trained(tiny_folder: Path) -> Any:
    """The served model after some training."""
    model = load_causal_lm(tiny_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    return model


def version_of(
    model: Any, version: int = 1, *, fence: int = 1, run_id: str = "run"
) -> tuple[weights_pb2.Manifest, Chunks]:
    tensors = canonical_tensors(model)
    manifest = build_manifest(tensors, run_id=run_id, fence=fence, version=version)
    return manifest, list(chunks(tensors))


def small_chunks(whole: Chunks, size: int = 1000) -> Chunks:
    """Cut into pieces, so that tensors have several."""
    import xxhash

    return [
        weights_pb2.Chunk(
            tensor_index=chunk.tensor_index,
            offset=start,
            xxh3_64=xxhash.xxh3_64_intdigest(chunk.data[start : start + size]),
            data=chunk.data[start : start + size],
        )
        for chunk in whole
        for start in range(0, len(chunk.data), size)
    ]


def refused(
    engine: Engine, manifest: weights_pb2.Manifest, parts: Chunks, error: type[ServiceError]
) -> ServiceError:
    """Publish, expect ``error``, and see that the served weights are untouched."""
    served, live = engine.weights.get_weights(), model_digest(engine.frozen.model)
    with pytest.raises(error) as caught:
        engine.weights.publish(manifest, parts)
    after = engine.weights.get_weights()
    assert (after.run_id, after.version, after.digest) == (
        served.run_id,
        served.version,
        served.digest,
    )
    assert model_digest(engine.frozen.model) == live
    assert engine.loop.decoder.weights_version == served.version
    return caught.value


def test_a_version_replaces_every_tensor(engine: Engine, trained: Any) -> None:
    before = engine.weights.get_weights()
    assert (before.version, before.fence, before.run_id) == (0, 0, "")
    assert before.digest == model_digest(engine.frozen.model) != model_digest(trained)
    manifest, parts = version_of(trained, version=3, fence=2)
    response = engine.weights.publish(manifest, parts)
    assert model_digest(engine.frozen.model) == model_digest(trained) == response.digest
    assert (response.version, response.already_committed) == (3, False)
    assert response.received_bytes == sum(len(chunk.data) for chunk in parts)
    after = engine.weights.get_weights()
    assert (after.run_id, after.fence, after.version) == ("run", 2, 3)
    assert after.digest == response.digest
    assert after.schema_digest == before.schema_digest
    assert engine.requests.get_policy().model.revision == response.digest
    assert engine.requests.get_policy().weights_version == 3


def test_tied_tensors_travel_once_and_stay_tied(engine: Engine, trained: Any) -> None:
    manifest, parts = version_of(trained)
    assert "lm_head.weight" not in [entry.name for entry in manifest.tensors]
    engine.weights.publish(manifest, parts)
    served = engine.frozen.model
    assert served.lm_head.weight.data_ptr() == served.model.embed_tokens.weight.data_ptr()
    assert torch.equal(served.lm_head.weight, trained.lm_head.weight)


def test_order_of_chunks_and_repeats_do_not_matter(engine: Engine, trained: Any) -> None:
    manifest, parts = version_of(trained)
    parts = small_chunks(parts)
    response = engine.weights.publish(manifest, parts[::-1] + parts[5:8])
    assert model_digest(engine.frozen.model) == model_digest(trained)
    assert response.received_bytes == sum(entry.encoded_bytes for entry in manifest.tensors)


def test_a_committed_version_may_be_published_again(engine: Engine, trained: Any) -> None:
    manifest, parts = version_of(trained)
    engine.weights.publish(manifest, parts)
    again = engine.weights.publish(manifest, iter(()))
    assert again.already_committed
    assert (again.version, again.digest) == (1, manifest.result_digest)


def test_fence_and_version_are_ordered(engine: Engine, trained: Any, tiny_folder: Path) -> None:
    engine.weights.publish(*version_of(trained, 5, fence=3))
    fresh = load_causal_lm(tiny_folder)
    error = refused(engine, *version_of(fresh, 6, fence=2), PermissionDenied)
    assert error.reason == "STALE_FENCE"
    assert error.metadata == {"fence": "2", "seen": "3"}
    error = refused(engine, *version_of(fresh, 5, fence=3), PreconditionFailed)
    assert error.reason == "VERSION_CONFLICT"
    error = refused(engine, *version_of(trained, 5, fence=3, run_id="other"), PreconditionFailed)
    assert error.reason == "VERSION_CONFLICT"
    error = refused(engine, *version_of(fresh, 4, fence=3), PreconditionFailed)
    assert error.reason == "VERSION_NOT_NEWER"
    assert error.metadata == {"version": "4", "served": "5"}
    engine.weights.publish(*version_of(fresh, 2, fence=4))  # a resumed run goes back
    assert engine.weights.get_weights().version == 2
    assert model_digest(engine.frozen.model) == model_digest(fresh)


def test_a_fence_counts_from_its_manifest_on(engine: Engine, trained: Any) -> None:
    """A new trainer that fails to publish has still taken over from the old one."""
    manifest, parts = version_of(trained, fence=7)
    refused(engine, manifest, parts[:-1], InvalidRequest)
    assert engine.weights.get_weights().fence == 7
    refused(engine, *version_of(trained, fence=6), PermissionDenied)


def rename(manifest: weights_pb2.Manifest) -> None:
    manifest.tensors[0].name = "model.unknown"


def reshape(manifest: weights_pb2.Manifest) -> None:
    manifest.tensors[0].shape[0] += 1


def retype(manifest: weights_pb2.Manifest) -> None:
    manifest.tensors[0].dtype = "F16"


def drop(manifest: weights_pb2.Manifest) -> None:
    del manifest.tensors[-1]


def repeat(manifest: weights_pb2.Manifest) -> None:
    manifest.tensors.append(manifest.tensors[-1])


def lie(manifest: weights_pb2.Manifest) -> None:
    manifest.schema_digest = "sha256:0"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (rename, "'model.embed_tokens.weight' is missing"),
        (reshape, r"'model.embed_tokens.weight' is F32 \[\d+, 32\] and here F32"),
        (retype, r"'model.embed_tokens.weight' is F16 \[\d+, 32\] and here F32"),
        (drop, "'model.norm.weight' is missing"),
        (repeat, "the digest or the number of its tensors differs"),
        (lie, "the digest or the number of its tensors differs"),
    ],
)
def test_another_schema_is_refused(
    engine: Engine,
    trained: Any,
    spoil: Callable[[weights_pb2.Manifest], None],
    sentence: str,
) -> None:
    manifest, parts = version_of(trained)
    spoil(manifest)
    error = refused(engine, manifest, parts, PreconditionFailed)
    assert error.reason == "SCHEMA_MISMATCH"
    assert re.search(sentence, error.message)
    assert engine.weights.get_weights().fence == 0  # nothing was staged for it


def test_manifest_fields_are_checked(engine: Engine, trained: Any) -> None:
    manifest, parts = version_of(trained)
    manifest.tensors[2].codec = weights_pb2.CODEC_UNSPECIFIED
    error = refused(engine, manifest, parts, InvalidRequest)
    assert error.field == "manifest.tensors[2].codec"
    manifest, parts = version_of(trained)
    manifest.tensors[1].encoded_bytes -= 4
    error = refused(engine, manifest, parts, InvalidRequest)
    assert error.field == "manifest.tensors[1].encoded_bytes"
    manifest, parts = version_of(trained)
    manifest.tensors[1].xxh3_128 = bytes(16)
    error = refused(engine, manifest, parts, PreconditionFailed)
    assert (error.reason, error.metadata["layer"]) == ("DIGEST_MISMATCH", "model")


def test_a_flipped_bit_is_refused(engine: Engine, trained: Any) -> None:
    manifest, parts = version_of(trained)
    flipped = bytearray(parts[1].data)
    flipped[7] ^= 16
    parts[1].data = bytes(flipped)
    error = refused(engine, manifest, parts, PreconditionFailed)
    assert (error.reason, error.metadata["layer"]) == ("DIGEST_MISMATCH", "chunk")


def test_bytes_of_another_version_are_refused(
    engine: Engine, trained: Any, tiny_folder: Path
) -> None:
    """Sound chunks that do not belong to the manifest: the tensor's checksum sees it."""
    manifest, parts = version_of(trained)
    parts[3] = version_of(load_causal_lm(tiny_folder))[1][3]
    error = refused(engine, manifest, parts, PreconditionFailed)
    assert (error.reason, error.metadata["layer"]) == ("DIGEST_MISMATCH", "tensor")


def test_chunks_out_of_place_are_refused(engine: Engine, trained: Any) -> None:
    manifest, parts = version_of(trained)
    cut = small_chunks(parts)

    def moved(**changes: int) -> Chunks:
        changed = weights_pb2.Chunk()
        changed.CopyFrom(cut[1])
        for name, value in changes.items():
            setattr(changed, name, value)
        return [cut[0], changed, *cut[1:]]

    past_the_end = manifest.tensors[0].encoded_bytes - 999
    for spoiled, field in [
        (moved(tensor_index=len(manifest.tensors)), "chunk.tensor_index"),
        (moved(offset=past_the_end), "chunk.offset"),
        (moved(offset=999), "chunk.offset"),
        (moved(offset=1001), "chunk.offset"),
        ([weights_pb2.Chunk(), *cut], "chunk.offset"),
        (cut[:-1], "chunk"),
        ([], "chunk"),
    ]:
        assert refused(engine, manifest, spoiled, InvalidRequest).field == field
    engine.weights.publish(manifest, cut)
    assert model_digest(engine.frozen.model) == model_digest(trained)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused(
    engine: Engine, trained: Any, value: float
) -> None:
    with torch.no_grad():
        trained.model.norm.weight[3] = value
    error = refused(engine, *version_of(trained), PreconditionFailed)
    assert (error.reason, error.metadata["tensor"]) == ("NON_FINITE", "model.norm.weight")


def test_a_second_publish_waits_its_turn(engine: Engine, trained: Any) -> None:
    receiver = engine.weights
    manifest, parts = version_of(trained)
    staging = receiver.begin(manifest)
    assert staging is not None
    error = refused(engine, *version_of(trained, version=2), Overloaded)
    assert error.reason == "PUBLISH_IN_PROGRESS"
    assert error.retry_after_s
    for chunk in parts:
        receiver.add(staging, chunk)
    receiver.verify(staging)
    engine.loop.run(lambda: receiver.apply(staging)).result()
    receiver.finish(staging)
    assert receiver.publish(*version_of(trained, version=2)).version == 2


def test_a_new_trainer_does_not_wait_for_a_dead_one(
    engine: Engine, trained: Any, tiny_folder: Path
) -> None:
    receiver = engine.weights
    old, old_parts = version_of(load_causal_lm(tiny_folder), version=9, fence=1)
    staging = receiver.begin(old)
    assert staging is not None
    receiver.add(staging, old_parts[0])
    receiver.publish(*version_of(trained, version=2, fence=2))
    with pytest.raises(PermissionDenied, match="fence 2 has taken over"):
        receiver.add(staging, old_parts[1])
    with pytest.raises(PermissionDenied):
        engine.loop.run(lambda: receiver.apply(staging)).result()
    receiver.finish(staging)
    assert receiver.get_weights().version == 2
    assert model_digest(engine.frozen.model) == model_digest(trained)


def test_cast_finds_the_data_type_that_is_served(trained: Any) -> None:
    from kleash.lm.digest import schema_digest

    tensors = canonical_tensors(trained)
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    cast = cast_to_schema(tensors, schema_digest(halves))
    assert all(torch.equal(cast[name], halves[name]) for name in halves)
    same = cast_to_schema(tensors, schema_digest(tensors))
    assert all(same[name].data_ptr() == tensors[name].data_ptr() for name in tensors)
    with pytest.raises(PreconditionFailed, match="serve the checkpoint"):
        cast_to_schema(tensors, "sha256:0")
