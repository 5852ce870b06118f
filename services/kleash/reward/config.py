"""Configuration of the reward service."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pydantic

from kleash.lm.config import FrozenModelConfig, PlacedModelConfig
from kleash.rpc.requests import Limits


class RewardModelConfig(PlacedModelConfig):
    """One reward model."""

    model: Path | None = None
    """Model folder in Hugging Face form, with safetensors weights."""

    def frozen(self) -> FrozenModelConfig:
        """What loads the folder."""
        return FrozenModelConfig(
            **{name: getattr(self, name) for name in FrozenModelConfig.model_fields}
        )

    @property
    def is_given(self) -> bool:
        """Whether it says what computes the score."""
        return self.model is not None


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
        if self.is_given == bool(self.models):
            raise ValueError(
                "a reward service has either one model (model) or several (models.NAME.model); "
                f"this has {'both' if self.models else 'none'}"
            )
        for name, section in self.models.items():
            if not section.is_given:
                raise ValueError(f"models.{name} has no model; set models.{name}.model")
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
        return self

    def entries(self) -> dict[str, RewardModelConfig]:
        """Each model by name, members of others before them, the default one under its name."""
        if self.models:
            return dict(self.models)
        assert self.model is not None
        return {self.name or self.model.resolve().name: self}

    @property
    def default_name(self) -> str:
        """Name of the model for requests that name none."""
        return self.default or next(iter(self.entries()))
