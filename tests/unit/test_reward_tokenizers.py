"""The ids of a text are those of transformers, whatever the tokenizer does to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tests.classifier_folders import TEXTS, encoder_tokenizer
from tokenizers import models, normalizers, pre_tokenizers

from kleash.lm.tiny import train_tokenizer
from kleash.reward.inputs import InputEncoder

pytestmark = pytest.mark.unit


def with_added_tokens() -> Any:
    """Tokens that take the space beside them, stand for whole words, or are written otherwise."""
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken("<L>", lstrip=True, special=True),
            tokenizers.AddedToken("<R>", rstrip=True),
            tokenizers.AddedToken("fox", single_word=True),
            tokenizers.AddedToken("HELLO", normalized=True),
        ]
    )
    return tokenizer


def with_normalizer() -> Any:
    tokenizer = with_added_tokens()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    return tokenizer


def with_prefix_space() -> Any:
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def that_splits_special_tokens() -> Any:
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.split_special_tokens = True
    return tokenizer


def with_metaspace() -> Any:
    """As Llama's first tokenizer wrote spaces: a text's first word has one, too."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁hello", -1.0), ("hello", -3.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz ▁<|>"]
    inner = tokenizers.Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.add_special_tokens(["<|end|>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def of_word_pieces() -> Any:
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "hello", "##s", "fox", "the", "3"]
    return transformers.BertTokenizer({word: index for index, word in enumerate(words)})


class Shouting(transformers.PreTrainedTokenizerFast):
    """Does something to a text before the part below sees it."""

    def _encode_plus(self, text: Any, *args: Any, **keywords: Any) -> Any:
        texts = [each.upper() for each in text] if isinstance(text, list) else text.upper()
        return super()._encode_plus(texts, *args, **keywords)


def that_prepares_texts() -> Any:
    inner = train_tokenizer(TEXTS, 320).backend_tokenizer
    return Shouting(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")


def written_in_python() -> Any:
    from transformers.models.canine import CanineTokenizer

    return CanineTokenizer()


KINDS: dict[str, Callable[[], Any]] = {
    "causal": lambda: train_tokenizer(TEXTS, 320),
    "encoder": encoder_tokenizer,
    "added": with_added_tokens,
    "normalized": with_normalizer,
    "prefix_space": with_prefix_space,
    "split": that_splits_special_tokens,
    "metaspace": with_metaspace,
    "word_pieces": of_word_pieces,
    "prepares": that_prepares_texts,
    "python": written_in_python,
}
WORDS = (
    *TEXTS, " ", "\n", "<|end|>", "<|user|>", "<L>", "<R>", "fox", "foxes", "HELLO", "Hello",
    "[CLS]", "[SEP]", "\u212b", "e\u0301", "\ufb01", "\U0001f98a", "\u200d",
)  # fmt: skip
PARTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
SOME_TEXTS = st.lists(st.lists(PARTS, max_size=6).map("".join), max_size=4)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, InputEncoder]:
    """A tokenizer as transformers calls it, and the encoder on another of the same kind."""
    make = KINDS[request.param]
    return make(), InputEncoder(make(), ends_with_eos=True)


@given(texts=SOME_TEXTS)
def test_texts_have_the_ids_that_transformers_gives_them(
    pair: tuple[Any, InputEncoder], texts: list[str]
) -> None:
    theirs, encoder = pair
    expected = theirs(texts, add_special_tokens=False)["input_ids"] if texts else []
    assert encoder._encode(texts) == expected


def test_what_a_class_does_to_a_text_is_done() -> None:
    encoder = InputEncoder(that_prepares_texts(), ends_with_eos=True)
    small, large = encoder.encode_texts(["hello", "HELLO"])
    assert small.tolist() == large.tolist()
