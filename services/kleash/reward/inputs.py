"""Text and conversations to token ids, as the reward model saw them in training.

A model that Kleash trained ends in the end-of-sequence token, where its score is read; what a chat
template writes after it (a newline) was never seen. Of any other model a conversation is what the
chat template writes, no more and no less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Messages = Sequence[dict[str, str]]


class InputError(ValueError):
    """One input that cannot be turned into tokens; the message is a sentence."""


class InputEncoder:
    """Turns inputs into ids with one tokenizer. Safe to call from several threads."""

    def __init__(self, tokenizer: Any, *, ends_with_eos: bool) -> None:
        """Args:
        ends_with_eos: conversations whose last turn is the assistant's end in the
            end-of-sequence token, as Kleash's training stages end them.
        """
        self._tokenizer = tokenizer
        self._ends_with_eos = ends_with_eos
        bos = tokenizer.bos_token_id
        self._added_bos = bos if bos is not None and self._ids("")[:1] == [bos] else None

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32.

        Special tokens written in a text count as such. A tokenizer that begins every text with a
        beginning-of-sequence token does so here, unless the text has it already.
        """
        rows = self._encode(texts)
        bos = self._added_bos
        return [_int32(ids if bos is None or ids[:1] == [bos] else [bos, *ids]) for ids in rows]

    def encode_conversation(self, messages: Messages) -> np.ndarray:
        """Ids of a conversation under the chat template, int32. Raises InputError."""
        if not messages:
            raise InputError("the conversation has no messages.")
        whole = self._render(messages, add_generation_prompt=False)
        if not self._ends_with_eos or messages[-1]["role"] != "assistant":
            return _int32(self._encode([whole])[0])
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
        return self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]


def _int32(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)
