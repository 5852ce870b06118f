"""A Hugging Face sequence classifier as a reward model: token ids in, raw scores out.

B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kleash.base.errors import ModelError
from kleash.common.v1 import common_pb2
from kleash.lm.config import FrozenModelConfig
from kleash.lm.frozen import FrozenModel, load_frozen, warm_up
from kleash.lm.heads import Normalization, check_scalar_head, position_scores
from kleash.lm.load import load_sequence_classifier, read_lineage
from kleash.lm.sequences import TokenSequence, pack
from kleash.reward.inputs import InputEncoder, InputError
from kleash.reward.model import Fault, ModelFacts, RawScore, RewardModel, ScoreJob
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.requests import Limits, decode_sequence, too_long, unknown_id

_TOO_LONG = common_pb2.ITEM_STATUS_CODE_INPUT_TOO_LONG
_INVALID = common_pb2.ITEM_STATUS_CODE_INVALID_INPUT
_EMPTY: Fault = (_INVALID, "the input has no tokens.")


class ClassifierModel(RewardModel):
    """A loaded sequence classifier."""

    def __init__(self, frozen: FrozenModel, *, is_trained_here: bool) -> None:
        self.frozen = frozen
        self.encoder = InputEncoder(frozen.tokenizer, ends_with_eos=is_trained_here)
        super().__init__(
            ModelFacts(
                name=frozen.name,
                revision=frozen.revision,
                kind=reward_pb2.MODEL_KIND_CLASSIFIER,
                dtype=frozen.dtype,
                tokenizer_sha256=frozen.tokenizer_sha256,
                chat_template_sha256=frozen.chat_template_sha256,
                max_item_tokens=frozen.max_item_tokens,
                normalization=Normalization.of(frozen.model.config),
                supports_token_scores=True,
            )
        )

    @staticmethod
    def load(config: FrozenModelConfig, limits: Limits) -> ClassifierModel:
        """Load, check and warm up. Raises ModelError."""
        frozen = load_frozen(
            config,
            load_sequence_classifier,
            max_item_tokens=limits.max_item_tokens,
            max_batch_tokens=limits.max_batch_tokens,
        )
        check_scalar_head(frozen.model, config.model)
        model = ClassifierModel(frozen, is_trained_here=bool(read_lineage(config.model)))
        model._check_causal(config)
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
        batch = pack(
            [TokenSequence(job.content, job.num_tokens) for job in jobs], self.frozen.device
        )
        positions_BS = position_scores(self.frozen.model, batch.ids).cpu().numpy()
        results = []
        for job, row in zip(jobs, positions_BS, strict=True):
            length = job.num_tokens
            token_scores = row[:length].copy() if job.wants_token_scores else None
            results.append(RawScore(float(row[length - 1]), token_scores))
        return results

    def _job(self, ids: np.ndarray, options: reward_pb2.ScoreOptions) -> ScoreJob | Fault:
        limit = self.frozen.max_item_tokens
        is_truncated = False
        if fault := too_long(len(ids), limit):
            if options.truncation == reward_pb2.TRUNCATION_LEFT:
                ids = ids[-limit:]
            elif options.truncation == reward_pb2.TRUNCATION_RIGHT:
                ids = ids[:limit]
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
            kind = item.WhichOneof("input")
            if kind == "text":
                texts[index] = item.text
            elif kind == "conversation":
                inputs[index] = self._encode_conversation(item.conversation)
            elif kind == "tokens":
                inputs[index], _ = decode_sequence(
                    item.tokens,
                    tokenizer_sha256=self.frozen.tokenizer_sha256,
                    field=f"{place.format(index)}.tokens",
                )
            else:
                raise InvalidRequest(
                    f"{place.format(index)} has no input; set conversation, text or tokens.",
                    field=f"{place.format(index)}.input",
                )
        encoded = self.encoder.encode_texts(list(texts.values()))
        for index, ids in zip(texts, encoded, strict=True):
            inputs[index] = ids
        return [self._checked(ids) for ids in inputs]

    def _encode_conversation(self, conversation: common_pb2.Conversation) -> np.ndarray | Fault:
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation.messages]
        try:
            return self.encoder.encode_conversation(messages)
        except InputError as error:
            return _INVALID, str(error)

    def _checked(self, ids: np.ndarray | Fault) -> np.ndarray | Fault:
        if isinstance(ids, tuple):
            return ids
        if not len(ids):
            return _EMPTY
        fault = unknown_id(ids, self.frozen.vocab_size)
        return (_INVALID, fault) if fault else ids

    @torch.inference_mode()
    def _check_causal(self, config: FrozenModelConfig) -> None:
        """Right padding is right only when no token sees a later one: two pads, same scores."""
        ids = torch.zeros((2, 4), dtype=torch.int64, device=self.frozen.device)
        ids[1, 2:] = self.frozen.vocab_size - 1
        scores = position_scores(self.frozen.model, ids)[:, :2]
        if not torch.allclose(scores[0], scores[1], rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ModelError(
                f"the model in {config.model} ({type(self.frozen.model).__name__}) lets tokens see "
                "later ones; a reward model must be a causal language model with a scalar head."
            )

    def _score_zeros(self, lengths: list[int]) -> None:
        self.compute([ScoreJob(np.zeros(length, dtype=np.int32), length) for length in lengths])
