"""Models with a scalar head: the reward model (score at the last token) and the value network.

B sequences, S positions, T response positions. Heads compute in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kleash.base.errors import ModelError
from kleash.lm.config import Dtype
from kleash.lm.load import load_causal_lm, load_sequence_classifier
from kleash.lm.sequences import PackedBatch


@dataclass(frozen=True)
class Normalization:
    """Affine normalization of a reward model's raw score: (score - mean) / std.

    Chosen so that reference responses score mean 0; stored in the folder's config.json as
    ``kleash_normalization``.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ModelError(
                "a reward normalization needs a finite mean and a positive std; "
                f"got mean {self.mean}, std {self.std}."
            )

    @staticmethod
    def of(config: Any) -> Normalization:
        """Read it from a model configuration; the identity when there is none."""
        stored = getattr(config, "kleash_normalization", None) or {}
        try:
            return Normalization(float(stored.get("mean", 0.0)), float(stored.get("std", 1.0)))
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(
                f"config.json: kleash_normalization is {stored!r}, which cannot be used: {error}"
            ) from None

    def store(self, config: Any) -> None:
        """Write it into a model configuration."""
        config.kleash_normalization = {"mean": self.mean, "std": self.std}


def reward_model_from_causal_lm(
    folder: Path | str, *, seed: int, dtype: Dtype = "float32", device: str = "cpu"
) -> Any:
    """A one-label sequence classifier: the weights of the causal LM in ``folder``, a fresh head.

    Head ~ N(0, 1/sqrt(d + 1)), bias 0 (Ziegler et al. 2019, lm-human-preferences; N+ detail 11).
    """
    import transformers

    causal = load_causal_lm(folder, dtype=dtype, device=device)
    causal.config.num_labels = 1
    try:
        model = transformers.AutoModelForSequenceClassification.from_config(
            causal.config, dtype=getattr(torch, dtype)
        )
    except ValueError:
        raise ModelError(
            f"transformers has no sequence classifier for model type '{causal.config.model_type}' "
            f"of {folder}; use a model that has one (Llama, Qwen, Mistral, Gemma, GPT-2, ...)."
        ) from None
    check_scalar_head(model, folder)
    getattr(model, model.base_model_prefix).load_state_dict(
        getattr(causal, causal.base_model_prefix).state_dict()
    )
    generator = torch.Generator().manual_seed(seed)
    weight = model.score.weight
    fresh = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1)
    with torch.no_grad():
        weight.copy_(fresh)
    return model.to(device).eval()


def check_scalar_head(model: Any, folder: Path | str) -> None:
    """Raise ModelError unless the model is a backbone and one linear layer named ``score``."""
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
        raise ModelError(
            f"the model in {folder} ({type(model).__name__}) has no linear one-label head named "
            "'score'; a reward model is a causal language model with such a head, as "
            "AutoModelForSequenceClassification makes it."
        )


def position_scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Raw scalar-head output at every position: (B, S) float32. ids (B, S) right-padded."""
    return position_logits(model, ids).squeeze(-1)


def position_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Raw output of the head at every position: (B, S, labels) float32. ids right-padded."""
    return project(model.score, backbone_hidden(model, ids, use_cache=False))


def backbone_hidden(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """What the head reads at every position, (B, S, hidden), with ``options`` of the backbone."""
    backbone = getattr(model, model.base_model_prefix)
    return backbone(input_ids=ids, **options).last_hidden_state


def last_token_scores(model: Any, batch: PackedBatch) -> torch.Tensor:
    """Raw reward-model score at the last real token of each row: (B,) float32."""
    return position_scores(model, batch.ids).gather(1, batch.lengths[:, None] - 1).squeeze(1)


class ValueModel(torch.nn.Module):
    """The value network: a backbone and a scalar head with bias.

    Initialised from the reward model with its normalization folded into the head, so that the
    value of the last token starts as the normalized score (Stiennon et al. 2020, section 3; N+
    detail 22).
    """

    def __init__(self, backbone: torch.nn.Module, head: torch.nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @staticmethod
    def from_reward_model(folder: Path | str, *, device: str = "cpu") -> ValueModel:
        """Load from a reward-model folder."""
        model = load_sequence_classifier(folder, device=device)
        check_scalar_head(model, folder)
        normalization = Normalization.of(model.config)
        head = torch.nn.Linear(model.score.in_features, 1, device=device)
        raw_bias = model.score.bias.item() if model.score.bias is not None else 0.0
        with torch.no_grad():
            head.weight.copy_(model.score.weight / normalization.std)
            head.bias.fill_((raw_bias - normalization.mean) / normalization.std)
        return ValueModel(getattr(model, model.base_model_prefix), head)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Values before each response token, (B, T) float32, zero outside of the mask.

        V_t is read at the position before token t, that is, before the token is emitted.
        """
        hidden = self.backbone(input_ids=batch.ids, use_cache=False).last_hidden_state
        values = project(self.head, hidden).squeeze(-1)
        return values.gather(1, batch.response_columns(offset=-1)) * batch.response_mask


def project(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """A linear head in float32."""
    bias = head.bias.float() if head.bias is not None else None
    # Autocast would take the float32 operands back to bfloat16.
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)
