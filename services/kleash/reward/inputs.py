"""Text and conversations to token ids, as the reward model saw them in training.

A model that Kleash trained ends in the end-of-sequence token, where its score is read; what a chat
template writes after it (a newline) was never seen. Of any other causal model a conversation is
what the chat template writes, no more and no less. An encoder reads everything between the tokens
that its tokenizer frames a text with ([CLS] and [SEP]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from kleash.common.v1 import common_pb2
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import InvalidRequest

Messages = Sequence[dict[str, str]]

InputKind = Literal["conversation", "text", "tokens"]


class InputError(ValueError):
    """One input that cannot be turned into tokens; the message is a sentence."""


def input_kind(item: reward_pb2.ScoreItem, place: str) -> InputKind:
    """Which form the input has. Raises InvalidRequest for none; ``place`` is the item's path."""
    kind = item.WhichOneof("input")
    if kind is None:
        raise InvalidRequest(
            f"{place} has no input; set conversation, text or tokens.", field=f"{place}.input"
        )
    return kind


def as_messages(conversation: common_pb2.Conversation) -> list[dict[str, str]]:
    """Turns as chat templates and functions take them."""
    return [{"role": turn.role, "content": turn.content} for turn in conversation.messages]


class InputEncoder:
    """Turns inputs into ids with one tokenizer. Safe to call from several threads."""

    def __init__(self, tokenizer: Any, *, ends_with_eos: bool, is_framed: bool = False) -> None:
        """Args:
        ends_with_eos: conversations whose last turn is the assistant's end in the
            end-of-sequence token, as Kleash's training stages end them.
        is_framed: every input stands between the special tokens that the tokenizer adds, as an
            encoder needs it; else only the token that it begins every text with is added.
        """
        self._tokenizer = tokenizer
        self._ends_with_eos = ends_with_eos
        self._is_framed = is_framed
        self._rust = _rust_tokenizer(tokenizer)
        self._head, self._tail = self._frame() if is_framed else (self._added_bos(), [])

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32.

        Special tokens written in a text count as such. A tokenizer that begins every text with a
        beginning-of-sequence token does so here, unless the text has it already.
        """
        return [_int32(self._framed(ids)) for ids in self._encode(texts)]

    def encode_conversation(self, messages: Messages) -> np.ndarray:
        """Ids of a conversation under the chat template, int32. Raises InputError."""
        if not messages:
            raise InputError("the conversation has no messages.")
        whole = self._render(messages, add_generation_prompt=False)
        if not self._ends_with_eos or messages[-1]["role"] != "assistant":
            ids = self._encode([whole])[0]
            return _int32(self._framed(ids) if self._is_framed else ids)
        head = self._render(messages[:-1], add_generation_prompt=True)
        if not whole.startswith(head):
            raise InputError(
                "the chat template writes the prompt differently when an answer follows it; "
                "send token ids instead."
            )
        if self._tokenizer.eos_token in messages[-1]["content"]:
            raise InputError(
                f"the answer holds the end-of-sequence token {self._tokenizer.eos_token!r}; "
                "it is added where the answer ends."
            )
        eos = self._tokenizer.eos_token_id
        prompt, ids, ending = self._encode([head, whole, whole[len(head) :]])
        if ids[: len(prompt)] == prompt:
            ending = ids[len(prompt) :]
        ending = ending[: ending.index(eos)] if eos in ending else ending
        return _int32([*prompt, *ending, eos])

    def cut(self, ids: np.ndarray, limit: int, *, is_left: bool) -> np.ndarray:
        """The last (or first) ``limit`` tokens; an encoder's frame stays around them."""
        head, tail = self._head, self._tail
        is_framed = self._is_framed and len(head) + len(tail) < limit
        if not (is_framed and _is_between(head, ids.tolist(), tail)):
            return ids[-limit:] if is_left else ids[:limit]
        inner, room = ids[len(head) : len(ids) - len(tail)], limit - len(head) - len(tail)
        kept = inner[-room:] if is_left else inner[:room]
        return _int32([*head, *kept.tolist(), *tail])

    def _framed(self, ids: list[int]) -> list[int]:
        """With the frame, of which nothing is doubled."""
        head = [] if ids[: len(self._head)] == self._head else self._head
        tail = [] if self._tail and ids[-len(self._tail) :] == self._tail else self._tail
        return [*head, *ids, *tail]

    def _added_bos(self) -> list[int]:
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._ids("")[:1] == [bos] else []

    def _frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer writes before a text and after it."""
        plain, framed = self._encode(["a"])[0], self._ids("a")
        for start in range(len(framed) - len(plain) + 1):
            if framed[start : start + len(plain)] == plain:
                return framed[:start], framed[start + len(plain) :]
        return [], []

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        import jinja2

        if not self._tokenizer.chat_template:
            raise InputError("the model has no chat template; send text or token ids.")
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InputError(f"the chat template refuses the conversation: {error}") from None

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._rust is not None:
            encoded = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
            return [each.ids for each in encoded]
        return self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]


def _rust_tokenizer(tokenizer: Any) -> Any:
    """What encodes beneath a tokenizer, without the padding and truncation of its file; None for
    one that is written in Python, or whose class does more to a text than hand it down, as Code
    Llama's. Around it transformers spends half as much again on a short text.
    """
    from transformers import PreTrainedTokenizerFast as Plain

    if not getattr(tokenizer, "is_fast", False) or tokenizer.split_special_tokens:
        return None
    its = type(tokenizer)
    if its.__call__ is not Plain.__call__ or its._encode_plus is not Plain._encode_plus:
        return None
    rust = tokenizer.backend_tokenizer
    rust.no_padding()
    rust.no_truncation()
    return rust


def _is_between(head: list[int], ids: list[int], tail: list[int]) -> bool:
    ends = not tail or ids[-len(tail) :] == tail
    return ids[: len(head)] == head and ends


def _int32(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)
