"""Which files make a checkpoint, and whether a folder holds all of them, whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
LINEAGE = "kleash.json"
"""What Kleash writes last into its own folders; it names the files of model and tokenizer."""
MARKER = "kleash-fetch.json"
"""What ``kleash fetch`` writes last (kleash.sources.marker)."""
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
"""One of them is in every checkpoint."""

_SMALL = re.compile(r".*\.(json|jinja|model|tiktoken)|merges\.txt|vocab\.txt")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_LONGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit


def choose_files(names: Iterable[str]) -> list[str]:
    """The names of a folder that a checkpoint consists of, sorted: weights in safetensors once.

    Repositories hold the same weights several times (pickled, consolidated, for other runtimes);
    what the index names comes first, then one whole file, then any safetensors.
    """
    names = sorted(set(names) - {MARKER})
    small = [name for name in names if _SMALL.fullmatch(name)]
    shards = [name for name in names if _SHARD.fullmatch(name)] if INDEX in names else []
    whole = [name for name in names if name == "model.safetensors"]
    anything = [name for name in names if name.endswith(".safetensors")]
    return sorted(small + (shards or whole or anything))


def pickled_files(names: Iterable[str]) -> list[str]:
    """Names of weights that Kleash does not load, because loading them can run code."""
    return sorted(name for name in names if name.endswith(_PICKLED))


def missing_parts(folder: Path, *, needs_lineage: bool = False) -> list[str]:
    """What keeps the folder from being a complete checkpoint, as parts of a sentence.

    Empty when it is complete: a configuration, a tokenizer, every safetensors file as long as its
    header says, and every file that ``kleash.json`` or the weights' index names.
    ``needs_lineage``: ``kleash.json`` must be there, as in every folder that Kleash writes.
    """
    if not folder.is_dir():
        return ["the folder does not exist"]
    try:
        names = {path.name for path in folder.iterdir() if path.is_file()}
        wanted = {LINEAGE} if needs_lineage else set()
        wanted |= {CONFIG} | (_named_files(folder, names) - names)
        missing = [f"no {name}" for name in sorted(wanted - names)]
        if not names & set(TOKENIZERS):
            missing.append(f"no tokenizer ({TOKENIZERS[0]})")
        weights = sorted(name for name in names if name.endswith(".safetensors"))
        if not weights and not any(name.endswith(".safetensors") for name in wanted):
            missing.append("no *.safetensors weights")
        if missing:
            return missing
        documents = sorted(name for name in names if name.endswith(".json"))
        problems = [json_problem(folder / name) for name in documents]
        problems += [safetensors_problem(folder / name) for name in weights]
        return [problem for problem in problems if problem]
    except FileNotFoundError:  # it goes away under our eyes
        return ["its files change"]


def _named_files(folder: Path, names: set[str]) -> set[str]:
    """Files that the folder's own lists name; a list that is still being written names none."""
    named: set[str] = set()
    if LINEAGE in names:
        named.update(_read_object(folder / LINEAGE).get("files") or ())
    if INDEX in names:
        named.update(shards_of(_read_object(folder / INDEX)))
    return named


def shards_of(index: Mapping[str, Any]) -> set[str]:
    """Files that a weights' index names."""
    weight_map = index.get("weight_map")
    return set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def json_problem(path: Path) -> str:
    """Why the file is not a JSON document; empty when it is one."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{path.name} is not valid JSON ({error})"
    return ""


def safetensors_problem(path: Path) -> str:
    """Why the file is not whole, told from its header and size alone; empty when it is."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes < 8 or header_bytes > _LONGEST_HEADER_BYTES:
            return f"{path.name} is no safetensors file"
        header = file.read(header_bytes)
    if len(header) < header_bytes:
        return f"{path.name} ends in its header"
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return f"{path.name} is no safetensors file"
    expected = 8 + header_bytes + max(ends, default=0)
    return "" if num_bytes == expected else f"{path.name} has {num_bytes} of {expected} bytes"
