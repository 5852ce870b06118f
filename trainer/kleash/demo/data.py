"""The demo's data files, in the formats that users bring: all of them functions of a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from kleash.demo import demonstrators
from kleash.demo.annotators import Annotator, gold_differences, label, sigmoid, write_lines
from kleash.demo.demonstrators import Demonstrator, respond
from kleash.demo.settings import DemoSettings, Mixture
from kleash.demo.world import Task, make_splits, prompt_record, stream_tasks
from kleash.evaluate.statistics import label_noise_ceiling

ANNOTATORS = tuple(Annotator(f"annotator-{letter}") for letter in "abcd")
"""Four people who differ by their noise alone."""

WRITERS: dict[str, Demonstrator] = {
    person.name: person
    for person in (
        demonstrators.CAREFUL,
        demonstrators.HURRIED,
        demonstrators.PLEASER,
        demonstrators.GUESSER,
        demonstrators.SHY,
    )
}


def write_world(settings: DemoSettings, folder: Path, *, seed: int) -> None:
    """Write base.jsonl, sft.jsonl, comparison-prompts.jsonl, ppo-prompts.jsonl, held-out.jsonl.

    No held-out prompt text occurs in any other file.
    """
    sizes = settings.world
    splits = make_splits(
        {
            "held-out": sizes.held_out_prompts,
            "sft": sizes.sft_dialogues,
            "comparison-prompts": sizes.comparison_prompts + sizes.held_out_comparison_prompts,
            "ppo-prompts": sizes.ppo_prompts,
        },
        seed=seed,
    )
    folder.mkdir(parents=True)
    held_out = {task.text for task in splits["held-out"]}
    base_tasks = islice(stream_tasks(seed=seed, avoid=held_out), sizes.base_dialogues)
    write_lines(
        folder / "base.jsonl",
        _demonstrations(base_tasks, sizes.base_mixture, random.Random(f"base {seed}")),
    )
    write_lines(
        folder / "sft.jsonl",
        _demonstrations(splits["sft"], sizes.sft_mixture, random.Random(f"sft {seed}")),
    )
    for name in ("held-out", "comparison-prompts", "ppo-prompts"):
        write_lines(
            folder / f"{name}.jsonl",
            (prompt_record(task, f"{name}-{number}") for number, task in enumerate(splits[name])),
        )


def _demonstrations(
    tasks: Iterable[Task], mixture: Mixture, rng: random.Random
) -> Iterable[dict[str, Any]]:
    people, weights = list(mixture), list(mixture.values())
    for task in tasks:
        writer = WRITERS[rng.choices(people, weights)[0]]
        behaviour = rng.choices(list(writer.behaviours), list(writer.behaviours.values()))[0]
        prompt = [{"role": "user", "content": task.text}]
        yield {"prompt": prompt, "completion": respond(task, behaviour, rng), "writer": writer.name}


def write_comparisons(
    settings: DemoSettings, candidates: Path, folder: Path, *, seed: int
) -> dict[str, float]:
    """Let annotators rank the candidates: comparisons.jsonl and held-out-comparisons.jsonl.

    Returns their figures; the noise ceiling is that of the held-out pairs.
    """
    everything = folder / "all-comparisons.jsonl"
    labels = label(
        candidates,
        everything,
        ANNOTATORS,
        disagreement=settings.reward_model.disagreement,
        seed=seed,
    )
    rows = read_lines(everything)
    num_held_out = settings.world.held_out_comparison_prompts
    write_lines(folder / "comparisons.jsonl", rows[num_held_out:])
    write_lines(folder / "held-out-comparisons.jsonl", rows[:num_held_out])
    differences = gold_differences(row["gold"] for row in rows[:num_held_out])
    return {
        "tau": labels.tau,
        "annotator_disagreement": labels.disagreement,
        "label_noise_ceiling": label_noise_ceiling(sigmoid(differences / labels.tau)),
        "num_rankings": float(len(rows) - num_held_out),
        "num_held_out_pairs": float(len(differences)),
        "tied_frac": labels.num_tied_pairs / labels.num_pairs,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
