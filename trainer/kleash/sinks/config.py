"""Configuration of the sinks; the same keys for every stage that has some."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self, get_args

import pydantic

from kleash.base.config import Config
from kleash.base.errors import ConfigError

Name = Literal["tensorboard", "wandb", "mlflow"]


class TensorBoardConfig(Config):
    """Event files."""

    folder: Path | None = None
    """Where they are written; null is tensorboard in the run folder."""


class WandbConfig(Config):
    """Weights & Biases; its key comes from WANDB_API_KEY or wandb login."""

    project: str = pydantic.Field(default="kleash", min_length=1)
    """Project that the run appears in."""
    entity: str | None = None
    """User or team; null is the key's own."""
    group: str | None = None
    """Runs that belong together, such as seeds of one configuration."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to wandb in the run folder, for wandb sync."""


class MLflowConfig(Config):
    """MLflow; its password or token comes from MLFLOW_TRACKING_PASSWORD or _TOKEN."""

    tracking_uri: str | None = None
    """Server (http://...) or database (sqlite:///...); null is MLFLOW_TRACKING_URI, and without
    that mlflow.db in the run folder."""
    experiment: str = pydantic.Field(default="kleash", min_length=1)
    """Experiment that the run appears in."""

    @pydantic.field_validator("tracking_uri")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        # The configuration is written to the run folder and shown by the trainer's service.
        if value and re.search(r"://[^/@]*:[^/@]*@", value):
            raise ValueError(
                "must not hold a password; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI"
            )
        return value


NAMES: tuple[Name, ...] = get_args(Name)
"""Each is the package that it imports, and the extra of kleash that brings it."""


class SinksConfig(Config):
    """Where figures and samples go beside the run folder. A sink that fails never ends a run."""

    use: tuple[Name, ...] = ()
    """Any of tensorboard, wandb and mlflow, as a list or with commas."""
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    """With tensorboard in use."""
    wandb: WandbConfig = WandbConfig()
    """With wandb in use."""
    mlflow: MLflowConfig = MLflowConfig()
    """With mlflow in use."""

    @pydantic.field_validator("use", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if len(set(self.use)) < len(self.use):
            raise ValueError(f"use names a sink twice: {', '.join(self.use)}")
        for name in NAMES:
            section, default = getattr(self, name), type(getattr(self, name))()
            if name not in self.use and section != default:
                raise ValueError(f"{name} has no effect without being in use; add it to sinks.use")
        return self


def check_packages(config: SinksConfig) -> None:
    """Raise ConfigError when a sink that is in use lacks its package."""
    for name in config.use:
        if find_spec(name) is None:
            raise ConfigError(
                f"sinks.use names {name}, and that package is not installed; "
                f"pip install 'kleash[{name}]', or take it out."
            )
