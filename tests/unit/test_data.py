"""Prompts and demonstrations to token ids: formats, places of mistakes, chat templates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from kleash.base.errors import DataError, ModelError
from kleash.data.chat import Message, render_prompt, render_response
from kleash.data.demonstrations import load_demonstrations
from kleash.data.prompts import load_prompts
from kleash.lm.load import load_tokenizer
from kleash.lm.tiny import train_tokenizer

pytestmark = pytest.mark.unit

USER: Message = {"role": "user", "content": "What is 3 plus 4?"}
ANSWER: Message = {"role": "assistant", "content": "7."}
Write = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(tiny_folder)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write lines (objects as JSON, strings and bytes as they are) and return the file's path."""

    def write_lines(*lines: Any) -> str:
        path = tmp_path / "data.jsonl"
        with path.open("wb") as file:
            for line in lines:
                if not isinstance(line, str | bytes):
                    line = json.dumps(line)
                file.write((line.encode() if isinstance(line, str) else line) + b"\n")
        return str(path)

    return write_lines


def bos_tokenizer() -> Any:
    """A tokenizer that, like Llama's, begins every text with a beginning-of-sequence token."""
    tokenizer = train_tokenizer(["the quick brown fox"], 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


# --- text and conversations -----------------------------------------------------------------------


def test_text_prompt_is_verbatim(tokenizer: Any) -> None:
    text = "  the quick\nbrown <|user|> fox "
    assert tokenizer.decode(render_prompt(tokenizer, text)) == text


def test_messages_go_through_the_chat_template(tokenizer: Any) -> None:
    ids = render_prompt(tokenizer, [USER])
    expected = "<|user|>What is 3 plus 4?<|assistant|>"
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.encode(expected, add_special_tokens=False)
    assert (
        ids.tolist()
        == tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    )


def test_response_ends_in_exactly_one_end_token(tokenizer: Any) -> None:
    for prompt in ("Q: 3 plus 4? A:", [USER]):
        for response in (" 7.", " 7.<|end|>"):
            sequence = render_response(tokenizer, prompt, response)
            head, tail = np.split(sequence.ids, [sequence.response_start])
            assert head.tolist() == render_prompt(tokenizer, prompt).tolist()
            assert tokenizer.decode(tail) == " 7.<|end|>"
            assert (tail == tokenizer.eos_token_id).sum() == 1


@pytest.mark.parametrize("prompt", ["the quick", "the quick ", "the qu", "<s>the quick", [USER]])
def test_beginning_of_sequence_token_appears_once(prompt: Any) -> None:
    """Facts section 4, row 30."""
    tokenizer = bos_tokenizer()
    sequence = render_response(tokenizer, prompt, "brown fox")
    for ids in (render_prompt(tokenizer, prompt), sequence.ids):
        assert ids[0] == tokenizer.bos_token_id
        assert (ids == tokenizer.bos_token_id).sum() == 1


def test_a_tokenizer_without_bos_by_default_gets_none(tokenizer: Any) -> None:
    assert render_prompt(tokenizer, "the").tolist() == tokenizer.encode("the")


@pytest.mark.parametrize("border", range(1, 18))
def test_response_never_changes_the_prompts_tokens(tokenizer: Any, border: int) -> None:
    """Generation continues the prompt's own tokens, also where a merge would cross the border."""
    text = "the quick brown fox"
    sequence = render_response(tokenizer, text[:border], text[border:])
    prompt = render_prompt(tokenizer, text[:border])
    assert sequence.ids[: sequence.response_start].tolist() == prompt.tolist()
    assert tokenizer.decode(sequence.ids) == text + "<|end|>"


def test_what_the_template_writes_after_the_end_token_is_left_out(tiny_folder: Path) -> None:
    """ChatML templates end a turn with the end token and a newline."""
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    sequence = render_response(tokenizer, [USER], " 7. ")
    assert tokenizer.decode(sequence.ids[sequence.response_start :]) == "7.<|end|>"
    assert tokenizer.decode(sequence.ids).startswith("<|user|>What is 3 plus 4?<|end|>\n")


def test_end_token_is_added_when_the_template_writes_none(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    sequence = render_response(tokenizer, [USER], "7.")
    assert tokenizer.decode(sequence.ids) == "What is 3 plus 4?\n7.\n<|end|>"


def test_no_chat_template_names_the_remedy(tiny_folder: Path, write: Write) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.chat_template = None
    source = write({"prompt": [USER]})
    # It is no fault of a line, so skip_bad does not hide it.
    with pytest.raises(ModelError, match=r"no chat template.*--chat_template=FILE"):
        load_prompts(source, tokenizer, max_tokens=99, skip_bad=True)
    assert len(load_prompts(write({"prompt": "text"}), tokenizer, max_tokens=99)) == 1


def test_a_template_from_a_file_is_used(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(tiny_folder, chat_template=tmp_path / "t.jinja")
    assert tokenizer.decode(render_prompt(tokenizer, [USER])) == "What is 3 plus 4?!"
    with pytest.raises(ModelError, match=r"cannot read the chat template .*nowhere"):
        load_tokenizer(tiny_folder, chat_template=tmp_path / "nowhere")


def test_templates_that_cannot_be_used(tiny_folder: Path, write: Write) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    source = write({"messages": [USER, ANSWER]})
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ModelError, match="not valid Jinja"):
        load_demonstrations(source, tokenizer, max_tokens=99)
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ModelError, match=r"writes a prompt differently.*--chat_template=FILE"):
        load_demonstrations(source, tokenizer, max_tokens=99)
    tokenizer.chat_template = "{{ raise_exception('only two turns') }}"
    with pytest.raises(DataError, match=r"data.jsonl:1: field 'messages': .*only two turns"):
        load_demonstrations(source, tokenizer, max_tokens=99)


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_keep_ids_and_other_fields(tokenizer: Any, write: Write) -> None:
    source = write(
        {"prompt": "the fox", "id": "a", "answer": [7]},
        "",
        {"prompt": [USER], "kind": "sum"},
        {"prompt": "the dog", "id": 12},
    )
    prompts = load_prompts(source, tokenizer, max_tokens=64)
    assert [prompt.prompt_id for prompt in prompts] == ["a", "3", "12"]
    assert [prompt.fields for prompt in prompts] == [{"answer": [7]}, {"kind": "sum"}, {}]
    assert [prompt.messages for prompt in prompts] == [None, [USER], None]
    assert prompts[1].text == "<|user|>What is 3 plus 4?<|assistant|>"
    for prompt in prompts:
        assert tokenizer.decode(prompt.ids) == prompt.text
    assert prompts.sha256 == hashlib.sha256(Path(source).read_bytes()).hexdigest()


BAD_PROMPTS = {
    '{"prompt": "x"': ("", "not valid JSON"),
    '["prompt"]': ("", "a JSON list, not an object"),
    "[" * 100_000: ("", "not valid JSON"),
    '{"n": ' + "1" * 5000 + "}": ("", "not valid JSON"),
    b'{"prompt": "\xff"}': ("", "is not UTF-8"),
    '{"promt": "x"}': ("prompt", "is missing; the record has 'promt'"),
    "{}": ("prompt", "is missing; the record has no fields"),
    '{"prompt": 3}': ("prompt", "must be text or a list of messages, not a number"),
    '{"prompt": null}': ("prompt", "not null"),
    '{"prompt": {"role": "user", "content": "x"}}': ("prompt", "not an object"),
    '{"prompt": ""}': ("prompt", "is empty"),
    '{"prompt": " \\n"}': ("prompt", "is empty"),
    '{"prompt": "a\\ud800"}': ("prompt", "surrogate"),
    '{"prompt": []}': ("prompt", "has no messages"),
    '{"prompt": ["x"]}': ("prompt[0]", 'must be a message {"role", "content"}, not text'),
    '{"prompt": [{"role": "user"}]}': ("prompt[0].content", "must be text, not null"),
    '{"prompt": [{"role": "user", "content": ""}]}': ("prompt[0].content", "is empty"),
    '{"prompt": [{"role": "human", "content": "x"}]}': (
        "prompt[0].role",
        "unknown role 'human'; the roles are system, user, assistant",
    ),
    '{"prompt": [{"role": ["user"], "content": "x"}]}': ("prompt[0].role", "unknown role"),
    '{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}': (
        "prompt",
        "ends with role 'assistant'; a prompt ends with role 'user'",
    ),
    '{"prompt": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}': (
        "prompt[1].role",
        "a system message comes first",
    ),
    '{"prompt": "x", "id": 1.5}': ("id", "must be text or a whole number"),
    '{"prompt": "x", "id": "first"}': ("id", "'first' is the id of"),
    '{"prompt": "x", "id": 3}': ("id", "its line number"),
    json.dumps({"prompt": "1" * 21}): ("prompt", "the prompt has 21 tokens, more than the 20"),
}


@pytest.mark.parametrize("line", BAD_PROMPTS, ids=lambda line: str(line)[:40])
def test_bad_prompt_is_reported_with_file_line_and_field(
    tokenizer: Any, write: Write, line: str | bytes
) -> None:
    field, reason = BAD_PROMPTS[line]
    # The bad line is the fourth of the file; a line without an id is called by its number.
    source = write({"prompt": "a", "id": "first"}, "", {"prompt": "b"}, line, {"prompt": "c"})
    with pytest.raises(DataError) as caught:
        load_prompts(source, tokenizer, max_tokens=20)
    error = caught.value
    assert (error.path, error.line, error.field) == (source, 4, field)
    assert reason in str(error)
    assert str(error).startswith(f"{source}:4: " + (f"field '{field}': " if field else ""))
    assert "\n" not in str(error)

    prompts = load_prompts(source, tokenizer, max_tokens=20, skip_bad=True)
    assert [prompt.text for prompt in prompts] == ["a", "b", "c"]
    assert prompts.skipped == [str(error)]


def test_a_prompt_of_exactly_the_limit_fits(tokenizer: Any, write: Write) -> None:
    source = write({"prompt": "1" * 20})
    assert len(load_prompts(source, tokenizer, max_tokens=20)[0].ids) == 20


# --- demonstrations -------------------------------------------------------------------------------


def test_every_form_of_a_demonstration(tokenizer: Any, write: Write) -> None:
    chat = "<|user|>What is 3 plus 4?<|assistant|>"
    forms = {
        json.dumps({"prompt": "Q: 3 plus 4? A:", "completion": " 7."}): ("Q: 3 plus 4? A:", " 7."),
        json.dumps({"prompt": [USER], "completion": "7."}): (chat, "7."),
        json.dumps({"prompt": [USER], "completion": [ANSWER]}): (chat, "7."),
        json.dumps({"messages": [USER, ANSWER]}): (chat, "7."),
        json.dumps({"prompt": "What", "messages": [USER, ANSWER]}): (chat, "7."),
        json.dumps({"messages": [USER, ANSWER, USER, ANSWER]}): (
            chat + "7.<|end|>" + chat,
            "7.",
        ),
    }
    loaded = load_demonstrations(write(*forms), tokenizer, max_tokens=99)
    for sequence, (prompt, response) in zip(loaded, forms.values(), strict=True):
        start = sequence.response_start
        assert tokenizer.decode(sequence.ids[:start]) == prompt
        assert tokenizer.decode(sequence.ids[start:]) == response + "<|end|>"


BAD_DEMONSTRATIONS = {
    '{"prompt": "x"}': ("completion", "is missing"),
    '{"completion": "x"}': ("prompt", "is missing"),
    '{"prompt": "x", "completion": ""}': ("completion", "is empty"),
    '{"prompt": "x", "completion": 7}': ("completion", "must be text or a list of messages"),
    '{"prompt": "x", "completion": "a<|end|>b"}': ("completion", "before its end"),
    json.dumps({"prompt": "x", "completion": [ANSWER]}): ("completion", "both as text or both"),
    json.dumps({"prompt": [USER], "completion": [USER]}): ("completion", "one message of role"),
    json.dumps({"prompt": [USER], "completion": [ANSWER, ANSWER]}): ("completion", "one message"),
    json.dumps({"messages": [USER]}): ("messages", "ends with role 'user'"),
    json.dumps({"messages": [ANSWER]}): ("messages", "has nothing before"),
    json.dumps({"messages": "x"}): ("messages", "must be text or a list of messages, not text"),
    json.dumps({"prompt": "1" * 10, "completion": "2" * 10}): (
        "completion",
        "(10 tokens of prompt) has 21 tokens, more than the 20",
    ),
}


@pytest.mark.parametrize("line", BAD_DEMONSTRATIONS, ids=lambda line: str(line)[:60])
def test_bad_demonstration(tokenizer: Any, write: Write, line: str) -> None:
    field, reason = BAD_DEMONSTRATIONS[line]
    source = write({"prompt": "a", "completion": "b"}, line)
    with pytest.raises(DataError) as caught:
        load_demonstrations(source, tokenizer, max_tokens=20)
    assert (caught.value.line, caught.value.field) == (2, field)
    assert reason in str(caught.value)
    loaded = load_demonstrations(source, tokenizer, max_tokens=20, skip_bad=True)
    assert (len(loaded), len(loaded.skipped)) == (1, 1)
