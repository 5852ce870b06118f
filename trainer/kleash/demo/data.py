"""The demo's data files, in the formats that users bring: all of them functions of a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kleash.base.errors import ConfigError
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
    """Write the prompts and demonstrations of every stage.

    base.jsonl, sft.jsonl, comparison-prompts.jsonl (the first ones are held out from the reward
    model), ppo-prompts.jsonl and held-out.jsonl. No text that is held out from a stage occurs in
    what any stage before or including it learns from.
    """
    sizes = settings.world
    held_out = make_splits(
        {"final": sizes.held_out_prompts, "comparisons": sizes.held_out_comparison_prompts},
        seed=seed,
    )
    avoid = {task.text for tasks in held_out.values() for task in tasks}

    def stream(number: int, count: int) -> Iterator[Task]:
        return islice(stream_tasks(seed=seed * 10 + number, avoid=avoid), count)

    folder.mkdir(parents=True)
    demonstrations = {
        "base": (stream(0, sizes.base_dialogues), sizes.base_mixture),
        "sft": (stream(1, sizes.sft_dialogues), sizes.sft_mixture),
    }
    for name, (tasks, mixture) in demonstrations.items():
        rng = random.Random(f"{name} {seed}")
        write_lines(folder / f"{name}.jsonl", _demonstrations(tasks, mixture, rng))
    prompts = {
        "comparison-prompts": [*held_out["comparisons"], *stream(2, sizes.comparison_prompts)],
        "ppo-prompts": stream(3, sizes.ppo_prompts),
        "held-out": held_out["final"],
    }
    for name, tasks in prompts.items():
        records = (prompt_record(task, f"{name}-{number}") for number, task in enumerate(tasks))
        write_lines(folder / f"{name}.jsonl", records)


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

    Returns their figures; the noise ceiling is that of the held-out pairs. Raises ConfigError when
    the settings make too little of something.
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
    # A prompt whose responses were all the same has no line: places in the file do not tell.
    num_held_out = sum(
        int(row["id"].rpartition("-")[2]) < settings.world.held_out_comparison_prompts
        for row in rows
    )
    if not 0 < num_held_out < len(rows):
        raise ConfigError(
            f"of {len(rows)} prompts with different candidates {num_held_out} are held out, and "
            "both parts need some; raise settings.world.comparison_prompts and "
            "settings.world.held_out_comparison_prompts."
        )
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
