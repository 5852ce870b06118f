"""Logits of rows that begin alike, with each shared beginning computed once.

    pass 1: prefixes, padded on the left     pass 2: the rest of each row behind the keys and
            [··PPPP]                                 values of its prefix, padded on the right
            [QQQQQQ]                                 [··PPPP|rrr]
                                                     [··PPPP|r··]
                                                     [QQQQQQ|rr·]

Between a prefix and a rest there are no pads, so that a mask which counts columns (a sliding
window) counts positions. Which rows share what is in shared_prefixes.py.

B rows, S positions, L labels, P columns of prefixes, H heads, D head size.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kleash.lm.heads import backbone_hidden, position_logits, project
from kleash.lm.sequences import PackedBatch, TokenSequence, pack, passes
from kleash.lm.shared_prefixes import ReusePlan, SharedPrefix, plan_reuse

logger = logging.getLogger(__name__)

_NEEDED = ("attention_mask", "position_ids", "past_key_values")
# Kinds of RoPE whose frequencies depend on the longest row of the forward pass.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
PROBE_PREFIXES = (24, 17)
PROBE_RESTS = (3, 1, 6, 2)


class PositionLogits:
    """Logits of every position of rows of a causal classifier with a head named ``score``."""

    def __init__(self, model: Any, *, reuses_prefixes: bool) -> None:
        self._model = model
        self.reuses_prefixes = reuses_prefixes

    @staticmethod
    def examine(model: Any) -> PositionLogits:
        """Find out whether prefixes can be reused: a probe must give the same logits."""
        return PositionLogits(model, reuses_prefixes=_can_reuse(model))

    @torch.inference_mode()
    def of(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(length of the row, L) float32 of each row of int32 ids; each has at least one."""
        plan = plan_reuse(rows) if self.reuses_prefixes else None
        return _whole(self._model, rows) if plan is None else _reused(self._model, rows, plan)

    @torch.inference_mode()
    def whole(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The same without reuse."""
        return _whole(self._model, rows)


def _whole(model: Any, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    results: dict[int, np.ndarray] = {}
    for group in passes([len(ids) for ids in rows], model.device):
        batch = _packed([rows[row] for row in group], model)
        logits_BSL = position_logits(model, batch.ids).cpu().numpy()
        for row, logits_SL in zip(group, logits_BSL, strict=True):
            results[row] = logits_SL[: len(rows[row])]
    return [results[row] for row in range(len(rows))]


def _packed(rows: Sequence[np.ndarray], model: Any) -> PackedBatch:
    return pack([TokenSequence(ids, len(ids)) for ids in rows], model.device)


def _reused(model: Any, rows: Sequence[np.ndarray], plan: ReusePlan) -> list[np.ndarray]:
    results: dict[int, np.ndarray] = {}
    if plan.others:
        others = _whole(model, [rows[row] for row in plan.others])
        results.update(zip(plan.others, others, strict=True))
    cache = _PrefixCache(_num_layers(model))
    heads = _prefix_pass(model, rows, plan.prefixes, cache)
    members = [(at, row) for at, prefix in enumerate(plan.prefixes) for row in prefix.rows]
    lengths = [len(rows[row]) - plan.prefixes[at].length for at, row in members]
    for group in passes(lengths, model.device):
        its = [members[member] for member in group]
        rests = _rest_pass(model, rows, plan.prefixes, cache, its)
        for (at, row), rest in zip(its, rests, strict=True):
            results[row] = np.concatenate([heads[at], rest])
    return [results[row] for row in range(len(rows))]


def _prefix_pass(
    model: Any, rows: Sequence[np.ndarray], prefixes: Sequence[SharedPrefix], cache: _PrefixCache
) -> list[np.ndarray]:
    """Logits of each prefix, (its length, L); ``cache`` keeps keys and values."""
    width = max(prefix.length for prefix in prefixes)
    ids_BS = np.zeros((len(prefixes), width), dtype=np.int64)
    for at, prefix in enumerate(prefixes):
        ids_BS[at, width - prefix.length :] = rows[prefix.rows[0]][: prefix.length]
    pads_B = torch.tensor([width - prefix.length for prefix in prefixes], device=model.device)
    columns_S = torch.arange(width, device=model.device)
    mask_BS = columns_S >= pads_B[:, None]
    hidden = backbone_hidden(
        model,
        torch.from_numpy(ids_BS).to(model.device),
        # Without a mask attention takes the fast path of a causal one.
        attention_mask=mask_BS.long() if pads_B.any() else None,
        position_ids=(columns_S - pads_B[:, None]).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    logits_BSL = project(model.score, hidden).cpu().numpy()
    cache.finish_prefixes(mask_BS)
    return [logits_BSL[at, width - prefix.length :] for at, prefix in enumerate(prefixes)]


def _rest_pass(
    model: Any,
    rows: Sequence[np.ndarray],
    prefixes: Sequence[SharedPrefix],
    cache: _PrefixCache,
    members: Sequence[tuple[int, int]],
) -> list[np.ndarray]:
    """Logits of what follows the prefix in each member: (place of its prefix, row)."""
    rests = [rows[row][prefixes[at].length :] for at, row in members]
    batch = _packed(rests, model)
    columns_S = torch.arange(batch.ids.shape[1], device=model.device)
    starts_B = torch.tensor([prefixes[at].length for at, _ in members], device=model.device)
    cache.start_rests(torch.tensor([at for at, _ in members], device=model.device))
    mask_BS = columns_S < batch.lengths[:, None]
    hidden = backbone_hidden(
        model,
        batch.ids,
        attention_mask=torch.cat([cache.prefix_mask, mask_BS], dim=1).long(),
        # Pads stay within the positions that the model has.
        position_ids=starts_B[:, None] + columns_S.minimum(batch.lengths[:, None] - 1),
        past_key_values=cache,
        use_cache=True,
    )
    logits_BSL = project(model.score, hidden).cpu().numpy()
    return [logits_SL[: len(ids)] for ids, logits_SL in zip(rests, logits_BSL, strict=True)]


class _PrefixCache(Cache):
    """Keys and values of prefixes, which every row of a later forward reads for itself."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_PrefixLayer(self) for _ in range(num_layers)])
        self.width = 0
        self.row_prefixes: torch.Tensor | None = None
        self._masks = torch.empty(0)

    def finish_prefixes(self, mask_BS: torch.Tensor) -> None:
        """The forward over the prefixes is done; ``mask_BS`` is False at their pads."""
        self.width, self._masks = mask_BS.shape[1], mask_BS

    def start_rests(self, row_prefixes: torch.Tensor) -> None:
        """Row i of the next forward follows prefix ``row_prefixes[i]``."""
        self.row_prefixes = row_prefixes

    @property
    def prefix_mask(self) -> torch.Tensor:
        """(B, P) bool for the rows of the next forward."""
        return self._masks[self.row_prefixes]


class _PrefixLayer(CacheLayerMixin):
    """One layer's (prefixes, H, P, D). Copies for rows last as long as one layer's attention."""

    def __init__(self, cache: _PrefixCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002  part of the interface
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._cache.row_prefixes
        if rows is None:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        assert self.keys is not None, "a layer took no part in the pass over the prefixes"
        assert self.values is not None
        return (
            torch.cat([self.keys.index_select(0, rows), key_states], dim=2),
            torch.cat([self.values.index_select(0, rows), value_states], dim=2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.width + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.width

    def get_max_length(self) -> int:
        return -1


def _num_layers(model: Any) -> int:
    return len(DynamicCache(config=model.config.get_text_config()).layers)


def _can_reuse(model: Any) -> bool:
    """Whether the model is of a kind that prefixes can be reused with, and a probe agrees."""
    config = model.config.get_text_config()
    backbone = getattr(model, model.base_model_prefix)
    taken = inspect.signature(backbone.forward).parameters
    layers = DynamicCache(config=config).layers
    if not all(name in taken for name in _NEEDED) or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    ):
        return False
    if getattr(config, "attention_chunk_size", None) or _has_length_dependent_rope(config):
        return False
    prefixes, rests = PROBE_PREFIXES, PROBE_RESTS
    if max(prefixes) + max(rests) > getattr(config, "max_position_embeddings", 2**31):
        return False
    try:
        return _probe_agrees(model, prefixes, rests)
    except Exception as error:
        # Third-party code that was never called like this: without reuse it serves as well.
        logger.warning("prompt prefixes are not reused: the probe failed (%r)", error)
        return False


def _has_length_dependent_rope(config: Any) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [each for each in parameters.values() if isinstance(each, dict)]
    kinds = [each.get("rope_type") for each in [parameters, *by_layer]]
    return any(kind in _LENGTH_DEPENDENT_ROPE for kind in kinds)


@torch.inference_mode()
def _probe_agrees(model: Any, prefixes: Sequence[int], rests: Sequence[int]) -> bool:
    """Two prefixes of different lengths, each with every rest, against the rows as wholes."""
    vocab_size = model.get_input_embeddings().num_embeddings
    rows, shared = [], []
    for at, length in enumerate(prefixes):
        prefix = (7 * np.arange(length) + at + 5) % vocab_size
        first = len(rows)
        for rest in rests:
            tail = (11 * np.arange(rest) + rest + 3) % vocab_size
            rows.append(np.concatenate([prefix, tail]).astype(np.int32))
        shared.append(SharedPrefix(length, tuple(range(first, len(rows)))))
    whole = _whole(model, rows)
    reused = _reused(model, rows, ReusePlan(tuple(shared), ()))
    room = 1e-4 if model.dtype == torch.float32 else 16 * torch.finfo(model.dtype).eps
    scale = max(1.0, *(float(np.abs(each).max()) for each in whole))
    return all(
        np.allclose(one, two, rtol=0, atol=room * scale)
        for one, two in zip(whole, reused, strict=True)
    )
