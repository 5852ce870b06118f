"""The optimizer of stages 1 and 2: AdamW, decay on matrices only."""

from __future__ import annotations

import torch

ADAM_EPSILON = 1e-5
"""Ziegler et al. 2019 and N+ train SFT, reward model and PPO with 1e-5, not Adam's 1e-8."""


def adamw(
    model: torch.nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    epsilon: float = ADAM_EPSILON,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms and biases (one dimension) never decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, eps=epsilon
    )
