"""Real weight deltas for weights.py: of a PPO run of this project, and of a larger model.

The PPO run publishes into its store; the weights of every version are read back from there. The
larger model is trained for some steps on a Markov source and then takes policy-gradient steps at
the learning rate of RLHF, with AdamW on float32 masters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

PRETRAIN_LEARNING_RATE = 1e-3
SUCCESSORS = 4
"""Tokens that may follow a token in the Markov source."""


@dataclass(frozen=True, eq=False)
class Delta:
    """Two states of a model's float32 masters, as flat float32 by tensor."""

    name: str
    old: list[np.ndarray]
    new: list[np.ndarray]

    @property
    def words(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Old and new bits of the served bfloat16 weights."""
        return [(bf16(a), bf16(b)) for a, b in zip(self.old, self.new, strict=True)]

    @property
    def master_words(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Old and new bits of the masters."""
        pairs = zip(self.old, self.new, strict=True)
        return [(a.view(np.uint32), b.view(np.uint32)) for a, b in pairs]


def bf16(values: np.ndarray) -> np.ndarray:
    """Bits of float32 values rounded to bfloat16, uint16."""
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def statistics(delta: Delta) -> dict[str, float]:
    """Changed fraction, what the closed form predicts, and the share of changes by one ULP.

    A weight changes when |dw| crosses a rounding boundary: E[min(1, |dw| / ulp_bf16(w))].
    """
    total = changed = single = 0
    expected = 0.0
    for master, next_master, (old, new) in zip(delta.old, delta.new, delta.words, strict=True):
        differs = old != new
        steps = np.abs(new[differs].astype(np.int32) - old[differs].astype(np.int32))
        # 8 bits of precision: the unit in the last place of 1.0 <= |w| < 2 is 2^-7.
        ulp = np.exp2(np.frexp(master)[1].astype(np.float32) - 8)
        with np.errstate(over="ignore"):
            crossing = np.minimum(1.0, np.abs(next_master - master) / ulp)
        expected += float(crossing.sum(dtype=np.float64))
        total += len(master)
        changed += int(differs.sum())
        single += int((steps == 1).sum())
    return {
        "elements": total,
        "changed_fraction": changed / total,
        "predicted_fraction": expected / total,
        "one_ulp_share": single / max(changed, 1),
    }


# ----------------------------------------------------------------------------------- a PPO run's


def ppo_deltas(options: argparse.Namespace, folder: Path) -> list[Delta]:
    """The last step of a PPO run as it was published, at lr 1e-6 and at the demo's."""
    rates = (1e-6,) if options.quick else (1e-6, 3e-4)
    return [_ppo_delta(options, folder / f"{rate:g}", rate) for rate in rates]


def _ppo_delta(options: argparse.Namespace, folder: Path, learning_rate: float) -> Delta:
    from kleash.ppo.config import PPOConfig
    from kleash.ppo.train import train
    from kleash.up.config import UpConfig
    from kleash.up.local import local_services

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    prompts = ["".join(map(str, rng.integers(0, 10, 32))) for _ in range(128)]
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{it}"}}\n' for it in prompts))
    steps = 2 if options.quick else 6
    config = PPOConfig.model_validate(
        {
            "out": folder / "run",
            "prompts": str(folder / "prompts.jsonl"),
            "model": demo_model(folder / "model"),
            "reward_model": _reward_model(folder),
            "total_steps": steps,
            "batch_size": 32,
            "max_prompt_tokens": 32,
            "sampling": {"max_new_tokens": 24},
            "algorithm": {"epochs": 2, "minibatches": 2},
            "policy": {"learning_rate": learning_rate},
            "checkpoint": {"every": steps},
        }
    )
    with local_services(UpConfig(ppo=config, service_threads=1)) as services:
        train(config, services)
    old, new = _last_two_versions(config.model, config.out / "weights")
    return Delta(f"PPO run, lr {learning_rate:g}, one PPO step", old, new)


def demo_model(folder: Path) -> Path:
    """A checkpoint of the demo's size with random weights."""
    from kleash.lm.tiny import write_tiny_folder

    texts = [f"word{i} {chr(97 + i % 26)}{i * 7919 % 1000}" for i in range(2000)]
    return write_tiny_folder(
        folder,
        "llama",
        texts,
        vocab_size=512,
        hidden_size=96,
        num_layers=3,
        intermediate_size=256,
        max_positions=96,
    )


def _reward_model(folder: Path) -> Path:
    from kleash.lm.heads import Normalization, reward_model_from_causal_lm
    from kleash.lm.load import load_tokenizer, save_checkpoint_folder

    scorer = reward_model_from_causal_lm(folder / "model", seed=0)
    Normalization().store(scorer.config)
    tokenizer = load_tokenizer(folder / "model")
    save_checkpoint_folder(scorer, tokenizer, folder / "reward", {"stage": "reward-model"})
    return folder / "reward"


def _last_two_versions(model: Path, store: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The weights before and after the newest version of a store that began with ``model``."""
    from kleash.lm.digest import canonical_tensors, schema_digest
    from kleash.lm.load import load_causal_lm
    from kleash.ppo.publish import served_schema, words_of
    from kleash.weights.encoder import Shadow
    from kleash.weights.store import read_folder

    tensors = canonical_tensors(load_causal_lm(model))
    schema, dtype = served_schema(tensors, schema_digest(tensors))
    shadow = Shadow.of(schema, words_of(tensors, dtype))
    deltas = [it for it in read_folder(store) if it.manifest.base_digest and it.size]
    states: list[list[np.ndarray]] = []
    for stored in sorted(deltas, key=lambda it: it.manifest.version):
        states = [*states[-1:], _floats(shadow)]
        shadow.advance(stored.manifest, np.fromfile(stored.path, np.uint8), {})
    return states[-1], _floats(shadow)


def _floats(shadow: Any) -> list[np.ndarray]:
    return [shadow.shards[name].words.view(np.float32).copy() for name in shadow.schema]


# ------------------------------------------------------------------------------- a larger model's


def adamw_deltas(options: argparse.Namespace) -> list[Delta]:
    """One and several AdamW steps at lr 1e-6, after some pretraining and some such steps.

    Four are a PPO step of two epochs over two minibatches.
    """
    torch.set_num_threads(options.threads)
    model = _model(options)
    batches = _markov_batches(model.config.vocab_size, 4 if options.quick else 8, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LEARNING_RATE, weight_decay=0.0)
    pretraining = 6 if options.quick else 25
    for step in range(pretraining):
        optimizer.param_groups[0]["lr"] = PRETRAIN_LEARNING_RATE * min(1, (step + 1) / 5)
        _train_step(model, optimizer, next(batches), None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    torch.manual_seed(0)
    warm, spans = (3, (1, 2)) if options.quick else (8, (1, 3, 4))
    states = []
    for _ in range(warm + spans[-1]):
        tokens = next(batches)
        _train_step(model, optimizer, tokens, torch.randn(len(tokens), 1))
        states = [*states[-spans[-1] :], _state(model)]
    return [Delta(f"AdamW, lr 1e-6, {span} steps", states[-1 - span], states[-1]) for span in spans]


def _model(options: argparse.Namespace) -> Any:
    from kleash.lm.tiny import build_causal_lm

    sizes = (256, 4, 4096) if options.quick else (512, 12, 16384)
    hidden, layers, vocabulary = sizes
    return build_causal_lm(
        "llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=8,
        intermediate_size=4 * hidden,
    ).train()


def _markov_batches(vocabulary: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Sequences of 64 tokens; each token has few successors, the first ones likelier."""
    rng = np.random.default_rng(seed)
    successors = rng.integers(5, vocabulary, (vocabulary, SUCCESSORS))
    weights = 1 / np.arange(1, SUCCESSORS + 1)
    starts = 1 / np.arange(1, vocabulary + 1)
    while True:
        tokens = np.empty((size, 64), np.int64)
        tokens[:, 0] = rng.choice(vocabulary, size, p=starts / starts.sum())
        for place in range(1, 64):
            choice = rng.choice(SUCCESSORS, size, p=weights / weights.sum())
            tokens[:, place] = successors[tokens[:, place - 1], choice]
        yield torch.from_numpy(tokens)


def _train_step(
    model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, advantages: Any
) -> None:
    """One step on the tokens' log-probs, weighted by ``advantages`` (B, 1) if given."""
    logits = model(input_ids=tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    loss = (losses if advantages is None else losses * advantages).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _state(model: Any) -> list[np.ndarray]:
    from kleash.lm.digest import canonical_tensors

    tensors = canonical_tensors(model).values()
    return [tensor.reshape(-1).numpy().copy() for tensor in tensors]
