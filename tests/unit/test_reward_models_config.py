"""Which combinations of keys describe a reward model, and what is said of the others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kleash.base.config import load_config, parse_tree, save_config
from kleash.base.errors import ConfigError
from kleash.reward.config import RewardConfig

pytestmark = pytest.mark.unit

FOLDER = {"model": "folder"}
TWO = {"a": FOLDER, "b": {"function": "judge:score"}}


def parse(**keys: Any) -> RewardConfig:
    return parse_tree(RewardConfig, keys)


def several(**models: Any) -> RewardConfig:
    return parse(models=models, default=next(iter(models)))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, "one model (model, function or remote) or several (models.NAME.model, ...)"),
        (FOLDER | {"models": {"a": FOLDER}}, "this has both"),
        ({"model": "x", "remote": "y:1"}, "the reward service has model and remote; set one of"),
        ({"ensemble": ["a", "b"]}, "an ensemble stands under models, beside its members"),
        ({"models": {"a": {"dtype": "float32"}}}, "models.a has no model; set one of models.a"),
        (
            {"models": {"a": {"model": "x", "function": "m:f"}}},
            "models.a has model and function; set one of models.a.model, models.a.function",
        ),
        ({"models": {"a": FOLDER}, "device": "cpu"}, "device has no effect beside models"),
        ({"models": {"a": FOLDER}, "name": "b"}, "name has no effect beside models"),
        ({"models": {"a": FOLDER | {"name": "b"}}}, "models.a.name has no effect"),
        (
            {"models": {"a": {"function": "m:f", "dtype": "bfloat16"}}},
            "models.a.dtype has no effect for a function; leave it out",
        ),
        ({"remote": "x:1", "heads": {"a": 1.0}}, "heads has no effect for a remote"),
        (FOLDER | {"tokenizer": "x"}, "tokenizer has no effect for a model"),
        (FOLDER | {"penalty": 0.5}, "penalty has no effect for a model"),
        (FOLDER | {"heads": {"a": 0.0, "b": 0}}, "heads gives every head the weight 0"),
        ({"function": "judge.score"}, "function is 'judge.score'; it must be \"module:function\""),
        ({"function": "m:f", "pad_token": "x"}, "pad_token has no effect without tokenizer"),
        ({"models": TWO}, "several models need a default, one of a, b"),
    ],
)
def test_what_describes_no_model_is_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse(**keys)


@pytest.mark.parametrize(
    ("ensemble", "sentence"),
    [
        ({"ensemble": ["a", "z"]}, "models.e.ensemble names z, and models has e, a, b; use those"),
        ({"ensemble": ["a"]}, "models.e.ensemble is a; it needs at least two different models"),
        ({"ensemble": ["a", "a"]}, "models.e.ensemble is a, a; it needs at least two different"),
        ({"ensemble": ["a", "e"]}, "models.e.ensemble holds itself (e -> e)"),
        ({"combine": "penalized"}, 'models.e.penalty and models.e.combine = "penalized"'),
        ({"penalty": 0.5}, 'models.e.penalty and models.e.combine = "penalized"'),
        ({"combine": "least"}, "'models.e.combine'"),
        ({"combine": "penalized", "penalty": 0}, "'models.e.penalty'"),
        (
            {"combine": "min", "ensemble_weights": {"a": 1, "b": 2}},
            "models.e.ensemble_weights has no effect for the least of the scores",
        ),
        ({"ensemble_weights": {"a": 1}}, "must give each of a, b a weight above 0"),
        ({"ensemble_weights": {"a": 1, "b": 0}}, "must give each of a, b a weight above 0"),
        ({"device": "cpu"}, "models.e.device has no effect for an ensemble"),
    ],
)
def test_ensembles_that_cannot_be_are_refused(ensemble: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        several(e={"ensemble": ["a", "b"]} | ensemble, **TWO)


def test_an_ensemble_comes_after_its_members_whatever_the_order() -> None:
    config = several(
        top={"ensemble": ["low", "b"]}, low={"ensemble": ["b", "a"]}, **TWO, c={"remote": "x:1"}
    )
    assert list(config.entries()) == ["b", "a", "low", "top", "c"]
    assert config.default_name == "top"
    assert [each.kind for each in config.entries().values()] == [
        "function",
        "model",
        "ensemble",
        "ensemble",
        "remote",
    ]


def test_a_circle_of_ensembles_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"models\.x\.ensemble holds itself \(x -> y -> x\)"):
        several(x={"ensemble": ["y", "a"]}, y={"ensemble": ["x", "a"]}, **TWO)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"model": "/data/judge"}, "judge"),
        ({"model": "/data/judge", "name": "other"}, "other"),
        ({"function": "pack.judge:score"}, "score"),
        ({"remote": "x:1"}, "remote"),
        ({"remote": "x:1", "remote_model": "judge"}, "judge"),
    ],
)
def test_the_only_model_has_a_name(keys: dict[str, Any], name: str) -> None:
    config = parse(**keys)
    assert list(config.entries()) == [name]
    assert config.default_name == name


def test_a_resolved_configuration_is_read_back(tmp_path: Path) -> None:
    """It holds every key with its default, and none of those has an effect."""
    for number, config in enumerate((parse(**FOLDER), several(**TWO))):
        path = tmp_path / f"{number}.json"
        save_config(config, path)
        assert load_config(RewardConfig, [str(path)]) == config


def test_models_are_given_on_the_command_line() -> None:
    flags = "--models.a.model=x --models.a.heads.kind=0.5 --models.b.remote=y:1 --default=b"
    config = load_config(RewardConfig, flags.split())
    assert config.models["a"].heads == {"kind": 0.5}
    assert config.models["b"].remote == "y:1"
