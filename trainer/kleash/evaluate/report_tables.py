"""Tables of the report: final figures of groups, runs and what they were made with, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kleash.evaluate.band_chart import number
from kleash.evaluate.report_figures import Drawn
from kleash.evaluate.run_data import RunData
from kleash.evaluate.run_groups import Group, final_figure, spread
from kleash.sinks.sink import flattened

MOST_VERSIONS = 12
"""Rows of a run's table of weights, spread over it."""


def compare(groups: Sequence[Group], figures: Sequence[Drawn]) -> list[dict[str, Any]]:
    """A row for each figure that any group has: its spread over the runs of each group."""
    rows = []
    for figure in figures:
        cells = [
            spread(final_figure(run.series(figure.key)) for run in group.runs) for group in groups
        ]
        if any(cells):
            rows.append({"figure": figure, "cells": cells})
    return rows


def describe_runs(runs: Sequence[RunData]) -> dict[str, Any]:
    """Every run, and which facts all of them share or not."""
    facts = {
        "Lineage and digests": [_origin(run) for run in runs],
        "Environment": [_environment(run) for run in runs],
        "Configuration": [dict(flattened(run.config)) for run in runs],
    }
    return {
        "names": [run.name for run in runs],
        "rows": [
            {
                "name": run.name,
                "seed": run.seed,
                "state": run.state,
                "steps": run.last_step,
                "total_steps": run.config.get("total_steps"),
                "started": run.starts[0]["started_at"][:16].replace("T", " ")
                if run.starts
                else None,
                "starts": len(run.starts),
                "folder": run.path.name,
            }
            for run in runs
        ],
        "facts": [(title, *_shared_and_differing(each)) for title, each in facts.items()],
    }


def describe_weights(run: RunData) -> dict[str, Any]:
    """Versions of a run's policy: how many, what they cost, and who drew its samples."""
    digests = {row["step"]: row["policy_digest"] for row in run.samples}
    stride = max(1, -(-len(run.steps) // MOST_VERSIONS))
    chosen = run.steps[::-1][::stride][::-1]
    mixed = sum(
        len({version for *_, version in row["weights_versions"]}) > 1 for row in run.samples
    )
    return {
        "name": run.name,
        "first": run.steps[0]["weights_version"] if run.steps else None,
        "last": run.steps[-1]["weights_version"] if run.steps else None,
        "num_samples": len(run.samples),
        "num_mixed": mixed,
        "rows": [
            {
                "step": row["step"],
                "version": row["weights_version"],
                "digest": _short_digest(digests.get(row["step"], "")),
                "bytes": row.get("publish_bytes"),
                "changed": row.get("publish_changed_fraction"),
                "pause_s": row.get("publish_pause_s"),
            }
            for row in chosen
        ],
    }


def _origin(run: RunData) -> dict[str, Any]:
    newest = run.starts[-1] if run.starts else {}
    lineage = {**newest.get("lineage", {}), **_only(run.lineage, ("lineage_id", "parent_digest"))}
    digests = {**newest.get("digests", {}), **run.result.get("digests", {})}
    if run.lineage:
        digests["policy"] = run.lineage.get("digest")
    return {**lineage, **{f"digest of {key}": value for key, value in digests.items()}}


def _environment(run: RunData) -> dict[str, Any]:
    """Of the newest start."""
    if not run.starts:
        return {}
    newest = run.starts[-1]
    parts = {key: newest.get(key, {}) for key in ("software", "machine", "variables", "seeds")}
    flat = dict(flattened(parts))
    return {"host": newest.get("host"), "command": " ".join(newest.get("command", [])), **flat}


def _only(mapping: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: mapping[key] for key in keys if mapping.get(key) is not None}


def _shared_and_differing(
    facts: Sequence[Mapping[str, Any]],
) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """(fact, value) that are the same everywhere, and (fact, values) that are not."""
    keys = dict.fromkeys(key for each in facts for key in each)
    shared, differing = [], []
    for key in keys:
        values = [_text(each.get(key)) for each in facts]
        if all(value == values[0] for value in values):
            shared.append((key, values[0]))
        else:
            differing.append((key, values))
    return shared, differing


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(_text(each) for each in value) or "none"
    return str(value)


def _short_digest(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
