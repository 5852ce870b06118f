"""A Hugging Face sequence classifier as a reward model: token ids in, raw scores out.

With several labels the score is the weighted sum of the logits that ``heads`` names.

B rows, S positions, L labels, H heads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kleash.base.errors import ConfigError
from kleash.common.v1 import common_pb2
from kleash.lm.classifiers import Classifier, examine, row_logits
from kleash.lm.config import Dtype, FrozenModelConfig
from kleash.lm.frozen import BATCH_TOLERANCE, FrozenModel, load_frozen, warm_up
from kleash.lm.heads import Normalization
from kleash.lm.load import load_classifier, read_lineage
from kleash.lm.prefix_reuse import PositionLogits
from kleash.reward.inputs import InputEncoder, InputError, as_messages, input_kind
from kleash.reward.model import Component, Fault, ModelFacts, RawScore, RewardModel, ScoreJob
from kleash.reward.v1 import reward_pb2
from kleash.rpc.requests import Limits, decode_sequence, too_long, unknown_id

_TOO_LONG = common_pb2.ITEM_STATUS_CODE_INPUT_TOO_LONG
_INVALID = common_pb2.ITEM_STATUS_CODE_INVALID_INPUT
_EMPTY: Fault = (_INVALID, "the input has no tokens.")


class ClassifierModel(RewardModel):
    """A loaded sequence classifier."""

    def __init__(
        self,
        frozen: FrozenModel,
        classifier: Classifier,
        heads: Mapping[str, tuple[int, float]],
        *,
        is_trained_here: bool,
    ) -> None:
        """Args:
        heads: label and weight of each named head; empty for a model with one label.
        """
        self.frozen = frozen
        self.classifier = classifier
        self._position_logits = (
            PositionLogits.examine(frozen.model) if classifier.is_causal else None
        )
        self.encoder = InputEncoder(
            frozen.tokenizer,
            ends_with_eos=is_trained_here and classifier.is_causal,
            is_framed=not classifier.is_causal,
        )
        self._labels = [label for label, _ in heads.values()]
        self._weights_H = np.array([weight for _, weight in heads.values()], dtype=np.float32)
        super().__init__(
            ModelFacts(
                name=frozen.name,
                revision=_revision(frozen.revision, heads),
                kind=reward_pb2.MODEL_KIND_CLASSIFIER,
                dtype=frozen.dtype,
                tokenizer_sha256=frozen.tokenizer_sha256,
                chat_template_sha256=frozen.chat_template_sha256,
                max_item_tokens=frozen.max_item_tokens,
                normalization=Normalization.of(frozen.model.config),
                supports_token_scores=classifier.is_causal,
                components=tuple(Component(name, weight) for name, (_, weight) in heads.items()),
                batch_tolerance=_tolerance(frozen.dtype, heads),
            )
        )

    @staticmethod
    def load(
        config: FrozenModelConfig, limits: Limits, heads: Mapping[str, float] | None = None
    ) -> ClassifierModel:
        """Load, check and warm up. Raises UserError."""
        frozen = load_frozen(
            config,
            load_classifier,
            max_item_tokens=limits.max_item_tokens,
            max_batch_tokens=limits.max_batch_tokens,
            needs_eos=False,
        )
        classifier = examine(frozen.model, config.model, pad_id=frozen.tokenizer.pad_token_id)
        model = ClassifierModel(
            frozen,
            classifier,
            _named_heads(frozen, heads or {}, f"the model in {config.model}"),
            is_trained_here=bool(read_lineage(config.model)),
        )
        warm_up(frozen, limits.max_batch_tokens, model._score_zeros)
        return model

    def prepare(
        self,
        items: Sequence[reward_pb2.ScoreItem],
        options: reward_pb2.ScoreOptions,
        place: str,
    ) -> list[ScoreJob | Fault]:
        """Token ids of each item, truncated when the options ask for it."""
        return [
            ids if isinstance(ids, tuple) else self._job(ids, options)
            for ids in self._encode(items, place)
        ]

    def count_tokens(self, items: Sequence[reward_pb2.ScoreItem], place: str) -> list[int | Fault]:
        """Tokens of each item before truncation."""
        return [ids if isinstance(ids, tuple) else len(ids) for ids in self._encode(items, place)]

    @torch.inference_mode()
    def compute(self, jobs: list[ScoreJob]) -> list[RawScore]:
        """Score one batch."""
        if self._position_logits is None:
            rows = row_logits(self.classifier, [job.content for job in jobs])
            return [self._raw(logits_L) for logits_L in rows]
        results = []
        logits = self._position_logits.of([job.content for job in jobs])
        for job, logits_SL in zip(jobs, logits, strict=True):
            token_scores = self._sum(logits_SL) if job.wants_token_scores else None
            results.append(self._raw(logits_SL[-1], token_scores))
        return results

    def _raw(self, logits_L: np.ndarray, token_scores: np.ndarray | None = None) -> RawScore:
        parts = tuple(float(logits_L[label]) for label in self._labels)
        return RawScore(float(self._sum(logits_L[None])[0]), token_scores, parts)

    def _sum(self, logits_SL: np.ndarray) -> np.ndarray:
        """Score at each position, (S,) float32: the one logit, or the weighted sum of the heads.

        The heads are added in their order: a matrix product may add the same numbers in another
        order for another number of rows.
        """
        if not self._labels:
            return logits_SL[:, 0].copy()
        total_S = np.zeros(len(logits_SL), dtype=np.float32)
        for label, weight in zip(self._labels, self._weights_H, strict=True):
            total_S += weight * logits_SL[:, label]
        return total_S

    def _job(self, ids: np.ndarray, options: reward_pb2.ScoreOptions) -> ScoreJob | Fault:
        limit = self.frozen.max_item_tokens
        is_truncated = False
        if fault := too_long(len(ids), limit):
            if options.truncation == reward_pb2.TRUNCATION_LEFT:
                ids = self.encoder.cut(ids, limit, is_left=True)
            elif options.truncation == reward_pb2.TRUNCATION_RIGHT:
                ids = self.encoder.cut(ids, limit, is_left=False)
            else:
                return _TOO_LONG, fault
            is_truncated = True
        return ScoreJob(ids, len(ids), options.return_token_scores, is_truncated)

    def _encode(
        self, items: Sequence[reward_pb2.ScoreItem], place: str
    ) -> list[np.ndarray | Fault]:
        inputs: list[np.ndarray | Fault] = [_EMPTY] * len(items)
        texts: dict[int, str] = {}
        for index, item in enumerate(items):
            kind = input_kind(item, place.format(index))
            if kind == "text":
                texts[index] = item.text
            elif kind == "conversation":
                inputs[index] = self._encode_conversation(item.conversation)
            else:
                inputs[index], _ = decode_sequence(
                    item.tokens,
                    tokenizer_sha256=self.frozen.tokenizer_sha256,
                    field=f"{place.format(index)}.tokens",
                )
        encoded = self.encoder.encode_texts(list(texts.values()))
        for index, ids in zip(texts, encoded, strict=True):
            inputs[index] = ids
        return [self._checked(ids) for ids in inputs]

    def _encode_conversation(self, conversation: common_pb2.Conversation) -> np.ndarray | Fault:
        try:
            return self.encoder.encode_conversation(as_messages(conversation))
        except InputError as error:
            return _INVALID, str(error)

    def _checked(self, ids: np.ndarray | Fault) -> np.ndarray | Fault:
        if isinstance(ids, tuple):
            return ids
        if not len(ids):
            return _EMPTY
        fault = unknown_id(ids, self.frozen.vocab_size)
        return (_INVALID, fault) if fault else ids

    def _score_zeros(self, lengths: list[int]) -> None:
        """Compute rows of ``lengths``, each of them whole, which takes the most memory."""
        rows = [np.zeros(length, dtype=np.int32) for length in lengths]
        if self._position_logits is not None:
            self._position_logits.whole(rows)
        else:
            self.compute([ScoreJob(ids, len(ids)) for ids in rows])


def _named_heads(
    frozen: FrozenModel, weights: Mapping[str, float], what: str
) -> dict[str, tuple[int, float]]:
    """Label and weight of each head that counts, in the order of the labels.

    A model whose labels have no names (LABEL_0, LABEL_1, ...) takes those of ``weights`` in their
    order. Raises ConfigError.
    """
    names = {int(label): str(name) for label, name in frozen.model.config.id2label.items()}
    labels = [names.get(label, f"LABEL_{label}") for label in range(frozen.model.config.num_labels)]
    if len(labels) == 1:
        if weights:
            raise ConfigError(f"{what} has one label, so heads has no effect; leave it out.")
        return {}
    if not weights:
        raise ConfigError(
            f"{what} has {len(labels)} labels ({', '.join(labels)}); set heads to the weight of "
            f"each that counts, such as heads = {{ {labels[0]} = 1.0 }}."
        )
    is_nameless = all(name == f"LABEL_{label}" for label, name in enumerate(labels))
    if is_nameless and len(weights) == len(labels) and not set(weights) & set(labels):
        labels = list(weights)
    if unknown := [name for name in weights if name not in labels]:
        hint = " or give a name to each" if is_nameless else ""
        raise ConfigError(
            f"heads names {', '.join(unknown)}, and {what} has {', '.join(labels)}; use those"
            f"{hint}."
        )
    return {name: (label, weights[name]) for label, name in enumerate(labels) if name in weights}


def _tolerance(dtype: Dtype, heads: Mapping[str, tuple[int, float]]) -> float:
    """Of a sum of heads: each may be off by its own, times its weight."""
    return BATCH_TOLERANCE[dtype] * (sum(abs(weight) for _, weight in heads.values()) or 1.0)


def _revision(weights: str, heads: Mapping[str, tuple[int, float]]) -> str:
    """Digest of the weights, and of what makes one score of several logits."""
    if not heads:
        return weights
    text = json.dumps([weights, [[name, *head] for name, head in heads.items()]])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
