"""Tiny sequence classifiers of every kind that is served, with random weights, as folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers

from kleash.lm.tiny import train_tokenizer

CAUSAL = (
    "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "gpt2", "gpt_neox",
    "mixtral", "phi3", "olmo2",
)  # fmt: skip
ENCODERS = ("modernbert", "deberta-v2", "bert", "roberta", "electra")

TEXTS = (
    "What is 3 plus 4?",
    "12 is bigger.",
    "the quick brown fox jumps over the lazy dog and says hello to the world",
    "hello",
)
WINDOW = 8
"""Tokens that a layer with a sliding window sees; most rows of the tests are longer."""

FRAME = "[CLS]", "[SEP]"


def write_classifier(
    folder: Path,
    kind: str,
    *,
    labels: tuple[str, ...] = ("score",),
    has_pad_id: bool = True,
    **changes: Any,
) -> Path:
    """A classifier whose logits are of order 1, with a tokenizer beside it.

    ``has_pad_id`` false leaves pad_token_id out of config.json, as many published models do.
    """
    tokenizer = encoder_tokenizer() if kind in ENCODERS else train_tokenizer(TEXTS, 320)
    config = _config(kind, len(tokenizer), **changes)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: label for label, name in enumerate(labels)}
    config.num_labels = len(labels)
    config.pad_token_id = tokenizer.pad_token_id if has_pad_id else None
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encoder_tokenizer() -> Any:
    """A tokenizer that frames a text as BERT's does, and has neither begin nor end of sequence."""
    import tokenizers

    plain = train_tokenizer(TEXTS, 320).backend_tokenizer
    plain.add_special_tokens([*FRAME])
    first, last = (plain.token_to_id(each) for each in FRAME)
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", first), ("[SEP]", last)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<|pad|>", cls_token="[CLS]", sep_token="[SEP]"
    )


def _config(kind: str, vocab_size: int, **changes: Any) -> Any:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys: dict[str, Any] = {"vocab_size": vocab_size, "intermediate_size": 48} | size
    keys |= {"max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 1}
    if kind in ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "mixtral"):
        keys |= {"num_key_value_heads": 2}
    if kind in ("qwen3", "gemma", "gemma2", "gemma3_text"):
        keys |= {"head_dim": 8}
    if kind in ("gemma2", "gemma3_text", "mistral"):
        keys |= {"sliding_window": WINDOW}
    if kind == "gemma2":
        keys |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0}
    if kind == "gemma3_text":
        keys |= {"layer_types": ["sliding_attention", "full_attention"]}
    if kind == "mixtral":
        keys |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if kind == "gpt2":
        keys = {"vocab_size": vocab_size, "n_embd": 32, "n_layer": 2, "n_head": 4}
        keys |= {"n_positions": 128, "bos_token_id": None, "eos_token_id": 1}
    if kind == "modernbert":
        keys |= {"local_attention": WINDOW, "global_attn_every_n_layers": 2}
        keys |= {"cls_token_id": vocab_size - 2, "sep_token_id": vocab_size - 1}
    if kind == "deberta-v2":  # as deberta-v3 is configured
        keys |= {
            "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm",
            "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0,
            "position_biased_input": False, "pooler_hidden_size": 32, "max_relative_positions": -1,
        }  # fmt: skip
    return transformers.AutoConfig.for_model(kind, **(keys | changes))
