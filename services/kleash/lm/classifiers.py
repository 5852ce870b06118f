"""Sequence classifiers of any kind, as a reward model scores with them: the logits of each row.

    causal     backbone and a linear layer named ``score``, read at the last token; right padding
               needs no mask, and every position has logits
    encoder    tokens see later ones: transformers' own forward with a mask over the pads

Which of the two a model is, two forward passes tell when it is loaded, not its name.

B rows, S positions, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kleash.base.errors import ModelError
from kleash.lm.heads import position_logits
from kleash.lm.sequences import PackedBatch, TokenSequence, pack, passes

PROBE_LENGTH = 8
PROBE_CUT = 5
"""Tokens of the probe that stay as they are."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier, and how its logits are read."""

    model: Any
    is_causal: bool
    """No token sees a later one: ``position_logits`` are those of each token's own prefix."""
    pad_id: int
    """What an encoder's rows are filled with."""

    @property
    def num_labels(self) -> int:
        return int(self.model.config.num_labels)

    def row_logits(self, batch: PackedBatch) -> torch.Tensor:
        """Raw logits of each row, (B, L) float32: no sigmoid, no softmax."""
        if self.is_causal:
            return _at_last_token(position_logits(self.model, batch.ids), batch.lengths)
        columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        mask_BS = columns < batch.lengths[:, None]
        ids_BS = batch.ids.masked_fill(~mask_BS, self.pad_id)
        return self.model(input_ids=ids_BS, attention_mask=mask_BS.long()).logits.float()


@torch.inference_mode()
def row_logits(classifier: Classifier, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Raw logits of each row of int32 ids, (L,) float32."""
    device = classifier.model.device
    results: dict[int, np.ndarray] = {}
    for group in passes([len(ids) for ids in rows], device):
        batch = pack([TokenSequence(rows[row], len(rows[row])) for row in group], device)
        logits_BL = classifier.row_logits(batch).cpu().numpy()
        results.update(zip(group, logits_BL, strict=True))
    return [results[row] for row in range(len(rows))]


@torch.inference_mode()
def examine(model: Any, folder: Path | str, *, pad_id: int) -> Classifier:
    """Find out how the logits of ``model`` are read. Raises ModelError when they cannot be.

    ``pad_id`` is the tokenizer's; the model's own counts more where it has one.
    """
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"the model in {folder} ({type(model).__name__}) is an encoder with a decoder, which "
            "is not served; use a causal language model or an encoder with a classifier."
        )
    if config.pad_token_id is None:
        config.pad_token_id = pad_id  # transformers takes no second row without one
    if _has_score_head(model) and _is_causal(model):
        return Classifier(model, is_causal=True, pad_id=0)
    classifier = Classifier(model, is_causal=False, pad_id=int(config.pad_token_id))
    _check_padding(classifier, folder)
    return classifier


def _has_score_head(model: Any) -> bool:
    head = getattr(model, "score", None)
    return isinstance(head, torch.nn.Linear) and head.out_features == model.config.num_labels


def _is_causal(model: Any) -> bool:
    """Whether the first tokens' logits stay when later tokens change, and the last are its own."""
    ids, other = _probe_ids(model), _probe_ids(model)
    other[:, PROBE_CUT:] = ids[:, :1]
    first, second = position_logits(model, ids)[0], position_logits(model, other)[0]
    own = model(input_ids=ids, use_cache=False).logits.float()[0]
    room = 8 * torch.finfo(model.dtype).eps
    return torch.allclose(
        first[:PROBE_CUT], second[:PROBE_CUT], rtol=room, atol=room, equal_nan=True
    ) and torch.allclose(first[-1], own, rtol=room, atol=room, equal_nan=True)


def _check_padding(classifier: Classifier, folder: Path | str) -> None:
    """Raise ModelError when a row's logits depend on the pads after it."""
    ids, model = _probe_ids(classifier.model), classifier.model
    short = _batch(ids[:, :PROBE_CUT], [PROBE_CUT])
    padded = _batch(ids.repeat(2, 1), [PROBE_CUT, PROBE_LENGTH])
    alone, beside = classifier.row_logits(short)[0], classifier.row_logits(padded)[0]
    if alone.shape != (classifier.num_labels,):
        raise ModelError(
            f"the model in {folder} ({type(model).__name__}) has logits of shape "
            f"{tuple(alone.shape)} for a text and {classifier.num_labels} labels; a reward model "
            "has one logit for each label."
        )
    room = 1e-4 if model.dtype == torch.float32 else 16 * torch.finfo(model.dtype).eps
    if not torch.allclose(alone, beside, rtol=room, atol=room, equal_nan=True):
        raise ModelError(
            f"the model in {folder} ({type(model).__name__}) lets tokens see later ones and scores "
            f"a text differently beside a longer one (by {(alone - beside).abs().max():.2g}); a "
            "reward model must be a causal language model with a head named 'score', or an "
            "encoder that heeds its attention mask."
        )


def _probe_ids(model: Any) -> torch.Tensor:
    """(1, S) ids that differ, as far as the vocabulary goes, and are no pads."""
    table = model.get_input_embeddings()
    count = torch.arange(PROBE_LENGTH, device=model.device)
    return ((table.num_embeddings // 2 + 3 * count) % table.num_embeddings)[None]


def _batch(ids: torch.Tensor, lengths: list[int]) -> PackedBatch:
    at = torch.tensor(lengths, device=ids.device)
    return PackedBatch(ids=ids, lengths=at, response_starts=at, num_response_columns=0)


def _at_last_token(logits_BSL: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(lengths), device=lengths.device)
    return logits_BSL[rows, lengths - 1]
