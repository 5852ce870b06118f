"""A Python function of the operator as a reward model, in a process of its own.

    def score(items: list[dict]) -> list[float]:
        return [float(len(item["response"])) for item in items]

It takes a list of items and returns a list with one entry for each, in order: a number, an
Exception for an item that cannot be scored, or a dictionary of numbers by name when the
configuration gives ``heads`` a weight each. An item is a dictionary:

    conversation   messages   [{"role": "user", "content": "..."}, ...]
                   prompt     content of the last user turn before the answer
                   response   content of the last turn when it is the assistant's, else ""
    text           text
    token ids      text       all of them, decoded as they stand
                   prompt     the prompt's, decoded as they stand
                   response   the response's, decoded without special tokens

A function that raises is called again with each item alone, so that one item does not fail those
of other callers. One that takes longer than ``function_timeout_s`` is killed with its process, its
items fail, and the next call starts a new process; so does one whose process ends by itself, after
each item was tried alone.

The revision is the SHA-256 of the module's source file, the function's name and the heads; what
the module imports is not part of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kleash.base.errors import ConfigError
from kleash.common.v1 import common_pb2
from kleash.lm.digest import tokenizer_sha256
from kleash.lm.load import load_tokenizer
from kleash.reward.config import RewardModelConfig
from kleash.reward.function_process import (
    FunctionEnded,
    FunctionProcess,
    FunctionTimeout,
    FunctionUnusable,
)
from kleash.reward.inputs import as_messages, input_kind
from kleash.reward.model import (
    Component,
    Fault,
    ModelFacts,
    RawScore,
    RewardModel,
    ScoreJob,
    estimated_tokens,
)
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import PreconditionFailed
from kleash.rpc.requests import Limits, decode_sequence, too_long, unknown_id

logger = logging.getLogger(__name__)

_TOO_LONG = common_pb2.ITEM_STATUS_CODE_INPUT_TOO_LONG
_INVALID = common_pb2.ITEM_STATUS_CODE_INVALID_INPUT
_FAILED = common_pb2.ITEM_STATUS_CODE_FAILED


@dataclass(frozen=True)
class _Given:
    """What the function is given for one item."""

    content: dict[str, Any]
    num_tokens: int
    """Of its text; an estimate without a tokenizer."""


class FunctionModel(RewardModel):
    """A function that is started and ready."""

    uses_model_thread = False

    def __init__(
        self, name: str, config: RewardModelConfig, process: FunctionProcess, limits: Limits
    ) -> None:
        self._config = config
        self._process = process
        self._one_at_a_time = threading.Lock()
        self._tokenizer: Any = None
        if config.tokenizer is not None:
            self._tokenizer = load_tokenizer(
                config.tokenizer, pad_token=config.pad_token, needs_eos=False
            )
        super().__init__(
            ModelFacts(
                name=name,
                revision=_revision(process.sha256, config.heads),
                kind=reward_pb2.MODEL_KIND_FUNCTION,
                tokenizer_sha256=tokenizer_sha256(self._tokenizer) if self._tokenizer else "",
                max_item_tokens=limits.max_item_tokens or limits.max_batch_tokens,
                components=tuple(Component(*head) for head in config.heads.items()),
            )
        )

    @staticmethod
    def load(name: str, config: RewardModelConfig, limits: Limits) -> FunctionModel:
        """Start the process and import the function. Raises UserError."""
        process = FunctionProcess(config.function, config.function_path, name=name)
        try:
            process.start()
        except FunctionUnusable as error:
            raise ConfigError(f"the function of model '{name}': {error}") from None
        try:
            return FunctionModel(name, config, process, limits)
        except BaseException:
            process.stop()
            raise

    def prepare(
        self,
        items: Sequence[reward_pb2.ScoreItem],
        options: reward_pb2.ScoreOptions,  # noqa: ARG002 - nothing of them is for a function
        place: str,
    ) -> list[ScoreJob | Fault]:
        """What the function is given for each item. Inputs are not truncated."""
        return [self._job(item, place.format(index)) for index, item in enumerate(items)]

    def count_tokens(self, items: Sequence[reward_pb2.ScoreItem], place: str) -> list[int | Fault]:
        """Tokens of each item's text, without those of a chat template."""
        if self._tokenizer is None:
            raise PreconditionFailed(
                f"the model '{self.facts.name}' is a function without a tokenizer, so it counts no "
                "tokens; its operator can set one.",
                reason="NO_TOKENIZER",
            )
        given = [self._read(item, place.format(index)) for index, item in enumerate(items)]
        return [each if isinstance(each, tuple) else each.num_tokens for each in given]

    def compute(self, jobs: list[ScoreJob]) -> list[RawScore]:
        """Call the function, with so many items at a time as it takes."""
        step = self._config.function_max_items
        with self._one_at_a_time:
            parts = [self._score(jobs[at : at + step]) for at in range(0, len(jobs), step)]
        return [score for part in parts for score in part]

    def close(self) -> None:
        """Kill the process, once a call that is under way is over."""
        with self._one_at_a_time:
            self._process.stop()

    def _score(self, jobs: list[ScoreJob]) -> list[RawScore]:
        limit_s = self._config.function_timeout_s
        try:
            answers = self._process.call([job.content for job in jobs], limit_s)
            return [self._raw(answer) for answer in answers]
        except FunctionTimeout:
            fault = (
                f"the function took longer than {limit_s:g} s for {len(jobs)} items and was "
                "stopped; its operator can raise function_timeout_s or lower function_max_items."
            )
        except FunctionEnded as error:
            if len(jobs) > 1:
                return [self._score([job])[0] for job in jobs]
            fault = f"the function's process {error}."
        except FunctionUnusable as error:
            fault = f"the function cannot be started again: {error}"
        logger.warning("model '%s': %s", self.facts.name, fault)
        return [RawScore(fault=(_FAILED, fault))] * len(jobs)

    def _raw(self, answer: dict[str, Any]) -> RawScore:
        num_tokens = None if self._tokenizer else 0
        heads = self._config.heads
        if "error" in answer:
            return RawScore(fault=(_FAILED, f"the function failed: {answer['error']}."))
        if "score" in answer and not heads:
            return RawScore(answer["score"], num_tokens=num_tokens)
        parts = answer.get("parts")
        if parts is None or parts.keys() != heads.keys():
            returned = "a number" if parts is None else f"the parts {', '.join(parts) or 'none'}"
            expected = f"are {', '.join(heads)}" if heads else "names none"
            return RawScore(
                fault=(_FAILED, f"the function returned {returned}, and its heads {expected}.")
            )
        score = sum(weight * parts[name] for name, weight in heads.items())
        components = tuple(parts[name] for name in heads)
        return RawScore(score, components=components, num_tokens=num_tokens)

    def _job(self, item: reward_pb2.ScoreItem, place: str) -> ScoreJob | Fault:
        given = self._read(item, place)
        if isinstance(given, tuple):
            return given
        if fault := too_long(given.num_tokens, self.facts.max_item_tokens):
            return _TOO_LONG, f"{fault[:-1]}; the inputs of a function are not truncated."
        return ScoreJob(given.content, max(given.num_tokens, 1))

    def _read(self, item: reward_pb2.ScoreItem, place: str) -> _Given | Fault:
        kind = input_kind(item, place)
        if kind == "tokens":
            return self._read_tokens(item.tokens, f"{place}.tokens")
        if kind == "text":
            return _Given({"text": item.text}, self._count([item.text]))
        messages = as_messages(item.conversation)
        if not messages:
            return _INVALID, "the conversation has no messages."
        is_answered = messages[-1]["role"] == "assistant"
        before = messages[:-1] if is_answered else messages
        asked = [turn["content"] for turn in before if turn["role"] == "user"]
        content = {
            "messages": messages,
            "prompt": asked[-1] if asked else "",
            "response": messages[-1]["content"] if is_answered else "",
        }
        return _Given(content, self._count([turn["content"] for turn in messages]))

    def _read_tokens(self, tokens: common_pb2.TokenSequence, field: str) -> _Given | Fault:
        if self._tokenizer is None:
            raise PreconditionFailed(
                f"{field}: the model '{self.facts.name}' is a function without a tokenizer; send "
                "text or a conversation.",
                reason="NO_TOKENIZER",
                field=field,
            )
        ids, start = decode_sequence(
            tokens, tokenizer_sha256=self.facts.tokenizer_sha256, field=field
        )
        if not len(ids):
            return _INVALID, "the input has no tokens."
        if fault := unknown_id(ids, len(self._tokenizer)):
            return _INVALID, fault
        content = {
            "text": self._decoded(ids),
            "prompt": self._decoded(ids[:start]),
            "response": self._decoded(ids[start:], skip_special_tokens=True),
        }
        return _Given(content, len(ids))

    def _decoded(self, ids: np.ndarray, *, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(
            ids.tolist(),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def _count(self, texts: list[str]) -> int:
        if self._tokenizer is None:
            return sum(map(estimated_tokens, texts))
        rows = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return sum(map(len, rows))


def _revision(sha256: str, heads: Mapping[str, float]) -> str:
    """Digest of the source file and the function's name, and of the heads when there are some."""
    if not heads:
        return f"sha256:{sha256}"
    text = json.dumps([sha256, list(heads.items())])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
