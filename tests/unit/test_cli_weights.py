"""``kleash weights`` on folders: what it prints, and which damage it names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from kleash.cli.main import main
from kleash.cli.weights_text import human_bytes
from kleash.weights.encoder import Shadow, Shard, encode_shards, merge
from kleash.weights.manifest import (
    TensorShape,
    encoded_bytes,
    key_of,
    manifest_hash,
    num_changed,
    schema_digest,
)
from kleash.weights.store import Store
from kleash.weights.stored import Stored
from kleash.weights.v1 import weights_pb2

pytestmark = pytest.mark.unit

SCHEMA = {
    "embedding": TensorShape((300, 40), "BF16"),
    "layer.weight": TensorShape((60, 40), "F32"),
    **{f"norm.{number:02d}": TensorShape((16,), "BF16") for number in range(21)},
    "scale": TensorShape((), "F32"),
}
DENSE_BYTES = sum(shape.num_bytes for shape in SCHEMA.values())


class Trainer:
    """Publishes random changes of a small model into RUN/weights."""

    def __init__(self, run: Path, **settings: Any) -> None:
        self.store = Store(run / "weights", make_anchor=self.make_anchor, **settings)
        self.fence = 1
        self.rng = np.random.default_rng(0)
        self.words = {
            name: self.rng.integers(0, 9000, its.num_words, its.word_type)
            for name, its in SCHEMA.items()
        }
        self.shadow = Shadow.of(SCHEMA, lambda name: Shard(self.words[name]))
        self.base = (0, self.shadow.digest)

    def encode(self) -> weights_pb2.Manifest:
        """Store a version with a few changes in two tensors."""
        for name in ("embedding", "layer.weight"):
            self.words[name][self.rng.integers(0, len(self.words[name]), 50)] += 1
        made = encode_shards(
            SCHEMA, self.shadow, lambda name: Shard(self.words[name]), self.store.folder
        )
        self.sums = made.sums
        return self._put(made, self.base[0] + 1, self.base).manifest

    def publish(self) -> weights_pb2.Manifest:
        manifest = self.encode()
        key = key_of(manifest)
        self.store.record("deciding", key, replicas=[0])
        data = np.fromfile(self.object_of(manifest), np.uint8)
        self.store.commit(key)
        self.shadow.advance(manifest, data, self.sums)
        self.base = (manifest.version, manifest.result_digest)
        return manifest

    def make_anchor(self, digest: str) -> Stored:
        made = encode_shards(SCHEMA, None, self.shadow.shards.__getitem__, self.store.folder)
        return self._put(made, self.base[0], (0, ""))

    def object_of(self, manifest: weights_pb2.Manifest) -> Path:
        return self.store.folder / f"{manifest.manifest_hash.hex()}.object"

    def _put(self, made: Any, version: int, base: tuple[int, str]) -> Stored:
        names: dict[str, Any] = {"run_id": "run", "version": version, "base": base}
        made = merge(SCHEMA, [made], self.store.folder, fence=self.fence, **names)
        return self.store.put(*made)


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    """Versions 1 to 3, committed."""
    trainer = Trainer(tmp_path / "run")
    for _ in range(3):
        trainer.publish()
    yield trainer
    trainer.store.close()


Printed = Callable[..., str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """Standard output of a command that ends well."""

    def run(*arguments: object) -> str:
        status = main(["weights", *map(str, arguments)])
        captured = capsys.readouterr()
        assert (status, captured.err) == (0, "")
        return captured.out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Printed:
    """The one sentence of a command that ends with ``status``."""

    def run(status: int, *arguments: object) -> str:
        assert main(["weights", *map(str, arguments)]) == status
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


# ----------------------------------------------------------------------------------------- inspect


def test_inspect_shows_head_totals_and_the_tensors_with_the_most_bytes(
    trainer: Trainer, printed: Printed
) -> None:
    run = trainer.store.folder.parent
    lines = printed("inspect", run).splitlines()
    cells = [line.split() for line in lines]
    assert ["head", "3"] in cells
    assert ["kept", "3", "delta"] in cells
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("tensor ")) :]
    assert table[1].split()[:5] == ["embedding", "BF16", "300x40", "1", "sparse_delta"]
    assert table[2].startswith("layer.weight ")
    assert len(table) == 1 + 20 + 2
    assert table[-2] == "and 4 more; see --all"
    assert table[-1].startswith("24 tensors ")
    assert printed("inspect", trainer.store.folder).splitlines() == lines
    whole = printed("inspect", run, "--all").splitlines()
    assert len(whole) == len(lines) - 1 + 4
    assert whole[-2].split()[:3] == ["scale", "F32", "scalar"]


def test_inspect_json_has_the_manifest_s_numbers(trainer: Trainer, printed: Printed) -> None:
    manifest = trainer.publish()
    path = trainer.object_of(manifest).with_suffix(".manifest")
    found = json.loads(printed("inspect", path, "--json"))
    assert (found["version"], found["base"]) == (4, 3)
    assert found["digest"] == manifest.result_digest
    tensors = {its["name"]: its for its in found["tensors"]}
    assert tensors.keys() == SCHEMA.keys()
    assert sum(its["encoded_bytes"] for its in tensors.values()) == encoded_bytes(manifest)
    assert sum(its["dense_bytes"] for its in tensors.values()) == DENSE_BYTES
    changed = sum(its["changed"] * SCHEMA[name].num_words for name, its in tensors.items())
    assert round(changed) == num_changed(manifest)
    assert tensors["embedding"]["ratio"] == 24000 / tensors["embedding"]["encoded_bytes"]
    assert tensors["scale"]["ratio"] is None


def test_inspect_takes_the_committed_one_of_a_version(trainer: Trainer, printed: Printed) -> None:
    trainer.make_anchor(trainer.base[1])
    found = json.loads(printed("inspect", trainer.store.folder, "--version=3", "--json"))
    assert (found["version"], found["base"]) == (3, 2)


def test_a_trainer_that_took_over_may_go_back_to_its_checkpoint(
    trainer: Trainer, printed: Printed
) -> None:
    trainer.fence, trainer.base = 2, (1, "sha256:checkpoint")
    again = trainer.publish()
    found = json.loads(printed("inspect", trainer.store.folder, "--version=2", "--json"))
    assert found["manifest"] == again.manifest_hash.hex()
    assert printed("verify", trainer.store.folder).splitlines()[-1].startswith("4 versions, ")


def test_inspect_of_an_empty_store(tmp_path: Path, printed: Printed) -> None:
    Store(tmp_path / "weights").close()
    assert "head           0\n" in printed("inspect", tmp_path)


# ----------------------------------------------------------------------------------------- history


def test_history_tells_what_became_of_every_version(tmp_path: Path, printed: Printed) -> None:
    run = tmp_path / "run"
    trainer = Trainer(run, keep_versions=4)
    for _ in range(3):
        trainer.publish()
    trainer.make_anchor(trainer.base[1])
    after_second = trainer.store.versions()[1].key.digest
    for _ in range(2):
        trainer.publish()
    trainer.store.plan_update(after_second, schema_digest(SCHEMA))
    trainer.make_anchor(trainer.base[1])
    trainer.publish()
    trainer.store.record("given_up", key_of(trainer.encode()), phase="prepare")
    trainer.store.close()
    rows = [json.loads(line) for line in printed("history", run, "--json").splitlines()]
    names = ("version", "base", "kind", "state", "is_kept")
    assert [tuple(its[name] for name in names) for its in rows] == [
        (1, 0, "delta", "committed", False),
        (2, 1, "delta", "committed", False),
        (3, 2, "delta", "committed", True),
        (3, None, "-", "stored", False),
        (4, 3, "delta", "committed", True),
        (5, 4, "delta", "committed", True),
        (5, 2, "squash", "stored", False),
        (5, None, "anchor", "stored", True),
        (6, 5, "delta", "committed", True),
        (7, 6, "delta", "given up (prepare)", True),
    ]
    assert rows[0]["encoded_bytes"] is None
    assert rows[7]["changed"] == 1
    assert {its["dense_bytes"] for its in rows if its["is_kept"]} == {DENSE_BYTES}
    lines = printed("history", run).splitlines()
    assert lines[0].split()[:5] == ["version", "base", "fence", "kind", "changed"]
    assert lines[1].split()[:7] == ["1", "0", "1", "delta", "-", "pruned", "-"]
    assert len(lines) == 1 + len(rows)


# ------------------------------------------------------------------------------------------ verify


def test_verify_reads_every_version_without_torch(trainer: Trainer, printed: Printed) -> None:
    trainer.make_anchor(trainer.base[1])
    folder = trainer.store.folder
    lines = printed("verify", folder).splitlines()
    assert [line.split()[1:2] for line in lines[:-1]] == [["1"], ["2"], ["3"], ["3"]]
    assert all(line.endswith("right") for line in lines[:-1])
    assert lines[-1].startswith("4 versions, ")
    code = (
        "import sys; from kleash.cli.main import main;"
        f"status = main(['weights', 'verify', {str(folder)!r}]);"
        "sys.exit('torch was imported' if 'torch' in sys.modules else status)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (flip_a_byte, "does not have its hash"),
        (shorten, "bytes, and its manifest describes"),
        (Path.unlink, "is missing: version 2 has no bytes"),
    ],
)
def test_verify_names_the_damaged_object(
    trainer: Trainer,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    sentence: str,
) -> None:
    path = sorted(trainer.store.versions(), key=lambda it: it.key.version)[1].key.manifest_hash
    target = trainer.store.folder / f"{path.hex()}.object"
    damage(target)
    assert main(["weights", "verify", str(trainer.store.folder)]) == 1
    captured = capsys.readouterr()
    verdicts = [line.split()[-1] for line in captured.out.splitlines()]
    assert verdicts == ["right", "damaged", "right"]
    assert captured.err.startswith(f"error: {target}")
    assert sentence in captured.err


def test_verify_names_the_tensor_of_a_damaged_part(trainer: Trainer, refused: Printed) -> None:
    target = trainer.object_of(trainer.publish())
    flip_a_byte(target)
    assert "tensor 'embedding', elements 0 to 11999" in refused(1, "verify", trainer.store.folder)


def test_verify_names_a_damaged_manifest(trainer: Trainer, refused: Printed) -> None:
    path = trainer.object_of(trainer.publish()).with_suffix(".manifest")
    flip_a_byte(path)
    assert f"{path} is damaged" in refused(1, "verify", trainer.store.folder)


def resealed(trainer: Trainer, manifest: weights_pb2.Manifest, data: bytes) -> Path:
    """Store ``data`` for the first part with every hash right, as a faulty encoder would."""
    part = manifest.tensors[0].parts[0]
    rest = trainer.object_of(manifest).read_bytes()[part.encoded_bytes :]
    part.encoded_bytes, part.xxh3_128 = len(data), xxhash.xxh3_128_digest(data)
    manifest.manifest_hash = manifest_hash(manifest)
    made = trainer.store.folder / ".merge-resealed"
    made.write_bytes(data + rest)
    return trainer.store.put(manifest, made).path.with_suffix(".manifest")


def test_verify_decodes_what_has_the_right_hash(trainer: Trainer, refused: Printed) -> None:
    path = resealed(trainer, trainer.encode(), bytes(range(100)))
    assert "cannot be decoded: " in refused(1, "verify", trainer.store.folder)
    assert "cannot be decoded: " in refused(1, "verify", path)


def test_verify_computes_the_digest_of_an_anchor(trainer: Trainer, refused: Printed) -> None:
    manifest = trainer.make_anchor(trainer.base[1]).manifest
    manifest.tensors[0].parts[0].codec = weights_pb2.CODEC_FULL
    resealed(trainer, manifest, bytes(SCHEMA["embedding"].num_bytes))
    error = refused(1, "verify", trainer.store.folder)
    assert "tensor 'embedding' does not have its digest" in error


@pytest.mark.parametrize("version", [2, 3])
def test_verify_misses_a_committed_version(
    trainer: Trainer, refused: Printed, version: int
) -> None:
    (found,) = [its for its in trainer.store.versions() if its.key.version == version]
    trainer.store.discard(found.key.manifest_hash)
    error = refused(1, "verify", trainer.store.folder)
    assert f"version {version} is committed, and its manifest " in error


def test_verify_takes_the_oldest_kept_version_as_the_start(
    trainer: Trainer, printed: Printed
) -> None:
    trainer.store.discard(trainer.store.versions()[0].key.manifest_hash)
    assert printed("verify", trainer.store.folder).splitlines()[-1].startswith("2 versions, ")


def test_verify_sees_a_break_in_the_chain(trainer: Trainer, refused: Printed) -> None:
    trainer.base = (3, "sha256:other")
    trainer.publish()
    assert "version 4 starts from sha256:other" in refused(1, "verify", trainer.store.folder)


# ------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "does one of inspect, history, verify, and nothing is named"),
        (["inspekt"], "and 'inspekt' is none of them"),
        (["inspect"], "the following arguments are required: TARGET"),
        (["inspect", "RUN", "--versoin=1"], "unrecognized arguments: --versoin=1"),
        (["inspect", "RUN", "--version=x"], "argument --version: invalid int value: 'x'"),
        (["inspect", "RUN", "--version=7"], "version 7 is not kept"),
        (["inspect", "FILE", "--version=1"], "--version picks one of a store's folder"),
        (["inspect", "nowhere"], "'nowhere' does not exist and is no address"),
        (["history", "EMPTY"], "holds no published weights"),
        (["history", "FILE"], "is one version; name the store's folder"),
        (["verify", "RUN", "--against=RUN"], "compare a replica, and"),
        (["verify", "RUN", "--model=RUN"], "compare a replica, and"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    trainer: Trainer, refused: Printed, arguments: list[str], sentence: str
) -> None:
    run = trainer.store.folder.parent
    (run / "empty").mkdir()
    names = {
        "RUN": str(run),
        "EMPTY": str(run / "empty"),
        "FILE": str(next(trainer.store.folder.glob("*.manifest"))),
    }
    assert sentence in refused(2, *(names.get(argument, argument) for argument in arguments))


def test_a_log_that_is_no_log(trainer: Trainer, refused: Printed) -> None:
    path = trainer.store.folder / "log.jsonl"
    path.write_text("so\n")
    for action in ("inspect", "history", "verify"):
        assert f"{path} has a line that is not JSON" in refused(2, action, trainer.store.folder)


@pytest.mark.parametrize("action", ["inspect", "history", "verify"])
def test_help_lists_the_flags(action: str, printed: Printed) -> None:
    text = printed(action, "--help")
    assert text.startswith(f"usage: kleash weights {action} ")
    assert "TARGET" in text
    assert action in printed("--help")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1000, "0.98 KiB"),
        (1536, "1.50 KiB"),
        (23.44 * 2**20, "23.4 MiB"),
        (5 * 2**50, "5120 TiB"),
    ],
)
def test_bytes_have_three_digits(count: float, text: str) -> None:
    assert human_bytes(int(count)) == text
