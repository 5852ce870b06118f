"""Text and conversations to token ids, the same way in every stage.

A prompt given as text is used verbatim; one given as messages goes through the tokenizer's chat
template. A response is encoded after its prompt without changing the prompt's tokens, because
generation continues those very tokens, and ends in the end-of-sequence token.
"""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np

from kleash.base.errors import DataError, ModelError
from kleash.lm.sequences import TokenSequence

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | list[Message]


def render_prompt(tokenizer: Any, prompt: Prompt) -> np.ndarray:
    """Token ids of a prompt, int32: what the policy continues.

    Text begins with the beginning-of-sequence token when the tokenizer adds one, and never with
    two. Messages have the tokens that the chat template writes, no others.
    """
    ids = _encode_after_bos(tokenizer, prompt, prompt_text(tokenizer, prompt))
    if not ids:
        raise DataError("the prompt has no tokens.")
    return np.array(ids, dtype=np.int32)


def render_response(tokenizer: Any, prompt: Prompt, response: str) -> TokenSequence:
    """The prompt's tokens, then the response's, which end in the end-of-sequence token."""
    eos = tokenizer.eos_token_id
    content = _encode(tokenizer, response)
    if not content:
        raise DataError("the response has no tokens.")
    if eos in content[:-1]:
        raise DataError(
            f"the response holds the end-of-sequence token {tokenizer.eos_token!r} before its end."
        )
    head, whole = prompt_text(tokenizer, prompt), _whole_text(tokenizer, prompt, response)
    prompt_ids = _encode_after_bos(tokenizer, prompt, head)
    ids = _encode_after_bos(tokenizer, prompt, whole)
    # Encoding both together keeps what a tokenizer does at a text's start (a leading space) out of
    # the response, unless a token reaches across the border: a policy cannot generate that one.
    is_prefix = ids[: len(prompt_ids)] == prompt_ids
    ending = ids[len(prompt_ids) :] if is_prefix else _encode(tokenizer, whole[len(head) :])
    # The template may write more after the end token, like a newline; nobody generates that.
    ending = [*ending[: ending.index(eos)], eos] if eos in ending else [*ending, eos]
    return TokenSequence(np.array([*prompt_ids, *ending], dtype=np.int32), len(prompt_ids))


def prompt_text(tokenizer: Any, prompt: Prompt) -> str:
    """The text of a prompt with the chat template's marks, up to where the assistant speaks."""
    if isinstance(prompt, str):
        return prompt
    return _apply_template(tokenizer, prompt, add_generation_prompt=True)


def _whole_text(tokenizer: Any, prompt: Prompt, response: str) -> str:
    if isinstance(prompt, str):
        return prompt + response
    head = prompt_text(tokenizer, prompt)
    messages = [*prompt, Message(role="assistant", content=response)]
    whole = _apply_template(tokenizer, messages, add_generation_prompt=False)
    if not whole.startswith(head):
        raise ModelError(
            "the chat template writes a prompt differently when an answer follows it "
            f"({head[-40:]!r} is not how {whole[: len(head)][-40:]!r} ends); "
            "give another one with --chat_template=FILE."
        )
    return whole


def _apply_template(tokenizer: Any, messages: list[Message], **options: bool) -> str:
    import jinja2

    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {tokenizer.name_or_path} has no chat template, which messages need; "
            "give one with --chat_template=FILE or write prompts as text."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} is not valid Jinja: {error}."
        ) from None
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses the messages: {error}") from None


def _encode_after_bos(tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
    ids = _encode(tokenizer, text)
    bos = tokenizer.bos_token_id
    if not isinstance(prompt, str) or bos is None or ids[:1] == [bos]:
        return ids
    adds_bos = tokenizer.encode("")[:1] == [bos]
    return [bos, *ids] if adds_bos else ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
