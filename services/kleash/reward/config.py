"""Configuration of the reward service."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import pydantic

from kleash.lm.config import FrozenModelConfig, PlacedModelConfig
from kleash.rpc.requests import Limits

Kind = Literal["model", "function", "ensemble", "remote"]
"""The key that says what computes a score."""
Combination = Literal["mean", "min", "penalized"]

_PLACE_KEYS = tuple(name for name in PlacedModelConfig.model_fields if name != "name")
_KEYS: dict[Kind, tuple[str, ...]] = {
    "model": ("heads", *_PLACE_KEYS),
    "function": (
        "heads",
        "function_path",
        "function_timeout_s",
        "function_max_items",
        "tokenizer",
        "pad_token",
    ),
    "ensemble": ("combine", "penalty", "ensemble_weights", "ensemble_scores"),
    "remote": ("remote_model", "remote_revision", "remote_timeout_s"),
}
"""The keys that have an effect beside each of those."""


class RewardModelConfig(PlacedModelConfig):
    """One reward model: exactly one of model, function, ensemble and remote is given."""

    model: Path | None = None
    """Model folder in Hugging Face form, with safetensors weights."""
    heads: dict[str, float] = pydantic.Field(default_factory=dict)
    """Weight of each label of a model with several, by its name in the folder's id2label; the
    score is the weighted sum. Of a function, the weight of each number that it returns."""
    function: str = ""
    """Python function as "module:function"; it runs in a process of its own."""
    function_path: tuple[Path, ...] = ()
    """Folders in which the function's module lies, beside those that Python looks in."""
    function_timeout_s: float = pydantic.Field(default=30.0, gt=0)
    """Seconds that one call of the function may take; then its process is killed."""
    function_max_items: int = pydantic.Field(default=64, ge=1)
    """Items in one call of the function, at most."""
    tokenizer: Path | None = None
    """Folder with the tokenizer by which a function takes token ids and counts tokens."""
    ensemble: tuple[str, ...] = ()
    """Names of the models under ``models`` whose scores are combined."""
    combine: Combination = "mean"
    """How: the mean; the least (min); or the mean less ``penalty`` times the variance."""
    penalty: float | None = pydantic.Field(default=None, gt=0)
    """Factor of the variance, for combine = "penalized" alone."""
    ensemble_weights: dict[str, float] = pydantic.Field(default_factory=dict)
    """Weight of each member in the mean and in the variance, by name; equal when empty."""
    ensemble_scores: Literal["normalized", "raw"] = "normalized"
    """What of the members is combined: (score - mean) / std by each one's own figures, or the raw
    scores."""
    remote: str = ""
    """Address of a reward service behind this one: "host:port" or a gRPC target. TLS and token
    are those of the environment: KLEASH_TLS_*, KLEASH_TOKEN*."""
    remote_model: str = ""
    """Name of the model there; empty means that service's default."""
    remote_revision: str = ""
    """Revision that must be served there; empty takes the one that is served at the start."""
    remote_timeout_s: float = pydantic.Field(default=60.0, gt=0)
    """Seconds that one call of that service may take, unless its caller's deadline is earlier."""

    def frozen(self) -> FrozenModelConfig:
        """What loads the folder."""
        return FrozenModelConfig(
            **{name: getattr(self, name) for name in FrozenModelConfig.model_fields}
        )

    @property
    def kinds(self) -> list[Kind]:
        """The keys that say what computes the score; a usable model has one."""
        return [kind for kind in _KEYS if getattr(self, kind)]

    @property
    def kind(self) -> Kind:
        """The one key that says what computes the score."""
        [kind] = self.kinds
        return kind


class RewardConfig(RewardModelConfig):
    """The reward models and what a request may ask of them.

    One model: its keys stand here. Several: a section each under ``models``, by name.
    """

    models: dict[str, RewardModelConfig] = pydantic.Field(default_factory=dict)
    """Models by the name under which they are served."""
    default: str = ""
    """Name of the model for requests that name none; needed with several models."""
    limits: Limits = Limits()
    """Limits on requests, batches and the queue of each model."""
    admins: tuple[str, ...] = ()
    """Callers who may load and unload models, * and ? for any letters; empty for nobody. A server
    that does not ask who calls knows everybody by the empty name, which "*" lets in."""
    model_folders: tuple[Path, ...] = ()
    """Folders in which a model to load may lie."""
    keep_previous_s: float = pydantic.Field(default=600.0, ge=0)
    """Seconds that the revision before the newest is held for callers that name it."""

    @pydantic.model_validator(mode="after")
    def _check_models(self) -> Self:
        if bool(self.kinds) == bool(self.models):
            raise ValueError(
                "a reward service has either one model (model, function or remote) or several "
                f"(models.NAME.model, ...); this has {'both' if self.models else 'none'}"
            )
        if self.models:
            _check_keys(self, "", (), "beside models; set it in models.NAME")
        elif self.ensemble:
            raise ValueError("an ensemble stands under models, beside its members")
        else:
            check_entry(self, "")
        for name, section in self.models.items():
            check_entry(section, f"models.{name}")
            _check_members(section, name, self.models)
            if section.name:
                raise ValueError(f"models.{name}.name has no effect: it is served as '{name}'")
        if self.models and not self.default and len(self.models) > 1:
            raise ValueError(f"several models need a default, one of {', '.join(self.models)}")
        if self.default and self.default not in self.models:
            raise ValueError(
                f"default is '{self.default}' and is not among the models "
                f"({', '.join(self.models) or 'there is one, without a section'})"
            )
        if self.admins and not self.model_folders:
            raise ValueError("admins can load nothing without model_folders")
        members_first(self.models)
        return self

    def entries(self) -> dict[str, RewardModelConfig]:
        """Each model by name, members of ensembles before them, the only one under its name."""
        if self.models:
            return {name: self.models[name] for name in members_first(self.models)}
        given = {
            "model": self.model.resolve().name if self.model else "",
            "function": self.function.partition(":")[2],
            "remote": self.remote_model or "remote",
        }
        return {self.name or given[self.kind]: self}

    @property
    def default_name(self) -> str:
        """Name of the model for requests that name none."""
        return self.default or next(iter(self.entries()))


def check_entry(section: RewardModelConfig, place: str) -> None:
    """Raise ValueError unless one model is given, and only keys that have an effect for it.

    ``place`` is the section's path; empty for the whole configuration.
    """
    prefix = f"{place}." if place else ""
    if len(section.kinds) != 1:
        wanted = f"set one of {', '.join(prefix + kind for kind in _KEYS)}"
        have = f"has {' and '.join(section.kinds)}" if section.kinds else "has no model"
        raise ValueError(f"{place or 'the reward service'} {have}; {wanted}")
    kind = section.kind
    article = "an" if kind == "ensemble" else "a"
    used = (*_KEYS[kind], kind, "name")
    _check_keys(section, prefix, used, f"for {article} {kind}; leave it out")
    if section.heads and not any(section.heads.values()):
        raise ValueError(f"{prefix}heads gives every head the weight 0; give one another weight")
    if kind == "function":
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", section.function):
            raise ValueError(
                f"{prefix}function is '{section.function}'; it must be \"module:function\""
            )
        if section.pad_token is not None and section.tokenizer is None:
            raise ValueError(f"{prefix}pad_token has no effect without {prefix}tokenizer")
    if (section.combine == "penalized") != (section.penalty is not None):
        raise ValueError(
            f'{prefix}penalty and {prefix}combine = "penalized" have an effect only together'
        )
    if section.combine == "min" and section.ensemble_weights:
        raise ValueError(f"{prefix}ensemble_weights has no effect for the least of the scores")


def members_first(models: Mapping[str, RewardModelConfig]) -> list[str]:
    """Names in an order in which each ensemble stands after its members.

    Raises ValueError for an ensemble that is a member of itself.
    """
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            loop = " -> ".join([*above[above.index(name) :], name])
            raise ValueError(f"models.{name}.ensemble holds itself ({loop}); leave it out of one")
        if name not in order:
            for member in models[name].ensemble:
                visit(member, (*above, name))
            order.append(name)

    for name in models:
        visit(name, ())
    return order


def _check_members(
    section: RewardModelConfig, name: str, models: Mapping[str, RewardModelConfig]
) -> None:
    place, members = f"models.{name}.ensemble", section.ensemble
    if unknown := [each for each in members if each not in models]:
        raise ValueError(
            f"{place} names {', '.join(unknown)}, and models has {', '.join(models)}; use those"
        )
    if members and len(set(members)) < max(len(members), 2):
        raise ValueError(f"{place} is {', '.join(members)}; it needs at least two different models")
    weights = section.ensemble_weights
    if weights and (set(weights) != set(members) or min(weights.values()) <= 0):
        raise ValueError(
            f"models.{name}.ensemble_weights must give each of {', '.join(members)} a weight above "
            f"0; it is {weights}"
        )


def _check_keys(section: RewardModelConfig, prefix: str, used: tuple[str, ...], why: str) -> None:
    """Raise ValueError for a key that is set and not among those that are used."""
    for key, field in RewardModelConfig.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if key not in used and getattr(section, key) != default:
            raise ValueError(f"{prefix}{key} has no effect {why}")
