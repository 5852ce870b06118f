"""The reward models that a configuration asks for."""

from __future__ import annotations

from kleash.reward.classifier import ClassifierModel
from kleash.reward.config import RewardConfig, RewardModelConfig
from kleash.reward.model import RewardModel
from kleash.rpc.requests import Limits


def load_model(name: str, config: RewardModelConfig, limits: Limits) -> RewardModel:
    """Load, check and warm up one model, to be served as ``name``. Raises UserError."""
    frozen = config.frozen().model_copy(update={"name": name})
    return ClassifierModel.load(frozen, limits)


def load_models(config: RewardConfig) -> dict[str, RewardModel]:
    """Every model of ``config`` by name. Raises UserError."""
    models: dict[str, RewardModel] = {}
    for name, section in config.entries().items():
        models[name] = load_model(name, section, config.limits)
    return models
