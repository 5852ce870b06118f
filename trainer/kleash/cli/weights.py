"""``kleash weights inspect|history|verify``: what a replica serves, what a publisher has stored."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from kleash.base.errors import ConfigError, KleashError
from kleash.cli.flags import Action, Parser, run_action
from kleash.cli.output import show
from kleash.cli.weights_text import counts, human_bytes, pairs, ratio_text, size_cells, table
from kleash.cli.weights_verify import (
    Checked,
    audited,
    chain_damage,
    check_folder,
    check_version,
    load_manifest,
    model_folder_digest,
)
from kleash.cli.weights_versions import (
    ANSWER_S,
    TARGET,
    Row,
    Versions,
    folder_versions,
    locate,
    publisher_versions,
    store_log,
)
from kleash.client.weights import WeightsClient
from kleash.weights.codec import Codec
from kleash.weights.manifest import encoded_bytes, num_changed, schema_of
from kleash.weights.v1 import weights_pb2

NUM_TENSORS = 20
"""Tensors that ``inspect`` shows without ``--all``."""


def run(arguments: Sequence[str]) -> int:
    """Do what the first argument names. Raises KleashError when a verification fails."""
    return run_action("kleash weights", ACTIONS, arguments, parser_of=_parser, help_text=_help)


# ----------------------------------------------------------------------------------------- inspect


def _inspect(flags: argparse.Namespace) -> None:
    place = locate(flags.target)
    is_store = isinstance(place, Path) and place.suffix != ".manifest"
    if flags.version is not None and not is_store:
        raise ConfigError(f"--version picks one of a store's folder, and '{place}' is none.")
    if isinstance(place, str):
        versions = publisher_versions(place)
        facts = _replica_facts(place) if versions is None else _store_facts(versions)
        show(json.dumps(facts) if flags.json else pairs(facts))
        return
    if not is_store:
        _show_manifest(load_manifest(place), flags, {})
        return
    versions = folder_versions(place)
    facts = _store_facts(versions) if flags.version is None else {}
    name = _manifest_name(place, versions, flags.version)
    path = place / f"{name}.manifest"
    if path.is_file():
        _show_manifest(load_manifest(path), flags, facts)
    else:
        show(json.dumps(facts) if flags.json else pairs(facts))


def _manifest_name(folder: Path, versions: Versions, version: int | None) -> str:
    """Of the head, or of one version: the committed one if there are several."""
    if version is None:
        return versions.head.manifest_hash.hex() if versions.head else ""
    kept = [row for row in versions.rows if row.is_kept]
    found = [row for row in kept if row.info.key.version == version]
    if not found:
        numbers = sorted({row.info.key.version for row in kept})
        seen = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
        raise ConfigError(f"version {version} is not kept in {folder}; it keeps {seen}.")
    # The last committed one: after a trainer took over, a number may have come twice.
    return max(found[::-1], key=lambda row: row.info.is_committed).info.key.manifest_hash.hex()


def _replica_facts(address: str) -> dict[str, Any]:
    with WeightsClient(address, timeout_s=ANSWER_S) as replica:
        served = replica.get_weights()
    state = weights_pb2.ReplicaState.Name(served.state).removeprefix("REPLICA_STATE_")
    return {
        "replica": address,
        "run": served.run_id,
        "fence": served.fence,
        "version": served.version,
        "digest": served.digest,
        "schema_digest": served.schema_digest,
        "state": state,
        "required_version": served.required_version,
        "key": served.served.manifest_hash.hex(),
    }


def _store_facts(versions: Versions) -> dict[str, Any]:
    kept = [row for row in versions.rows if row.is_kept]
    head = versions.head or weights_pb2.VersionKey()
    return {
        "run": head.run_id,
        "fence": head.fence,
        "head": head.version,
        "digest": head.digest,
        "key": head.manifest_hash.hex(),
        "kept": dict(Counter(row.kind for row in kept)),
        "encoded_bytes": sum(row.info.encoded_bytes for row in kept),
        "dense_bytes": kept[-1].info.dense_bytes if kept else 0,
    }


def _show_manifest(
    manifest: weights_pb2.Manifest, flags: argparse.Namespace, facts: dict[str, Any]
) -> None:
    tensors = sorted(_tensors(manifest), key=lambda it: (-it["encoded_bytes"], it["name"]))
    about = {
        "version": manifest.version,
        "run": manifest.run_id,
        "fence": manifest.fence,
        "base": manifest.base_version if manifest.base_digest else None,
        "base_digest": manifest.base_digest,
        "digest": manifest.result_digest,
        "manifest": manifest.manifest_hash.hex(),
    }
    if flags.json:
        show(json.dumps({**facts, **about, "tensors": tensors}))
        return
    shapes = schema_of(manifest).values()
    total = {
        "name": f"{len(tensors)} tensors",
        "dtype": "",
        "shape": None,
        "codecs": sum((Counter(it["codecs"]) for it in tensors), Counter()),
        "changed": num_changed(manifest) / max(sum(it.num_words for it in shapes), 1),
        "encoded_bytes": encoded_bytes(manifest),
        "dense_bytes": sum(it.num_bytes for it in shapes),
    }
    shown = tensors if flags.all else tensors[:NUM_TENSORS]
    header = ["tensor", "dtype", "shape", "parts", "changed", "encoded", "dense", "ratio"]
    rows = [_tensor_cells(it) for it in (*shown, total)]
    if len(shown) < len(tensors):
        rows.insert(-1, [f"and {len(tensors) - len(shown)} more; see --all", *[""] * 7])
    blocks = [pairs(facts)] if facts else []
    show("\n\n".join([*blocks, pairs(about), table(header, rows, text=header[:4])]))


def _tensors(manifest: weights_pb2.Manifest) -> list[dict[str, Any]]:
    rows = []
    for entry, shape in zip(manifest.tensors, schema_of(manifest).values(), strict=True):
        codecs = Counter(Codec(part.codec).name.lower() for part in entry.parts)
        encoded = sum(part.encoded_bytes for part in entry.parts)
        rows.append(
            {
                "name": entry.name,
                "dtype": entry.dtype,
                "shape": list(shape.shape),
                "codecs": dict(codecs),
                "changed": sum(it.num_changed for it in entry.parts) / max(shape.num_words, 1),
                "encoded_bytes": encoded,
                "dense_bytes": shape.num_bytes,
                "ratio": shape.num_bytes / encoded if encoded else None,
            }
        )
    return rows


def _tensor_cells(tensor: Mapping[str, Any]) -> list[str]:
    return [
        tensor["name"],
        tensor["dtype"],
        _shape(tensor["shape"]),
        counts(tensor["codecs"]),
        *size_cells(tensor["changed"], tensor["encoded_bytes"]),
        human_bytes(tensor["dense_bytes"]),
        ratio_text(tensor["dense_bytes"], tensor["encoded_bytes"]),
    ]


def _shape(shape: Sequence[int] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"


# ----------------------------------------------------------------------------------------- history


def _history(flags: argparse.Namespace) -> None:
    place = locate(flags.target)
    if isinstance(place, Path) and place.suffix == ".manifest":
        raise ConfigError(f"{place} is one version; name the store's folder, {place.parent}.")
    versions = publisher_versions(place) if isinstance(place, str) else folder_versions(place)
    if versions is None:
        raise ConfigError(
            f"{place} is a policy replica and keeps no history; name the trainer's address or "
            "its folder."
        )
    if flags.json:
        for row in versions.rows:
            show(json.dumps(_history_facts(row)))
        return
    text = ["kind", "state", "time", "manifest"]
    header = ["version", "base", "fence", "kind", "changed", "encoded", "ratio", *text[1:]]
    show(table(header, [_history_cells(row) for row in versions.rows], text=text))


def _history_facts(row: Row) -> dict[str, Any]:
    info = row.info
    return {
        "version": info.key.version,
        "base": None if row.kind in ("anchor", "-") else info.base_version,
        "fence": info.key.fence,
        "run": info.key.run_id,
        "kind": row.kind,
        "changed": info.num_changed / max(info.num_elements, 1) if row.is_kept else None,
        "encoded_bytes": info.encoded_bytes if row.is_kept else None,
        "dense_bytes": info.dense_bytes if row.is_kept else None,
        "state": row.state,
        "is_kept": row.is_kept,
        "time_s": info.stored_at_s,
        "digest": info.key.digest,
        "manifest_hash": info.key.manifest_hash.hex(),
    }


def _history_cells(row: Row) -> list[str]:
    info, facts = row.info, _history_facts(row)
    sizes = ["-", "pruned", "-"]
    if row.is_kept:
        ratio = ratio_text(info.dense_bytes, info.encoded_bytes)
        sizes = [*size_cells(facts["changed"], info.encoded_bytes), ratio]
    return [
        str(info.key.version),
        "-" if facts["base"] is None else str(facts["base"]),
        str(info.key.fence),
        row.kind,
        *sizes,
        row.state,
        datetime.fromtimestamp(info.stored_at_s).isoformat(" ", "seconds"),
        info.key.manifest_hash.hex()[:12],
    ]


# ------------------------------------------------------------------------------------------ verify


def _verify(flags: argparse.Namespace) -> None:
    place = locate(flags.target)
    if isinstance(place, str):
        _verify_replica(place, flags)
        return
    if flags.against or flags.model:
        raise ConfigError(f"--against and --model compare a replica, and {place} is a folder.")
    is_file = place.suffix == ".manifest"
    log = [] if is_file else store_log(place)
    every = [check_version(place, load_manifest(place))] if is_file else check_folder(place)
    manifests, damages = [], []
    for checked in every:
        show(_verdict(checked))
        if checked.damage:
            damages.append(checked.damage)
        if checked.manifest is not None:
            manifests.append(checked.manifest)
    if chain := chain_damage(log, manifests):
        damages.append(chain)
    if damages:
        raise KleashError(damages[0])
    size = human_bytes(sum(map(encoded_bytes, manifests)))
    show(f"{len(manifests)} versions, {size}: every hash is right, every part decodes.")


def _verdict(checked: Checked) -> str:
    verdict, manifest = "damaged" if checked.damage else "right", checked.manifest
    if manifest is None:
        return f"{checked.path.name}  {verdict}"
    num_parts = sum(len(entry.parts) for entry in manifest.tensors)
    size, name = human_bytes(encoded_bytes(manifest)), checked.path.stem[:12]
    base = f"from {manifest.base_version}" if manifest.base_digest else "whole"
    start = f"version {manifest.version:>6}  {base:<11}  {name}"
    return f"{start}  {num_parts:>5} parts  {size:>9}  {verdict}"


def _verify_replica(address: str, flags: argparse.Namespace) -> None:
    if publisher_versions(address) is not None:
        raise ConfigError(
            f"{address} is a publisher; verify its folder, RUN/weights, or a policy replica."
        )
    served = audited(address)
    facts = {
        "replica": address,
        "version": served.version,
        "digest": f"{served.digest}, computed again from the weights in memory",
    }
    others: list[tuple[str, Callable[[], str]]] = []
    if flags.against:
        others.append((flags.against, lambda: _digest_of(flags.against)))
    if flags.model:
        others.append((str(flags.model), lambda: model_folder_digest(flags.model, served)))
    show(pairs(facts))
    for name, digest_of in others:
        digest = digest_of()
        if digest != served.digest:
            raise KleashError(f"{address} serves {served.digest}, and {name} has {digest}.")
        show(f"{name} has the same digest.")


def _digest_of(target: str) -> str:
    """The served digest of a replica, or the head's of a store."""
    place = locate(target)
    if isinstance(place, Path):
        if place.suffix == ".manifest":
            return load_manifest(place).result_digest
        versions = folder_versions(place)
    else:
        versions = publisher_versions(place)
        if versions is None:
            return _replica_facts(place)["digest"]
    if versions.head is None:
        raise ConfigError(f"{target} has committed no version yet; there is nothing to compare.")
    return versions.head.digest


# --------------------------------------------------------------------------------- flags and text


ACTIONS = {
    "inspect": Action(_inspect, "what a replica serves, or what a version is made of"),
    "history": Action(_history, "every version of a store and what became of it"),
    "verify": Action(_verify, "every hash of a store, or the digest of a replica's memory"),
}


def _parser(name: str) -> argparse.ArgumentParser:
    parser = Parser(
        f"kleash weights {name}", description=ACTIONS[name].summary + ".", allow_abbrev=False
    )
    parser.add_argument("target", metavar="TARGET", help=TARGET)
    if name == "verify":
        against = "a publisher, a store or another replica whose digest a replica must have"
        parser.add_argument("--against", metavar="TARGET", help=against)
        model = "a Hugging Face folder whose digest a replica must have, in its data type"
        parser.add_argument("--model", metavar="FOLDER", type=Path, help=model)
        return parser
    what = "one JSON object" if name == "inspect" else "one JSON object a line"
    parser.add_argument("--json", action="store_true", help=f"print {what}")
    if name == "inspect":
        version = "of a store's folder: this version instead of the newest"
        parser.add_argument("--version", metavar="N", type=int, help=version)
        every = f"every tensor, not the {NUM_TENSORS} with the most bytes"
        parser.add_argument("--all", action="store_true", help=every)
    return parser


def _help() -> str:
    rows = "\n".join(f"  {name:<7}  {action.summary}" for name, action in ACTIONS.items())
    return (
        f"usage: kleash weights {'|'.join(ACTIONS)} TARGET [flags]\n\n{rows}\n\n"
        f"TARGET is {TARGET}.\nkleash weights {'|'.join(ACTIONS)} --help lists the flags."
    )
