"""The reward models that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping

from kleash.reward.classifier import ClassifierModel
from kleash.reward.config import RewardConfig, RewardModelConfig
from kleash.reward.ensemble import Ensemble
from kleash.reward.function import FunctionModel
from kleash.reward.model import RewardModel
from kleash.reward.remote import RemoteModel
from kleash.rpc.requests import Limits


def load_model(
    name: str,
    config: RewardModelConfig,
    limits: Limits,
    others: Mapping[str, RewardModel] | None = None,
) -> RewardModel:
    """Load, check and warm up one model, to be served as ``name``. Raises UserError.

    ``others`` are the models that are loaded already, among them the members of an ensemble.
    """
    match config.kind:
        case "model":
            frozen = config.frozen().model_copy(update={"name": name})
            return ClassifierModel.load(frozen, limits, config.heads)
        case "function":
            return FunctionModel.load(name, config, limits)
        case "remote":
            return RemoteModel.load(name, config, limits)
        case "ensemble":
            return Ensemble.of(name, config, others or {})


def load_models(config: RewardConfig) -> dict[str, RewardModel]:
    """Every model of ``config`` by name, members before ensembles. Raises UserError."""
    models: dict[str, RewardModel] = {}
    try:
        for name, section in config.entries().items():
            models[name] = load_model(name, section, config.limits, models)
    except BaseException:
        for model in models.values():
            model.close()
        raise
    return models
