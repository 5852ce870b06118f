"""What a replica does with a version, and that every refusal leaves it as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kleash.client.types import Prompt, Sampling
from kleash.lm.digest import canonical_tensors, model_digest
from kleash.lm.load import load_causal_lm
from kleash.policy.config import PolicyConfig, PolicyLimits
from kleash.policy.engine import Engine
from kleash.policy.local import LocalPolicy, LocalWeights
from kleash.policy.replica import QUARANTINED, SERVING, STAGED, wait_for_commit
from kleash.ppo.publish import Publisher, served_schema, words_of
from kleash.rpc.errors import (
    Cancelled,
    InternalError,
    Overloaded,
    PermissionDenied,
    PreconditionFailed,
    ServiceError,
    Unavailable,
)
from kleash.weights.encoder import Shadow, encode_shards, merge
from kleash.weights.manifest import key_of, manifest_hash, result_digest
from kleash.weights.store import Store
from kleash.weights.v1 import weights_pb2

pytestmark = pytest.mark.unit


@dataclass
class World:
    """One replica and the store of a publisher that encodes against what it serves."""

    engine: Engine
    store: Store
    shadow: Shadow
    base: tuple[int, str]

    @property
    def weights(self) -> Any:
        return self.engine.weights

    @property
    def model(self) -> Any:
        return self.engine.frozen.model

    def version(
        self,
        model: Any,
        version: int = 1,
        *,
        fence: int = 1,
        run_id: str = "run",
        is_anchor: bool = False,
    ) -> weights_pb2.Manifest:
        """Store ``model`` as a change of the first weights, or whole."""
        schema = self.shadow.schema
        shadow = None if is_anchor else self.shadow
        words = words_of(canonical_tensors(model), None)
        made = encode_shards(schema, shadow, words, self.store.folder)
        manifest, file = merge(
            schema,
            [made],
            self.store.folder,
            run_id=run_id,
            fence=fence,
            version=version,
            base=(0, "") if is_anchor else self.base,
        )
        self.store.put(manifest, file)
        return manifest

    def prepare(self, manifest: weights_pb2.Manifest, **fields: Any) -> Any:
        request = weights_pb2.PrepareRequest(key=key_of(manifest), manifest=manifest, **fields)
        return self.weights.prepare(request, [self.store])

    def commit(self, manifest: weights_pb2.Manifest) -> weights_pb2.CommitResponse:
        return LocalWeights(self.engine).commit(key_of(manifest))

    def put_in_place(self, manifest: weights_pb2.Manifest) -> weights_pb2.CommitResponse:
        self.prepare(manifest)
        return self.commit(manifest)

    def object_of(self, manifest: weights_pb2.Manifest) -> Path:
        return self.store.folder / f"{manifest.manifest_hash.hex()}.object"


@pytest.fixture
def world(tiny_folder: Path, tmp_path: Path) -> Iterator[World]:
    limits = PolicyLimits(max_item_tokens=32)
    config = PolicyConfig(model=tiny_folder, max_running_sequences=2, limits=limits)
    engine = Engine.load(config)
    tensors = canonical_tensors(load_causal_lm(tiny_folder))
    schema, _ = served_schema(tensors, engine.weights.get_weights().schema_digest)
    shadow = Shadow.of(schema, words_of(tensors, None))
    store = Store(tmp_path / "weights")
    yield World(engine, store, shadow, (0, shadow.digest))
    store.close()
    engine.close()


@pytest.fixture
def trained(tiny_folder: Path) -> Any:
    """The served model after a little training: some elements move, one tensor is new."""
    return moved(tiny_folder, 0)


def moved(folder: Path, seed: int) -> Any:
    model = load_causal_lm(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            is_moved = torch.rand(parameter.shape, generator=generator) < 0.1
            parameter.add_(is_moved * 0.125)
        model.model.norm.weight.copy_(torch.randn(model.model.norm.weight.shape))
    return model


def refused(world: World, act: Callable[[], Any], error: type[ServiceError]) -> ServiceError:
    """Expect ``error``, and see that the served weights are untouched and sound."""
    served, live = world.weights.get_weights(), model_digest(world.model)
    with pytest.raises(error) as caught:
        act()
    after = world.weights.get_weights()
    assert (after.run_id, after.version, after.digest) == (
        served.run_id,
        served.version,
        served.digest,
    )
    assert model_digest(world.model) == live
    assert world.engine.loop.decoder.weights_version == served.version
    world.weights.audit()
    return caught.value


@pytest.mark.parametrize("is_anchor", [False, True])
def test_a_version_replaces_what_changed(world: World, trained: Any, is_anchor: bool) -> None:
    before = world.weights.get_weights()
    assert (before.version, before.fence, before.run_id) == (0, 0, "")
    assert before.digest == world.base[1] == model_digest(world.model) != model_digest(trained)
    manifest = world.version(trained, 3, fence=2, is_anchor=is_anchor)
    assert world.prepare(manifest).state == STAGED
    assert model_digest(world.model) == before.digest  # prepared, not applied
    response = world.commit(manifest)
    assert model_digest(world.model) == model_digest(trained) == response.digest
    assert (response.version, response.already_committed) == (3, False)
    assert response.pause_ns > 0
    assert response.fetched_bytes == world.object_of(manifest).stat().st_size
    after = world.weights.get_weights()
    assert (after.run_id, after.fence, after.version) == ("run", 2, 3)
    assert after.served == key_of(manifest)
    assert after.schema_digest == before.schema_digest
    assert world.engine.requests.get_policy().model.revision == response.digest
    assert world.engine.requests.get_policy().weights_version == 3
    world.weights.audit()


def test_tied_tensors_travel_once_and_stay_tied(world: World, trained: Any) -> None:
    manifest = world.version(trained)
    assert "lm_head.weight" not in [entry.name for entry in manifest.tensors]
    world.put_in_place(manifest)
    assert world.model.lm_head.weight.data_ptr() == world.model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(world.model.lm_head.weight, trained.lm_head.weight)


def test_every_call_may_be_repeated(world: World, trained: Any) -> None:
    manifest = world.version(trained)
    assert [world.prepare(manifest).state for _ in range(2)] == [STAGED, STAGED]
    assert not world.commit(manifest).already_committed
    again = world.commit(manifest)
    assert (again.already_committed, again.version) == (True, 1)
    assert again.digest == manifest.result_digest
    assert world.prepare(manifest).state == SERVING
    assert world.weights.abort(key_of(manifest)).version == 1  # too late: it is served


def test_a_commit_needs_a_prepare(world: World, trained: Any) -> None:
    manifest = world.version(trained)
    error = refused(world, lambda: world.commit(manifest), PreconditionFailed)
    assert error.reason == "NOT_STAGED"
    world.prepare(manifest)
    assert world.weights.abort(key_of(manifest)).version == 0
    assert world.weights.get_weights().state == SERVING
    refused(world, lambda: world.commit(manifest), PreconditionFailed)


def test_fence_and_version_are_ordered(world: World, trained: Any, tiny_folder: Path) -> None:
    world.put_in_place(world.version(trained, 5, fence=3))
    world.base, fresh = world.base, load_causal_lm(tiny_folder)

    def refuse(version: int, fence: int, error: type[ServiceError], **fields: Any) -> ServiceError:
        manifest = world.version(fresh, version, fence=fence, is_anchor=True, **fields)
        return refused(world, lambda: world.prepare(manifest), error)

    error = refuse(6, 2, PermissionDenied)
    assert (error.reason, error.metadata) == ("STALE_FENCE", {"fence": "2", "seen": "3"})
    assert refuse(5, 3, PreconditionFailed).reason == "VERSION_CONFLICT"
    assert refuse(5, 3, PreconditionFailed, run_id="other").reason == "VERSION_CONFLICT"
    error = refuse(4, 3, PreconditionFailed)
    assert (error.reason, error.metadata) == ("VERSION_NOT_NEWER", {"version": "4", "served": "5"})
    world.put_in_place(world.version(fresh, 2, fence=4, is_anchor=True))  # a resumed run goes back
    assert world.weights.get_weights().version == 2
    assert model_digest(world.model) == model_digest(fresh)


def test_an_old_trainer_can_do_nothing(world: World, trained: Any) -> None:
    """A fence counts from its first call on, whatever becomes of that."""
    world.put_in_place(world.version(trained, 1, fence=1))
    manifest = world.version(trained, 9, fence=7)
    world.object_of(manifest).write_bytes(bytes(world.object_of(manifest).stat().st_size))
    refused(world, lambda: world.prepare(manifest), ServiceError)
    assert world.weights.get_weights().fence == 7
    old = key_of(world.version(trained, 1, fence=1))
    for act in (
        lambda: world.weights.begin_commit(old),
        lambda: world.weights.abort(old),
        lambda: world.weights.begin_rollback(old),
    ):
        assert refused(world, act, PermissionDenied).reason == "STALE_FENCE"


def test_a_wrong_base_is_refused(world: World, trained: Any, tiny_folder: Path) -> None:
    """Without a plan from there to here there is nothing that could be applied."""
    world.put_in_place(world.version(trained, 1, is_anchor=True))
    manifest = world.version(moved(tiny_folder, 5), 2)
    request = weights_pb2.PrepareRequest(key=key_of(manifest), manifest=manifest)
    assert refused(world, lambda: world.weights.prepare(request, []), Unavailable).reason == (
        "NO_SOURCE"
    )
    error = refused(world, lambda: world.prepare(manifest), PreconditionFailed)
    assert error.reason == "NO_PLAN"


def test_a_plan_leads_from_other_weights(world: World, trained: Any, tiny_folder: Path) -> None:
    """The replica serves something else: an anchor of the base, then the change."""
    other = moved(tiny_folder, 9)
    world.put_in_place(world.version(other, 1, is_anchor=True))
    base = world.version(load_causal_lm(tiny_folder), 1, fence=2, is_anchor=True)
    manifest = world.version(trained, 2, fence=2)
    assert base.result_digest == manifest.base_digest
    response = world.put_in_place(manifest)
    assert model_digest(world.model) == model_digest(trained) == response.digest
    world.weights.audit()
    LocalWeights(world.engine).rollback(key_of(manifest))  # over both steps at once
    assert model_digest(world.model) == model_digest(other)
    world.weights.audit()


def test_rollback_goes_back_by_one(world: World, trained: Any, tiny_folder: Path) -> None:
    first = world.weights.get_weights()
    manifest = world.version(trained)
    world.put_in_place(manifest)
    other = key_of(world.version(trained, 2))
    error = refused(world, lambda: world.weights.begin_rollback(other), PreconditionFailed)
    assert error.reason == "NOT_SERVED"
    response = LocalWeights(world.engine).rollback(key_of(manifest))
    assert (response.version, response.digest) == (0, first.digest)
    assert model_digest(world.model) == model_digest(load_causal_lm(tiny_folder)) == first.digest
    world.weights.audit()
    world.put_in_place(manifest)
    assert model_digest(world.model) == model_digest(trained)


def test_only_one_version_is_kept_behind(world: World, trained: Any) -> None:
    manifest = world.version(trained)
    world.put_in_place(manifest)
    weights = LocalWeights(world.engine)
    weights.rollback(key_of(manifest))
    world.put_in_place(manifest)
    weights.rollback(key_of(manifest))
    error = refused(world, lambda: weights.rollback(key_of(manifest)), PreconditionFailed)
    assert error.reason == "NOT_SERVED"


@pytest.mark.parametrize("is_anchor", [False, True])
def test_damaged_bytes_are_refused(world: World, trained: Any, is_anchor: bool) -> None:
    """Sound chunks of an object that is not the manifest's: the part's hash sees it."""
    manifest = world.version(trained, is_anchor=is_anchor)
    data = bytearray(world.object_of(manifest).read_bytes())
    whole = bytes(data)
    data[len(data) // 2] ^= 4
    world.object_of(manifest).write_bytes(data)
    error = refused(world, lambda: world.prepare(manifest), PreconditionFailed)
    assert (error.reason, error.metadata["layer"]) == ("DIGEST_MISMATCH", "part")
    world.object_of(manifest).write_bytes(whole)
    world.put_in_place(manifest)  # what was damaged was not kept
    assert model_digest(world.model) == model_digest(trained)


def test_a_promise_that_is_not_kept_is_refused(world: World, trained: Any) -> None:
    """The bytes are those of the manifest, and lead to other weights than it says."""
    manifest = world.version(trained)
    data = world.object_of(manifest).read_bytes()
    entry = manifest.tensors[1]
    entry.digest = bytes(8)
    manifest.result_digest = ""
    manifest.result_digest = result_digest(manifest)
    manifest.manifest_hash = manifest_hash(manifest)
    file = world.store.folder / "lie"
    file.write_bytes(data)
    world.store.put(manifest, file)
    error = refused(world, lambda: world.prepare(manifest), PreconditionFailed)
    assert (error.reason, error.metadata) == (
        "DIGEST_MISMATCH",
        {"layer": "tensor", "tensor": entry.name},
    )


@pytest.mark.parametrize("is_anchor", [False, True])
@pytest.mark.parametrize("where", [0.1, 0.5, 0.97])
def test_damage_after_the_check_is_undone_in_place(
    world: World, trained: Any, where: float, is_anchor: bool
) -> None:
    """A disk that rots between Prepare and Commit: the old weights are back, bit for bit."""
    manifest = world.version(trained, is_anchor=is_anchor)
    world.prepare(manifest)
    spooled = next(
        path for path in world.weights.spool.folder.iterdir()
        if path.stat().st_size == world.object_of(manifest).stat().st_size
    )  # fmt: skip
    with spooled.open("r+b") as file:
        file.seek(int(spooled.stat().st_size * where))
        old = file.read(64)
        file.seek(int(spooled.stat().st_size * where))
        file.write(bytes(byte ^ 0x5A for byte in old))
    error = refused(world, lambda: world.commit(manifest), PreconditionFailed)
    assert error.reason == "DIGEST_MISMATCH"
    assert world.weights.get_weights().state == SERVING
    world.put_in_place(manifest)
    assert model_digest(world.model) == model_digest(trained)


def test_weights_that_cannot_be_restored_are_quarantined(
    world: World, trained: Any, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    """Memory that changed behind our back: nothing is generated until all weights came again."""
    manifest = world.version(trained)
    world.prepare(manifest)
    apply = type(world.weights._live)._change

    def broken(self: Any, name: str, part: Any, data: np.ndarray, *, undo: bool) -> int:
        if undo:
            raise MemoryError("the undo fails")
        return apply(self, name, part, data, undo=undo) ^ 1

    with monkeypatch.context() as patch:
        patch.setattr(type(world.weights._live), "_change", broken)
        with pytest.raises(InternalError, match="refuses to generate") as caught:
            world.commit(manifest)
    assert caught.value.reason == "QUARANTINED"
    assert world.weights.get_weights().state == QUARANTINED
    assert not world.weights.is_ready()
    policy = LocalPolicy(world.engine)
    prompt = Prompt("p", np.array([5, 6], np.int32))
    with pytest.raises(Unavailable) as refusal:
        list(policy.generate([prompt], Sampling(0, 2)))
    assert refusal.value.reason == "QUARANTINED"
    world.version(load_causal_lm(tiny_folder), 0, is_anchor=True)
    world.put_in_place(world.version(trained, 2))  # the plan begins with the anchor
    assert model_digest(world.model) == model_digest(trained)
    world.weights.audit()
    assert world.weights.is_ready()
    assert len(list(policy.generate([prompt], Sampling(0, 2)))) == 1


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("is_anchor", [False, True])
def test_weights_that_are_not_finite_are_refused(
    world: World, trained: Any, value: float, is_anchor: bool
) -> None:
    with torch.no_grad():
        trained.model.layers[0].mlp.up_proj.weight[3, 1] = value
    manifest = world.version(trained, is_anchor=is_anchor)
    error = refused(world, lambda: world.prepare(manifest), PreconditionFailed)
    assert error.reason == "NON_FINITE"
    assert error.metadata["tensor"] == "model.layers.0.mlp.up_proj.weight"


class _Gate:
    """A store whose Fetch waits: a slow network."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.address = store.address
        self.is_entered, self.may_go_on = threading.Event(), threading.Event()
        self.plan_update = store.plan_update

    def fetch(self, object_id: bytes, offset: int) -> Iterator[weights_pb2.FetchResponse]:
        self.is_entered.set()
        assert self.may_go_on.wait(20)
        yield from self._store.fetch(object_id, offset)


def start_slow_prepare(
    world: World, manifest: weights_pb2.Manifest
) -> tuple[_Gate, threading.Thread, list[Any]]:
    gate, outcome = _Gate(world.store), []
    request = weights_pb2.PrepareRequest(key=key_of(manifest), manifest=manifest)

    def work() -> None:
        try:
            outcome.append(world.weights.prepare(request, [gate]))
        except ServiceError as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert gate.is_entered.wait(20)
    return gate, thread, outcome


def test_the_same_version_is_fetched_once(world: World, trained: Any) -> None:
    manifest = world.version(trained)
    gate, thread, outcome = start_slow_prepare(world, manifest)
    second: list[Any] = []
    joined = threading.Thread(target=lambda: second.append(world.prepare(manifest)))
    joined.start()
    gate.may_go_on.set()
    thread.join()
    joined.join()
    assert [its.state for its in (*outcome, *second)] == [STAGED, STAGED]


def test_an_older_version_waits_and_a_newer_one_takes_over(world: World, trained: Any) -> None:
    old, new = world.version(trained, 2), world.version(trained, 3)
    gate, thread, outcome = start_slow_prepare(world, old)
    older = world.version(trained, 1)
    error = refused(world, lambda: world.prepare(older), Overloaded)
    assert (error.reason, error.retry_after_s) == ("PUBLISH_IN_PROGRESS", 1.0)
    assert world.put_in_place(new).version == 3
    gate.may_go_on.set()
    thread.join()
    assert isinstance(outcome[0], Cancelled)
    assert world.weights.get_weights().version == 3


def test_a_new_trainer_does_not_wait_for_a_dead_one(world: World, trained: Any) -> None:
    gate, thread, outcome = start_slow_prepare(world, world.version(trained, 9))
    assert world.put_in_place(world.version(trained, 1, fence=2)).version == 1
    gate.may_go_on.set()
    thread.join()
    assert isinstance(outcome[0], Cancelled)
    assert model_digest(world.model) == model_digest(trained)


def test_abort_ends_a_preparation(world: World, trained: Any) -> None:
    manifest = world.version(trained)
    gate, thread, outcome = start_slow_prepare(world, manifest)
    world.weights.abort(key_of(manifest))
    gate.may_go_on.set()
    thread.join()
    assert isinstance(outcome[0], Cancelled)
    assert world.weights.get_weights().state == SERVING


def test_an_older_version_does_not_displace_a_staged_one(world: World, trained: Any) -> None:
    """A replica that catches up to the head while the next version waits for its commit."""
    older, newer = world.version(trained, 5), world.version(trained, 6)
    world.prepare(newer)
    error = refused(world, lambda: world.prepare(older), Overloaded)
    assert error.reason == "PUBLISH_IN_PROGRESS"
    assert world.commit(newer).version == 6


def test_a_commit_that_gave_way_is_answered(world: World, trained: Any) -> None:
    """Aborted while it waits for running responses to end."""
    manifest = world.version(trained)
    world.prepare(manifest)
    policy = LocalPolicy(world.engine)
    gate = threading.Event()
    handle = world.model.lm_head.register_forward_pre_hook(lambda *_: gate.wait(20) and None)
    prompt = Prompt("p", np.array([5, 6], np.int32))
    sampling = Sampling(0, 20, stop_token_ids=(0,))
    reader = threading.Thread(target=lambda: list(policy.generate([prompt], sampling)))
    reader.start()
    commit = world.weights.begin_commit(key_of(manifest), "drain")
    assert commit is not None
    world.weights.abort(key_of(manifest))
    with pytest.raises(Cancelled, match="given up"):
        wait_for_commit(commit, key_of(manifest))
    gate.set()
    handle.remove()
    reader.join()
    assert world.weights.get_weights().version == 0


def test_a_rollback_drops_what_was_staged_on_it(
    world: World, trained: Any, tiny_folder: Path
) -> None:
    """An anchor that was prepared on top of a version would restore that version's words."""
    first = world.version(trained, 1)
    world.put_in_place(first)
    second = world.version(moved(tiny_folder, 4), 2, is_anchor=True)
    world.prepare(second)
    LocalWeights(world.engine).rollback(key_of(first))
    error = refused(world, lambda: world.commit(second), PreconditionFailed)
    assert error.reason == "NOT_STAGED"
    world.put_in_place(second)
    LocalWeights(world.engine).rollback(key_of(second))
    assert model_digest(world.model) == world.base[1]
    world.weights.audit()


def test_given_up_versions_leave_no_files(world: World, trained: Any, tiny_folder: Path) -> None:
    for version in range(1, 4):
        manifest = world.version(moved(tiny_folder, version), version, is_anchor=True)
        gate, thread, _ = start_slow_prepare(world, manifest)
        world.weights.abort(key_of(manifest))
        gate.may_go_on.set()
        thread.join()
    last = world.version(trained, 9, is_anchor=True)
    world.put_in_place(last)
    sizes = sorted(path.stat().st_size for path in world.weights.spool.folder.iterdir())
    dense = sum(tensor.nbytes for tensor in canonical_tensors(world.model).values())
    assert sizes == sorted([world.object_of(last).stat().st_size, dense])


def test_what_an_older_trainer_required_does_not_count(world: World, trained: Any) -> None:
    world.prepare(world.version(trained, 12), required_version=12)
    manifest = world.version(trained, 10, fence=2)
    world.put_in_place(manifest)
    assert world.weights.get_weights().required_version == 0
    assert world.weights.is_ready()


def test_readiness_follows_the_required_version(world: World, trained: Any) -> None:
    assert world.weights.is_ready()
    manifest = world.version(trained, 4)
    world.prepare(manifest, required_version=4)
    assert not world.weights.is_ready()
    assert world.weights.get_weights().required_version == 4
    world.commit(manifest)
    assert world.weights.is_ready()
    world.weights.require(weights_pb2.VersionKey(fence=1, version=5))
    assert not world.weights.is_ready()
    world.weights.require(weights_pb2.VersionKey(fence=0, version=1))  # of an older trainer
    assert not world.weights.is_ready()


def test_no_second_copy_stays_in_memory(world: World, trained: Any) -> None:
    """Between versions a replica holds its model and files, not arrays."""
    world.put_in_place(world.version(trained))
    held = [value for value in vars(world.weights._live).values() if isinstance(value, np.ndarray)]
    assert held == []


def test_the_publisher_publishes_in_process(
    world: World, trained: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """Deltas after the first version, which is empty; the shadow follows the commits alone."""
    store = Store(tmp_path / "published")
    publisher = Publisher({0: LocalWeights(world.engine)}, store, run_id="run", fence=1)
    first = publisher.publish(load_causal_lm(tiny_folder), 1)
    assert (first.version, first.bytes, first.changed_fraction) == (1, 0, 0.0)
    second = publisher.publish(trained, 2)
    assert 0 < second.bytes < second.dense_bytes
    assert 0 < second.changed_fraction < 1
    assert second.digest == model_digest(trained) == model_digest(world.model)
    again = publisher.publish(trained, 2)
    assert (again.version, again.digest, again.bytes) == (2, second.digest, 0)
    store.close()
