"""values.schema.json: every key of values.yaml is closed to a typo beside it, and typed."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema.validators import validator_for
from tests.k8s.chart import CHART, EXAMPLES, RenderError, StrictLoader, example_name, render

from kleash.sources.uri import parse_source

pytestmark = pytest.mark.k8s

Path_ = tuple[str, ...]


@functools.cache
def schema() -> dict[str, Any]:
    return json.loads((CHART / "values.schema.json").read_text())


@functools.cache
def validator() -> Any:
    kind = validator_for(schema())
    kind.check_schema(schema())
    return kind(schema())


@functools.cache
def default_values() -> dict[str, Any]:
    return yaml.load((CHART / "values.yaml").read_text(), StrictLoader)


def problems(values: dict[str, Any]) -> list[str]:
    """Every violation with the path it is at."""
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in _leaves(validator().iter_errors(values))
    ]


def _leaves(errors: Any) -> Iterator[Any]:
    for error in errors:
        if error.context:
            yield from _leaves(error.context)
        else:
            yield error


def maps(values: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Paths of every mapping that the schema describes, the root's is ()."""
    if isinstance(values, dict):
        yield path
        if not is_passthrough(path):
            for key, value in values.items():
                yield from maps(value, (*path, key))


def leaves(values: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Paths and values of everything that is no mapping."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def at(values: Any, path: Path_) -> Any:
    for key in path:
        values = values[key]
    return values


def subschema(path: Path_) -> dict[str, Any]:
    """The part of the schema for a path, references followed."""
    part = _resolve(schema())
    for key in path:
        part = _resolve(part["properties"][key])
    return part


def _resolve(part: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in part:
        target: Any = schema()
        for key in part["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        part = {**target, **{key: value for key, value in part.items() if key != "$ref"}}
    return part


def is_passthrough(path: Path_) -> bool:
    """The map goes into an object as it is, or into a process's configuration."""
    return subschema(path).get("additionalProperties") is not False


PASSTHROUGH_NAMES = {
    # Kubernetes's own, copied into objects as they are.
    "affinity",
    "annotations",
    "additionalLabels",
    "behavior",
    "commonAnnotations",
    "commonLabels",
    "containerSecurityContext",
    "labels",
    "lifecycle",
    "limits",
    "nodeSelector",
    "podAnnotations",
    "podLabels",
    "podSecurityContext",
    "requests",
    "resources",
    # Keys of the processes, which check them themselves.
    "config",
    "extraEnv",
    "policyConfig",
    "referenceConfig",
    "rewardConfig",
    "server",
    "settings",
    "trainerConfig",
    # Maps by the user's names, whose entries are closed.
    "models",
    # For a parent chart.
    "global",
}
"""Maps that may be open to any key. A name that is not here must be closed."""


def test_the_defaults_and_the_examples_are_valid() -> None:
    assert problems(default_values()) == []
    for path in EXAMPLES:
        values = yaml.load(path.read_text(), StrictLoader) or {}
        assert problems(values) == [], example_name(path)


def test_a_typo_beside_any_key_is_refused_with_its_path() -> None:
    """All typos at once, which is one validation; each must be named with the path it is at."""
    closed = [path for path in maps(default_values()) if not is_passthrough(path)]
    assert len(closed) > 30, "the walk found too few sections to mean anything"
    values = copy.deepcopy(default_values())
    for path in closed:
        for key in at(default_values(), path):
            at(values, path)[f"{key}x"] = None
    found = dict(text.split(": ", 1) for text in problems(values))
    accepted = [
        ".".join((*path, f"{key}x"))
        for path in closed
        for key in at(default_values(), path)
        if f"'{key}x'" not in found.get(".".join(path), "")
    ]
    assert accepted == []
    assert sum(len(at(default_values(), path)) for path in closed) > 150


def test_only_passthrough_maps_are_open() -> None:
    is_open = {".".join(path) for path in maps(default_values()) if is_passthrough(path)}
    unexpected = {name for name in is_open if name.split(".")[-1] not in PASSTHROUGH_NAMES}
    assert unexpected == set(), "close these with additionalProperties: false"


def test_passthrough_maps_take_any_key() -> None:
    """The keys that users add most often; each is a map that the chart copies as it is."""
    for values in (
        {"policy": {"nodeSelector": {"example.org/pool": "gpu"}}},
        {"policy": {"podAnnotations": {"example.org/a": "b"}}},
        {"reward": {"podLabels": {"example.org/a": "b"}}},
        {"trainer": {"affinity": {"nodeAffinity": {"anything": []}}}},
        {"trainer": {"config": {"kl": {"coefficient": 0.1}}}},
        {"commonLabels": {"team": "alignment"}},
        {"global": {"anything": {"of": "a parent chart"}}},
    ):
        assert problems(values) == [], values


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"reward": {"models": {"a": {"urii": "demo://sft"}}}}, "reward.models.a"),
        ({"reward": {"models": {"a": {"uri": "main"}}}}, "reward.models.a.uri"),
        ({"reward": {"models": {"A_b": {"uri": ""}}}}, "reward.models"),
        ({"reward": {"quotas": [{"caller": ["a"]}]}}, "reward.quotas.0"),
        ({"reward": {"quotas": [{"callers": []}]}}, "reward.quotas.0.callers"),
        (
            {"packed": {"quotas": [{"callers": ["a"], "queueShare": 5}]}},
            "packed.quotas.0.queueShare",
        ),
        ({"reference": {"quotas": [{"callers": ["a"], "burstTokens": 0.5}]}}, "burstTokens"),
        ({"trainer": {"audit": "on"}}, "trainer.audit"),
        ({"reward": {"http": {"route": {"hostnames": ["a_b"]}}}}, "reward.http.route.hostnames.0"),
    ],
)
def test_entries_of_lists_and_of_maps_by_name_are_closed(values: dict[str, Any], path: str) -> None:
    assert any(path in text.split(": ")[0] for text in problems(values)), problems(values)


def test_schema_describes_every_key_of_the_values() -> None:
    for path in maps(default_values()):
        if not is_passthrough(path):
            keys = set(at(default_values(), path))
            known = set(subschema(path).get("properties", {}))
            assert known <= keys | {"global"}, f"{path}: in the schema, not in values.yaml"


def _wrong_type(value: Any) -> Any:
    """A value of another type than the default's, which no key of this chart takes instead."""
    return {bool: "maybe", int: "many", float: "much", str: [1], list: "no list"}[type(value)]


def test_a_wrong_type_is_refused_with_its_path() -> None:
    wrong: list[str] = []
    values = copy.deepcopy(default_values())
    for path, value in leaves(default_values()):
        closed = all(not is_passthrough(path[:depth]) for depth in range(len(path)))
        if value is not None and closed:
            at(values, path[:-1])[path[-1]] = _wrong_type(value)
            wrong.append(".".join(path))
    found = {text.split(":")[0] for text in problems(values)}
    assert [name for name in wrong if name not in found] == [], "these take anything"
    assert len(wrong) > 100


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ('auth.mode="sometimes"', "auth.mode"),
        ("policy.replicas=-1", "policy.replicas"),
        ('reward.autoscaling.kind="vpa"', "reward.autoscaling.kind"),
        ('image.pullPolicy="Sometimes"', "image.pullPolicy"),
        ('image.digest="sha256:short"', "image.digest"),
        ("policy.model.uri=7", "policy.model.uri"),
        ("policy.gpu.count=-1", "policy.gpu.count"),
        ("policy.drain.delaySecondz=1", "delaySecondz"),
        ("networkPolicy.enabledd=true", "enabledd"),
        ("trainner={}", "trainner"),
        ("metrics.serviceMonitor.intervall=1", "intervall"),
    ],
)
def test_helm_refuses_it_and_says_where(helm: Path, setting: str, path: str) -> None:
    """The same through helm, which words the message in its own way."""
    with pytest.raises(RenderError) as refusal:
        render(settings=(setting,))
    message = str(refusal.value).replace("/", ".")
    assert path in message, message


@pytest.mark.parametrize(
    "uri",
    [
        "hf://org/name@main",
        "s3://bucket/path",
        "gs://bucket/path",
        "gcs://bucket/path",
        "https://models.example.org/path",
    ],
)
def test_a_model_comes_from_where_the_image_can_read(uri: str) -> None:
    """With drivers that the image holds, through ports that the NetworkPolicy opens."""
    assert problems({"policy": {"model": {"uri": uri}}}) == []
    assert parse_source(uri).kind in ("hub", "arrow", "http"), "fsspec needs a driver"


@pytest.mark.parametrize(
    "scheme",
    ["http", "ftp", "sftp", "hdfs", "webhdfs", "az", "abfs", "adl", "oss", "webdav", "file"],
)
def test_a_model_from_anywhere_else_is_refused(scheme: str) -> None:
    (problem,) = problems({"policy": {"model": {"uri": f"{scheme}://place/path"}}})
    assert problem.startswith("policy.model.uri: ")


def test_defaults_of_packed_services_are_those_of_the_values() -> None:
    """What the chart compares with to find a value that a packed service would ignore."""
    text = (CHART / "files" / "packed-defaults.yaml").read_text()
    known = yaml.load(text, StrictLoader)
    values = default_values()
    for service in ("policy", "reward", "reference"):
        makes_pods = set(values["packed"]) & set(values[service]) - {"enabled"}
        expected = {key: values[service][key] for key in makes_pods}
        assert {**known["all"], **known[service]} == expected, service
