"""Tiny models and tokenizers built from a configuration, for tests, the demo and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["llama", "qwen2", "gpt2"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Turns as ``<|user|>text<|assistant|>text<|end|>``: the end token is the end-of-sequence token."""

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
"""Ids 0 to 4: pad, end of sequence, and the roles of ``CHAT_TEMPLATE``."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer whose special tokens are ``SPECIAL_TOKENS``."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
    )


def build_causal_lm(
    kind: Kind,
    *,
    vocab_size: int,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int | None = None,
    max_positions: int = 256,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> Any:
    """A causal language model with random weights, tied embeddings, pad id 0 and end id 1.

    ``initializer_range`` is the std of the random weights; a model that is to be trained from
    nothing learns several times faster with about 1 / sqrt(hidden_size).
    """
    import transformers

    intermediate_size = intermediate_size or hidden_size * 3
    shared = {
        "vocab_size": vocab_size,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "tie_word_embeddings": True,
        "initializer_range": initializer_range,
    }
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=hidden_size,
            n_layer=num_layers,
            n_head=num_heads,
            n_inner=intermediate_size,
            n_positions=max_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
    else:
        config_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
        config = config_class(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            intermediate_size=intermediate_size,
            max_position_embeddings=max_positions,
            **shared,
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def write_tiny_folder(
    folder: Path, kind: Kind, texts: Iterable[str], *, vocab_size: int = 320, **model: Any
) -> Path:
    """Train a tokenizer on ``texts``, build a model for it, save both as a Hugging Face folder."""
    tokenizer = train_tokenizer(texts, vocab_size)
    build_causal_lm(kind, vocab_size=len(tokenizer), **model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
