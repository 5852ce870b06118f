"""Text and conversations become the ids that the reward model was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from kleash.base.errors import ModelError, UserError
from kleash.data.chat import render_prompt, render_response
from kleash.lm.frozen import warm_up_lengths
from kleash.lm.heads import reward_model_from_causal_lm
from kleash.lm.load import load_causal_lm, load_tokenizer, save_checkpoint_folder
from kleash.lm.sequences import TokenSequence
from kleash.reward.classifier import ClassifierModel
from kleash.reward.config import RewardConfig
from kleash.reward.inputs import InputEncoder, InputError
from kleash.reward.local import LocalReward
from kleash.rpc.requests import Limits

pytestmark = pytest.mark.unit

# Writes a newline after the end token, as ChatML does; training never sees that newline.
NEWLINE_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PROMPT: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3 plus 4?"},
]
ANSWER = "3 plus 4 is 7."
CONVERSATION = [*PROMPT, {"role": "assistant", "content": ANSWER}]


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(tiny_folder)


def begin_with_bos(tokenizer: Any) -> Any:
    """Make the tokenizer begin every text with a token, as Llama's does."""
    tokenizer.bos_token = "<|system|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", bos)]
    )
    return bos


def test_padding_and_truncation_of_the_tokenizers_file_do_not_count(tokenizer: Any) -> None:
    texts = ["one", "one and two and three", ANSWER]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(2)
    encoded = InputEncoder(tokenizer, ends_with_eos=True).encode_texts(texts)
    assert [each.tolist() for each in encoded] == ids


@pytest.mark.parametrize("template", [None, NEWLINE_TEMPLATE])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[1:]])
def test_conversation_is_what_training_renders(
    tokenizer: Any, template: str | None, prompt: Any
) -> None:
    """Checklist R3, R4, G7: prompt + response + end token, and nothing after it."""
    tokenizer.chat_template = template or tokenizer.chat_template
    encoder = InputEncoder(tokenizer, ends_with_eos=True)
    ids = encoder.encode_conversation([*prompt, {"role": "assistant", "content": ANSWER}])
    expected = render_response(tokenizer, prompt, ANSWER)
    assert ids.tolist() == expected.ids.tolist()
    assert ids.dtype == np.int32
    assert ids[-1] == tokenizer.eos_token_id


def test_end_token_is_added_when_the_template_writes_none(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "")
    ids = InputEncoder(tokenizer, ends_with_eos=True).encode_conversation(CONVERSATION)
    assert ids.tolist() == render_response(tokenizer, PROMPT, ANSWER).ids.tolist()
    assert ids[-1] == tokenizer.eos_token_id


def test_foreign_models_get_the_template_unchanged(tokenizer: Any) -> None:
    tokenizer.chat_template = NEWLINE_TEMPLATE
    encoder = InputEncoder(tokenizer, ends_with_eos=False)
    theirs = tokenizer.apply_chat_template(CONVERSATION, tokenize=True)["input_ids"]
    assert encoder.encode_conversation(CONVERSATION).tolist() == theirs
    assert theirs[-1] != tokenizer.eos_token_id


def test_prompt_alone_is_the_template(tokenizer: Any) -> None:
    encoder = InputEncoder(tokenizer, ends_with_eos=True)
    theirs = tokenizer.apply_chat_template(PROMPT, tokenize=True)["input_ids"]
    assert encoder.encode_conversation(PROMPT).tolist() == theirs


def test_text_begins_with_exactly_one_bos(tokenizer: Any) -> None:
    """G7, row 30: the tokenizer's own first token, never twice, never for a template."""
    bos = begin_with_bos(tokenizer)
    encoder = InputEncoder(tokenizer, ends_with_eos=True)
    bare, marked = encoder.encode_texts(["hello", "<|system|>hello"])
    assert bare.tolist() == marked.tolist() == tokenizer.encode("hello")
    assert bare.tolist().count(bos) == 1
    assert bare.tolist() == render_prompt(tokenizer, "hello").tolist()
    conversation = encoder.encode_conversation(CONVERSATION[1:])
    assert bos not in conversation
    assert conversation.tolist() == render_response(tokenizer, PROMPT[1:], ANSWER).ids.tolist()


def test_inputs_that_cannot_be_rendered_say_why(tokenizer: Any) -> None:
    encoder = InputEncoder(tokenizer, ends_with_eos=True)
    with pytest.raises(InputError, match="no messages"):
        encoder.encode_conversation([])
    broken = [CONVERSATION[0], {"role": "assistant", "content": "a<|end|>b"}]
    with pytest.raises(InputError, match=r"holds the end-of-sequence token '<\|end\|>'"):
        encoder.encode_conversation(broken)
    tokenizer.chat_template = "{{ raise_exception('only user turns') }}"
    with pytest.raises(InputError, match="refuses the conversation: only user turns"):
        encoder.encode_conversation(CONVERSATION)
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(InputError, match="refuses the conversation"):
        encoder.encode_conversation(CONVERSATION)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encoder.encode_conversation(CONVERSATION)


def test_lineage_decides_how_a_conversation_ends(
    tiny_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """A folder that Kleash trained ends in the end token; a foreign one follows its template."""
    tokenizer.chat_template = NEWLINE_TEMPLATE
    model = reward_model_from_causal_lm(tiny_folder, seed=1)
    save_checkpoint_folder(model, tokenizer, tmp_path / "own", {"stage": "reward_model"})
    save_checkpoint_folder(model, tokenizer, tmp_path / "foreign", {})
    (tmp_path / "foreign" / "kleash.json").unlink()
    own, foreign = (
        LocalReward.load(RewardConfig(model=tmp_path / name)).count_tokens([CONVERSATION])[0]
        for name in ("own", "foreign")
    )
    assert foreign == own + 1


def test_settings_saved_with_the_tokenizer_do_not_cut(
    tiny_reward_folder: Path, tiny_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """A tokenizer.json may hold a training run's truncation and padding."""
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    model = reward_model_from_causal_lm(tiny_folder, seed=1)
    save_checkpoint_folder(model, tokenizer, tmp_path / "cut", {})
    tokenizer.backend_tokenizer.save(str(tmp_path / "cut" / "tokenizer.json"))
    plain = LocalReward.load(RewardConfig(model=tiny_reward_folder))
    cut = LocalReward.load(RewardConfig(model=tmp_path / "cut"))
    text = "the quick brown fox jumps over the lazy dog and says hello to the world"
    assert cut.count_tokens([text]) == plain.count_tokens([text])
    assert cut.get_model().tokenizer_sha256 == plain.get_model().tokenizer_sha256


def test_another_template_can_be_given(
    tiny_reward_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "chat.jinja").write_text(NEWLINE_TEMPLATE)
    config = RewardConfig(model=tiny_reward_folder, chat_template=tmp_path / "chat.jinja")
    tokenizer.chat_template = NEWLINE_TEMPLATE
    expected = len(render_response(tokenizer, PROMPT, ANSWER).ids)
    assert LocalReward.load(config).count_tokens([CONVERSATION]) == [expected]
    missing = RewardConfig(model=tiny_reward_folder, chat_template=tmp_path / "none.jinja")
    with pytest.raises(ModelError, match=r"cannot read the chat template .*none\.jinja"):
        LocalReward.load(missing)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"device": "cuda:63"}, "device is cuda:63, but torch finds"),
        ({"limits": Limits(max_item_tokens=999)}, "max_item_tokens is 999 and can be at most 256"),
        (
            {"model": Path("nowhere")},
            "folder nowhere does not exist",
        ),
    ],
)
def test_unusable_configurations_are_refused_at_load(
    tiny_reward_folder: Path, fields: dict[str, Any], message: str
) -> None:
    config = RewardConfig.model_validate({"model": tiny_reward_folder} | fields)
    with pytest.raises(UserError, match=message):
        LocalReward.load(config)


def test_model_that_sees_later_tokens_is_refused(
    tiny_reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right padding would change the scores of a bidirectional model."""
    import kleash.reward.classifier

    load = kleash.reward.classifier.load_classifier

    def load_bidirectional(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        return model

    monkeypatch.setattr(kleash.reward.classifier, "load_classifier", load_bidirectional)
    with pytest.raises(ModelError, match="lets tokens see later ones"):
        ClassifierModel.load(RewardConfig(model=tiny_reward_folder).frozen(), Limits())


def test_pad_token_can_be_named(tiny_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    """The added id has no embedding; a client that sends it gets an item error, not a crash."""
    model = reward_model_from_causal_lm(tiny_folder, seed=1)
    save_checkpoint_folder(model, tokenizer, tmp_path / "rm", {})
    settings = tmp_path / "rm" / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if k != "pad_token"}
    settings.write_text(json.dumps(kept))
    with pytest.raises(ModelError, match=r"no pad token.*--pad_token"):
        LocalReward.load(RewardConfig(model=tmp_path / "rm"))
    local = LocalReward.load(RewardConfig(model=tmp_path / "rm", pad_token="<|fill|>"))
    added = load_causal_lm(tiny_folder).config.vocab_size
    [score] = local.score_tokens(
        [TokenSequence(np.array([5, added], dtype=np.int32), 1)],
        tokenizer_sha256=local.get_model().tokenizer_sha256,
        raise_on_item_error=False,
    )
    assert score.code == "INVALID_INPUT"


def test_warm_up_on_a_gpu_is_the_largest_batch() -> None:
    """A batch that does not fit then fails the start and not a caller."""
    assert warm_up_lengths(torch.device("cuda"), 100, 1050) == [100] * 10
    assert warm_up_lengths(torch.device("cuda"), 700, 1050) == [700]
    assert warm_up_lengths(torch.device("cpu"), 8, 1050) == [8, 8]


def test_frozen_means_no_gradients(tiny_reward_folder: Path) -> None:
    model = ClassifierModel.load(RewardConfig(model=tiny_reward_folder).frozen(), Limits())
    assert not any(parameter.requires_grad for parameter in model.frozen.model.parameters())
    assert not model.frozen.model.training
    assert isinstance(model.frozen.device, torch.device)
