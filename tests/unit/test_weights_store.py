"""The publisher's versions on disk: what it plans, keeps, and finds again after a crash."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kleash.rpc.errors import NotFound, PreconditionFailed, Unavailable
from kleash.weights.codec import Codec, apply_change, decode_delta, decode_full
from kleash.weights.digest import tensor_sum
from kleash.weights.encoder import Shadow, Shard, digest_of, encode_shards, merge
from kleash.weights.manifest import (
    FULL_CODECS,
    TensorShape,
    encoded_bytes,
    key_of,
    places,
    schema_digest,
)
from kleash.weights.store import Store, read_log
from kleash.weights.stored import Stored
from kleash.weights.v1 import weights_pb2

pytestmark = pytest.mark.unit

SCHEMA = {
    "layer.mask": TensorShape((70,), "BOOL"),
    "layer.weight": TensorShape((200, 40), "BF16"),
    "norm.weight": TensorShape((300,), "F32"),
    "scale": TensorShape((), "F32"),
}
SCHEMA_DIGEST = schema_digest(SCHEMA)
UNKNOWN = "sha256:unknown"

Words = dict[str, np.ndarray]


class Trainer:
    """Publishes random changes of a small model into a store."""

    def __init__(self, store: Store, seed: int = 0) -> None:
        self.store = store
        self.rng = np.random.default_rng(seed)
        self.words: Words = {
            name: self.rng.integers(0, np.iinfo(it.word_type).max, it.num_words, it.word_type)
            for name, it in SCHEMA.items()
        }
        self.shadow = Shadow.of(SCHEMA, self.shard)
        self.base = (0, self.shadow.digest)
        self.history = {self.shadow.digest: self.copy()}
        self.num_anchors = 0

    def shard(self, name: str) -> Shard:
        return Shard(self.words[name])

    def copy(self) -> Words:
        return {name: words.copy() for name, words in self.words.items()}

    def encode(self, fraction: float = 0.02, largest: int = 2) -> weights_pb2.Manifest:
        """Change a share of the elements, at least one, and store the version."""
        for words in self.words.values():
            is_changed = self.rng.random(len(words)) < fraction
            is_changed[self.rng.integers(len(words))] = True
            steps = self.rng.integers(1, largest + 1, len(words))
            words += (steps * is_changed).astype(words.dtype)
        made = encode_shards(SCHEMA, self.shadow, self.shard, self.store.folder)
        self.sums = made.sums
        manifest = self._put(made, self.base[0] + 1, self.base).manifest
        self.history[manifest.result_digest] = self.copy()
        return manifest

    def commit(self, manifest: weights_pb2.Manifest) -> weights_pb2.Manifest:
        self.store.commit(key_of(manifest))
        data = (self.store.folder / f"{manifest.manifest_hash.hex()}.object").read_bytes()
        self.shadow.advance(manifest, np.frombuffer(data, np.uint8), self.sums)
        self.base = (manifest.version, manifest.result_digest)
        return manifest

    def publish(self, *args: Any) -> weights_pb2.Manifest:
        return self.commit(self.encode(*args))

    def make_anchor(self, digest: str) -> Stored | None:
        if digest != self.base[1]:
            return None
        self.num_anchors += 1
        made = encode_shards(SCHEMA, None, self.shadow.shards.__getitem__, self.store.folder)
        return self._put(made, self.base[0], (0, ""))

    def _put(self, made: Any, version: int, base: tuple[int, str]) -> Stored:
        folder = self.store.folder
        key = {"run_id": "run", "fence": 1, "version": version}
        manifest, file = merge(SCHEMA, [made], folder, base=base, **key)
        return self.store.put(manifest, file)


def plan(store: Store, have: str, want: str = "") -> list[weights_pb2.Manifest]:
    return list(store.plan_update(have, SCHEMA_DIGEST, want).manifests)


def apply(store: Store, manifests: list[weights_pb2.Manifest], words: Words) -> str:
    """Do what a replica does with a plan; the digest of the words afterwards."""
    for manifest in manifests:
        data = b"".join(part.data for part in store.fetch(manifest.manifest_hash, 0))
        assert len(data) == encoded_bytes(manifest)
        for entry, part, offset in places(manifest):
            start, size, codec = part.first_element, part.num_elements, Codec(part.codec)
            target = words[entry.name][start : start + size]
            encoded = data[offset : offset + part.encoded_bytes]
            if codec in FULL_CODECS:
                target[:] = decode_full(codec, encoded, size, target.dtype)
            else:
                apply_change(target, decode_delta(codec, encoded, size, target.dtype))
        sums = {name: tensor_sum(its) for name, its in words.items()}
        assert digest_of(SCHEMA, sums) == manifest.result_digest
    return digest_of(SCHEMA, {name: tensor_sum(its) for name, its in words.items()})


def objects(store: Store) -> set[str]:
    """Manifest hashes of the files in the folder; every object has its manifest."""
    found = {path.stem for path in store.folder.glob("*.object")}
    assert found == {path.stem for path in store.folder.glob("*.manifest")}
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "weights")
    yield store
    store.close()


@pytest.fixture
def trainer(store: Store) -> Trainer:
    trainer = Trainer(store)
    store.make_anchor = trainer.make_anchor
    return trainer


def test_a_commit_makes_the_head_and_tells_the_listeners(store: Store, trainer: Trainer) -> None:
    heads: list[Any] = []
    store.listeners.add(lambda: heads.append(store.head))
    manifest = trainer.encode()
    assert store.head is None
    assert [it.is_committed for it in store.versions()] == [False]
    trainer.commit(manifest)
    assert heads == [key_of(manifest)] == [store.head]
    (version,) = store.versions()
    assert version.is_committed
    assert version.key == store.head
    assert (version.base_version, version.base_digest) == (0, manifest.base_digest)
    assert version.encoded_bytes == encoded_bytes(manifest)
    assert version.dense_bytes == 70 + 2 * 8000 + 4 * 301
    assert version.num_elements == 8371
    assert 4 <= version.num_changed < 400


def test_an_object_is_fetched_from_any_offset(store: Store, trainer: Trainer) -> None:
    manifest = trainer.publish()
    (path,) = store.folder.glob("*.object")
    whole = path.read_bytes()
    for offset in (0, 1, len(whole) - 1, len(whole)):
        parts = list(store.fetch(manifest.manifest_hash, offset))
        assert b"".join(part.data for part in parts) == whole[offset:]
        assert not parts or parts[0].offset == offset
    with pytest.raises(NotFound) as caught:
        next(store.fetch(b"other", 0))
    assert caught.value.reason == "UNKNOWN_OBJECT"


def test_nothing_to_do_and_a_chain_of_one(store: Store, trainer: Trainer) -> None:
    first = trainer.publish()
    answer = store.plan_update(first.result_digest, SCHEMA_DIGEST)
    assert answer.head == key_of(first)
    assert not answer.manifests
    assert plan(store, first.base_digest) == [first]
    second = trainer.publish()
    assert plan(store, first.result_digest) == [second]
    assert plan(store, first.base_digest, first.result_digest) == [first]
    assert trainer.num_anchors == 0


def test_several_versions_are_squashed_once(store: Store, trainer: Trainer) -> None:
    chain = [trainer.publish() for _ in range(4)]
    (one,) = plan(store, chain[0].base_digest)
    assert (one.base_version, one.version) == (0, 4)
    assert one.result_digest == chain[-1].result_digest
    assert encoded_bytes(one) < sum(map(encoded_bytes, chain))
    stored = objects(store)
    assert stored == {it.manifest_hash.hex() for it in [*chain, one]}
    assert plan(store, chain[0].base_digest) == [one]
    assert objects(store) == stored
    words = trainer.history[chain[0].base_digest]
    assert apply(store, [one], words) == chain[-1].result_digest
    # The next version is squashed with the squash; what ends before the head goes.
    last = trainer.publish()
    (longer,) = plan(store, chain[0].base_digest)
    assert longer.result_digest == last.result_digest
    assert one.manifest_hash.hex() not in objects(store)
    assert trainer.num_anchors == 0


def test_an_anchor_is_made_when_nothing_else_leads_there(store: Store, trainer: Trainer) -> None:
    trainer.publish()
    first = trainer.publish()
    (anchor,) = plan(store, UNKNOWN)
    assert not anchor.base_digest
    assert (anchor.version, anchor.result_digest) == (2, first.result_digest)
    trainer.publish()
    last = trainer.publish()
    again, rest = plan(store, UNKNOWN)
    assert again == anchor
    assert (rest.base_digest, rest.result_digest) == (first.result_digest, last.result_digest)
    assert trainer.num_anchors == 1
    assert plan(store, UNKNOWN) == [anchor, rest]
    zeros = {name: np.zeros_like(its) for name, its in trainer.words.items()}
    assert apply(store, [anchor, rest], zeros) == last.result_digest


def test_a_new_anchor_is_made_when_the_rest_exceeds_half(store: Store, trainer: Trainer) -> None:
    trainer.publish()
    (anchor,) = plan(store, UNKNOWN)
    trainer.publish(1.0, 20)
    assert plan(store, UNKNOWN)[0] == anchor
    last = trainer.publish(1.0, 60_000)
    assert encoded_bytes(last) > 0.5 * encoded_bytes(anchor)
    (newer,) = plan(store, UNKNOWN)
    assert (newer.base_digest, newer.version) == ("", 3)
    assert trainer.num_anchors == 2
    trainer.publish()
    assert plan(store, UNKNOWN)[0] == newer
    assert anchor.manifest_hash.hex() not in objects(store)


def test_what_cannot_be_planned_is_said(store: Store, trainer: Trainer) -> None:
    with pytest.raises(Unavailable) as unavailable:
        plan(store, UNKNOWN)
    assert unavailable.value.reason == "NO_VERSION"
    assert unavailable.value.retry_after_s
    manifest = trainer.publish()
    with pytest.raises(PreconditionFailed) as caught:
        store.plan_update(manifest.base_digest, "sha256:0")
    assert caught.value.reason == "SCHEMA_MISMATCH"
    assert caught.value.metadata == {"published": SCHEMA_DIGEST, "served": "sha256:0"}
    for have, want in [(UNKNOWN, "sha256:past"), (manifest.result_digest, "sha256:past")]:
        with pytest.raises(PreconditionFailed) as caught:
            plan(store, have, want)
        assert caught.value.reason == "NO_PLAN"
    store.make_anchor = lambda _: None
    with pytest.raises(PreconditionFailed) as caught:
        plan(store, UNKNOWN)
    assert caught.value.reason == "NO_PLAN"
    assert caught.value.metadata == {"have": UNKNOWN, "want": manifest.result_digest}


def test_pruning_keeps_the_newest_deltas_the_newest_anchor_and_the_head(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_versions=2)
    trainer = Trainer(store)
    store.make_anchor = trainer.make_anchor
    chain = [trainer.publish() for _ in range(3)]
    (anchor,) = plan(store, chain[0].base_digest)  # the first delta is gone
    (squash,) = plan(store, chain[0].result_digest)
    kept = [*chain[1:], anchor, squash]
    assert objects(store) == {it.manifest_hash.hex() for it in kept}
    chain += [trainer.publish(), trainer.publish()]
    assert objects(store) == {it.manifest_hash.hex() for it in [*chain[-2:], anchor]}
    assert [it.key.version for it in store.versions()] == [3, 4, 5]
    store.close()


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.sampled_from([(0.0, 1), (0.02, 3), (0.5, 200), (1.0, 60_000)]), min_size=1),
    st.integers(1, 6),
    st.data(),
)
def test_every_plan_gives_the_weights_that_it_promises(
    changes: list[tuple[float, int]], keep_versions: int, data: st.DataObject
) -> None:
    """Random histories, planned for now and then from anywhere: bit for bit the head's words."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(Store(Path(folder), keep_versions=keep_versions)) as store,
    ):
        trainer = Trainer(store, seed=len(changes))
        store.make_anchor = trainer.make_anchor
        for fraction, largest in changes[:10]:
            trainer.publish(fraction, largest)
            have = data.draw(st.sampled_from(["", UNKNOWN, *trainer.history]))
            if have:
                other = {name: words * 3 for name, words in trainer.words.items()}
                words = trainer.history.get(have, other)
                words = {name: its.copy() for name, its in words.items()}
                assert apply(store, plan(store, have), words) == trainer.base[1]
                assert all(np.array_equal(words[name], trainer.words[name]) for name in words)
        assert all(not path.name.startswith(".") for path in store.folder.iterdir())
        objects(store)


def test_an_uncommitted_version_is_discarded(store: Store, trainer: Trainer) -> None:
    kept, given_up = trainer.publish(), trainer.encode()
    store.record("given_up", key_of(given_up), why="too few replicas")
    store.discard(given_up.manifest_hash)
    store.discard(b"never stored")
    assert objects(store) == {kept.manifest_hash.hex()}
    with pytest.raises(NotFound):
        next(store.fetch(given_up.manifest_hash, 0))
    last = read_log(store.folder)[-1]
    assert (last["event"], last["version"], last["why"]) == ("given_up", 2, "too few replicas")
    assert last["manifest_hash"] == given_up.manifest_hash.hex()


def test_a_folder_is_read_again(store: Store, trainer: Trainer) -> None:
    first, second = trainer.publish(), trainer.publish()
    pending = trainer.encode()
    store.close()
    again = Store(store.folder)
    assert again.head is None
    for found, put in zip(again.versions(), store.versions(), strict=True):
        put.stored_at_s = found.stored_at_s  # now the file's
        assert found == put
    assert [it.is_committed for it in again.versions()] == [True, True, False]
    (squash,) = plan(again, first.base_digest, second.result_digest)
    words = trainer.history[first.base_digest]
    assert apply(again, [squash], words) == second.result_digest
    again.commit(key_of(pending))
    assert again.head == key_of(pending)
    again.close()
    events = [(row["event"], row["version"]) for row in read_log(store.folder)]
    assert events[:4] == [("stored", 1), ("committed", 1), ("stored", 2), ("committed", 2)]
    assert events[-1] == ("committed", 3)


def test_a_torn_last_line_of_the_log_is_ignored_and_written_over(
    store: Store, trainer: Trainer
) -> None:
    trainer.publish()
    store.close()
    log = store.folder / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + whole.splitlines()[-1][:50])
    assert len(read_log(store.folder)) == 2
    again = Store(store.folder)
    trainer.store = again
    trainer.publish()
    again.close()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["event"] for row in rows] == ["stored", "committed"] * 2
    again = Store(store.folder)
    assert [it.is_committed for it in again.versions()] == [True, True]
    again.close()


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "shorter object", "no object"])
def test_a_damaged_version_is_left_out(
    store: Store, trainer: Trainer, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    sound, damaged = trainer.publish(), trainer.publish()
    store.close()
    path = store.folder / f"{damaged.manifest_hash.hex()}.manifest"
    data = path.read_bytes()
    at = data.index(damaged.result_digest.encode()) + 20
    if damage.endswith("object"):
        file = path.with_suffix(".object")
        if damage == "no object":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1])
    else:
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        path.write_bytes({"cut": data[:-5], "flipped": flipped, "emptied": b""}[damage])
        caplog.set_level(logging.WARNING)
    again = Store(store.folder)
    assert [it.key.version for it in again.versions()] == [sound.version]
    if not damage.endswith("object"):
        assert f"{path} is not a manifest" in caplog.text
    again.close()


def test_what_a_killed_process_left_half_written_is_removed(store: Store, trainer: Trainer) -> None:
    manifest = trainer.publish()
    store.close()
    name = manifest.manifest_hash.hex()
    other = "ab" * 32
    for left in (".encode-x1", ".squash-x2", ".merge-x3", f".{other}.manifest", f"{other}.object"):
        (store.folder / left).write_bytes(b"half")
    (store.folder / "notes.txt").write_text("not the store's")
    again = Store(store.folder)
    names = {path.name for path in store.folder.iterdir()}
    assert names == {"log.jsonl", "notes.txt", f"{name}.manifest", f"{name}.object"}
    assert plan(again, manifest.base_digest, manifest.result_digest) == [manifest]
    again.close()
