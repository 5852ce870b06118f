"""What a complete checkpoint is, which files of a repository make one, and addresses of models."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from kleash.base.errors import ConfigError
from kleash.lm.load import load_causal_lm, load_tokenizer, save_checkpoint_folder
from kleash.sources.checkpoint import choose_files, missing_parts, pickled_files
from kleash.sources.uri import parse_source

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder that Kleash wrote."""
    model, tokenizer = load_causal_lm(tiny_folder), load_tokenizer(tiny_folder)
    save_checkpoint_folder(
        model, tokenizer, tmp_path / "model", {"stage": "sft"}, {"report.json": "{}\n"}
    )
    return tmp_path / "model"


# ---------------------------------------------------------------------------------------- complete


def test_what_save_checkpoint_folder_wrote_is_complete(folder: Path, tiny_folder: Path) -> None:
    assert missing_parts(folder, needs_lineage=True) == []
    lineage = json.loads((folder / "kleash.json").read_text())
    assert lineage["stage"] == "sft"
    assert lineage["files"] == sorted(path.name for path in tiny_folder.iterdir())
    assert missing_parts(tiny_folder) == []
    assert missing_parts(tiny_folder, needs_lineage=True) == ["no kleash.json"]


def test_kleash_json_is_written_last(folder: Path) -> None:
    """On a volume whose renames are not atomic it tells that everything else is there."""
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert max(times, key=lambda name: times[name]) == "kleash.json"


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "generation_config.json", "tokenizer_config.json"]
)
def test_every_file_that_kleash_json_names_must_be_there(folder: Path, name: str) -> None:
    """A copy that is under way: without its chat template the folder would load, and be wrong."""
    (folder / name).unlink()
    assert missing_parts(folder) == [f"no {name}"]


def test_a_copy_that_grows_file_by_file_is_incomplete_until_the_last(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    assert missing_parts(copy) == ["the folder does not exist"]
    copy.mkdir()
    assert missing_parts(copy) == [
        "no config.json", "no tokenizer (tokenizer.json)", "no *.safetensors weights",
    ]  # fmt: skip
    names = sorted(path.name for path in folder.iterdir() if path.name != "report.json")
    for index, name in enumerate(names):
        content = (folder / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
        if index == len(names) - 1:
            assert missing_parts(copy) != []
        (copy / name).write_bytes(content)
        assert (missing_parts(copy) == []) == (index == len(names) - 1), name


def test_a_cut_weights_file_is_told_by_its_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    expected = f"model.safetensors has {len(content) - 1} of {len(content)} bytes"
    assert missing_parts(folder) == [expected]
    path.write_bytes(content + b"x")
    assert missing_parts(folder) == [
        f"model.safetensors has {len(content) + 1} of {len(content)} bytes"
    ]
    path.write_bytes(content[:100])
    assert missing_parts(folder) == ["model.safetensors ends in its header"]
    for junk in (b"", b"abc", b"\x80\x02}q\x00." * 9, struct.pack("<Q", 4) + b"null"):
        path.write_bytes(junk)
        assert missing_parts(folder) == ["model.safetensors is no safetensors file"]


def test_a_cut_json_file_is_told(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:200])
    (problem,) = missing_parts(folder)
    assert problem.startswith("tokenizer.json is not valid JSON (")


def test_shards_that_the_index_names_must_be_there(folder: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"metadata": {}, "weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / shards[0])
    (folder / "kleash.json").unlink()
    assert missing_parts(folder) == [f"no {shards[1]}"]
    shutil.copy(folder / shards[0], folder / shards[1])
    assert missing_parts(folder) == []


# ---------------------------------------------------------------------------------------- choosing


def test_weights_are_chosen_once_and_never_pickled() -> None:
    """As in repositories that hold the same weights in four forms."""
    names = [
        "README.md", "LICENSE", ".gitattributes", "config.json", "generation_config.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "consolidated.safetensors", "params.json",
        "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "rust_model.ot",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
        "merges.txt", "vocab.txt", "notes.txt", "training_args.bin", "model.py",
        "kleash-fetch.json", "kleash.json",
    ]  # fmt: skip
    chosen = choose_files(names)
    assert [name for name in chosen if name.endswith(".safetensors")] == names[5:7]
    small = {
        "config.json", "generation_config.json", "model.safetensors.index.json", "params.json",
        "pytorch_model.bin.index.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "chat_template.jinja", "merges.txt", "vocab.txt", "kleash.json",
    }  # fmt: skip
    assert set(chosen) - set(names[5:7]) == small
    assert pickled_files(names) == ["pytorch_model-00001-of-00002.bin", "training_args.bin"]


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["model.safetensors", "model-1-of-1.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin"], []),
    ],
)
def test_the_weights_of_a_folder(names: list[str], weights: list[str]) -> None:
    assert choose_files(names) == weights


# --------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("runs/sft", "folder"),
        ("/models/a b", "folder"),
        ("file:///models/a%20b", "folder"),
        ("hf://org/name@0123456789012345678901234567890123456789", "hub"),
        ("hf://gpt2@main", "hub"),
        ("s3://bucket/path", "arrow"),
        ("S3://bucket", "arrow"),
        ("gs://bucket/path", "arrow"),
        ("gs://anonymous@bucket/path", "arrow"),
        ("https://host/path", "http"),
        ("memory://path", "fsspec"),
    ],
)
def test_addresses(uri: str, kind: str) -> None:
    assert parse_source(uri).kind == kind


def test_parts_of_addresses() -> None:
    assert parse_source("file:///models/a%20b").path == Path("/models/a b")
    source = parse_source("hf://org/name@refs/pr/7")
    assert (source.repo, source.revision) == ("org/name", "refs/pr/7")


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("", "the model's address is empty"),
        ("hf://org/name", "has no revision, and a repository changes; write hf://org/name@REV"),
        ("hf://org/name@", "has no revision"),
        ("hf://org/name/more@main", "is no repository of the Hub"),
        ("hf://../name@main", "is no repository of the Hub"),
        ("s3:/bucket/x", "two slashes follow the colon"),
        ("s3://", "names no place"),
        ("file://models", "is not absolute"),
        ("wasb7://x/y", "nothing here reads wasb7:// addresses; give a folder, hf://"),
        ("s3://key:secret@bucket/x", "holds a user name or a key"),
        ("https://user:secret@host/x", "holds a user name or a key"),
        ("pvc://claim/path", "is a folder on a claim that the chart mounts"),
        ("demo://sft", "is a folder of the demo's run that the chart mounts"),
        ("oci://registry/repo@sha256:0", "is an image volume that the chart mounts"),
    ],
)
def test_bad_addresses_are_one_sentence_without_secrets(uri: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_source(uri)
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)
