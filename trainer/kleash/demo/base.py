"""The base model: a tokenizer and a small Llama trained from nothing on dialogues of mixed quality.

It stands for the pretrained model that users bring; stage 1 starts from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kleash.base.progress import Progress
from kleash.demo.settings import DemoSettings
from kleash.lm.load import save_checkpoint_folder
from kleash.lm.tiny import build_causal_lm, train_tokenizer
from kleash.sft.config import SFTConfig
from kleash.sft.train import SFTReport, train

TOKENIZER_LINES = 8000
"""Dialogues that the tokenizer is trained on: more do not change it."""


def train_base(
    settings: DemoSettings,
    dialogues: Path,
    out: Path,
    *,
    seed: int,
    num_threads: int,
    progress: Progress,
) -> SFTReport:
    """Write a random model to ``out``-untrained, train it on ``dialogues`` and write ``out``."""
    untrained = out.with_name(f"{out.name}-untrained")
    sizes = settings.model
    tokenizer = train_tokenizer(_texts(dialogues), sizes.vocab_size)
    model = build_causal_lm(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        intermediate_size=sizes.intermediate_size,
        max_positions=sizes.max_positions,
        seed=seed,
    )
    save_checkpoint_folder(model, tokenizer, untrained, {"stage": "untrained"})
    base = settings.base
    config = SFTConfig(
        model=untrained,
        data=str(dialogues),
        out=out,
        learning_rate=base.learning_rate,
        batch_size=base.batch_size,
        epochs=base.epochs,
        loss_on_prompt=base.loss_on_prompt,
        seed=seed,
        num_threads=num_threads,
    )
    return train(config, progress)


def _texts(dialogues: Path) -> Iterator[str]:
    with dialogues.open(encoding="utf-8") as file:
        for _, line in zip(range(TOKENIZER_LINES), file, strict=False):
            record = json.loads(line)
            yield record["prompt"][0]["content"]
            yield record["completion"]
