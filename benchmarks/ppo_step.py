"""Time of each phase of a PPO step and samples per second, on a model of given dimensions.

    python benchmarks/ppo_step.py         the demo's size, services as separate processes
    python benchmarks/ppo_step.py --quick --json out.json
    python benchmarks/ppo_step.py --hidden 256 --layers 6 --batch 64 --response-tokens 64

Random weights and random prompts of exactly --prompt-tokens tokens; responses run to
--response-tokens unless an end token is drawn by chance (their mean length is printed), so that
another system can be given the same work: the same dimensions, batch, lengths, epochs and
minibatches. The first step warms up and is left out; figures are medians over the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PHASES = (
    "time_generate_s",
    "time_score_s",
    "time_old_log_probs_s",
    "time_update_s",
    "time_publish_s",
    "step_s",
)


def main() -> None:
    """Parse, run, print, write."""
    from environment import environment

    options = _parse()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    with tempfile.TemporaryDirectory() as folder:
        rows = _run(options, Path(folder))
    measured = rows[1:]
    medians = {name: statistics.median(row[name] for row in measured) for name in PHASES}
    summary = {
        **{name.removeprefix("time_"): round(value, 4) for name, value in medians.items()},
        "samples_per_s": round(options.batch / medians["step_s"], 3),
        "response_tokens_mean": round(
            statistics.mean(row["response_length_mean"] for row in measured), 2
        ),
        "publish_frac": round(medians["time_publish_s"] / medians["step_s"], 5),
        "generate_frac": round(medians["time_generate_s"] / medians["step_s"], 4),
    }
    print(f"{'phase':<22}{'median s':>10}{'share':>9}")
    for name, value in medians.items():
        print(f"{name.removeprefix('time_'):<22}{value:>10.3f}{value / medians['step_s']:>9.1%}")
    print(
        f"samples/s {summary['samples_per_s']}, {len(measured)} steps measured, "
        f"responses {summary['response_tokens_mean']} tokens on average"
    )
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "summary": summary,
                    "options": vars(options) | {"json": str(options.json)},
                    "environment": environment("torch", "transformers"),
                    "steps": measured,
                },
                indent=2,
            )
            + "\n"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small model and few steps: under 45 s"
    )
    parser.add_argument(
        "--json", type=Path, help="write summary, options, environment and every step to this file"
    )
    parser.add_argument("--kind", choices=("llama", "qwen2", "gpt2"), default="llama")
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=0, help="0 means 3 x hidden")
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after one to warm up")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument(
        "--services",
        choices=("grpc", "local"),
        default="grpc",
        help="separate processes over gRPC, or everything in this process",
    )
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.layers, options.batch, options.steps = 64, 2, 32, 3
    return options


def _run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Build models and prompts, run PPO, return the rows of metrics.jsonl."""
    import torch

    from kleash.ppo.config import PPOConfig
    from kleash.ppo.train import train

    torch.set_num_threads(options.threads)
    model, reward = make_models(options, folder)
    write_prompts(options, folder / "prompts.jsonl")
    config = PPOConfig.model_validate(
        {
            "out": folder / "run",
            "prompts": str(folder / "prompts.jsonl"),
            "model": model,
            "reward_model": reward,
            "total_steps": options.steps + 1,
            "batch_size": options.batch,
            "max_prompt_tokens": options.prompt_tokens,
            "sampling": {"max_new_tokens": options.response_tokens},
            "algorithm": {"epochs": options.epochs, "minibatches": options.minibatches},
            "checkpoint": {"every": options.steps + 1},
        }
    )
    with _services(options, config) as services:
        train(config, services)
    return [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]


def make_models(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Folders of a policy and of a reward model with random weights."""
    from kleash.lm.heads import Normalization, reward_model_from_causal_lm
    from kleash.lm.load import load_tokenizer, save_checkpoint_folder
    from kleash.lm.tiny import write_tiny_folder

    texts = [f"word{i} {chr(97 + i % 26)}{i * 7919 % 1000}" for i in range(2000)]
    model = write_tiny_folder(
        folder / "model",
        options.kind,
        texts,
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        num_layers=options.layers,
        num_heads=options.heads,
        intermediate_size=options.intermediate or None,
        max_positions=options.prompt_tokens + options.response_tokens,
    )
    scorer = reward_model_from_causal_lm(model, seed=0)
    Normalization().store(scorer.config)
    save_checkpoint_folder(
        scorer, load_tokenizer(model), folder / "reward", {"stage": "reward-model"}
    )
    return model, folder / "reward"


def write_prompts(options: argparse.Namespace, path: Path) -> None:
    """Texts that tokenize to exactly --prompt-tokens tokens: digits, one token each."""
    import random

    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(options.batch * 4):
            file.write(
                json.dumps({"prompt": "".join(rng.choices("0123456789", k=options.prompt_tokens))})
                + "\n"
            )


@contextlib.contextmanager
def _services(options: argparse.Namespace, config: Any) -> Iterator[Any]:
    """Running services: child processes behind gRPC, or objects in this process."""
    from kleash.ppo.services import connect
    from kleash.up.config import UpConfig
    from kleash.up.local import local_services
    from kleash.up.run import running_services

    up = UpConfig(ppo=config, service_threads=options.threads)
    if options.services == "local":
        with local_services(up) as services:
            yield services
    else:
        with running_services(up) as services_config, connect(services_config) as services:
            yield services


if __name__ == "__main__":
    main()
