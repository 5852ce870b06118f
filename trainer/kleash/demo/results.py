"""The end of the demo: gold scores of the models on held-out prompts, and the report."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kleash.base.durable import write_whole
from kleash.data.chat import render_prompt, render_response
from kleash.demo.annotators import gold_sign_accuracy
from kleash.demo.data import read_lines
from kleash.demo.folder import RESULTS
from kleash.demo.judge import score
from kleash.evaluate.report import DialogueSample, render_report
from kleash.evaluate.statistics import compare_paired
from kleash.lm.decode import DecodeRequest
from kleash.lm.digest import model_digest
from kleash.lm.generate import generate
from kleash.lm.load import load_causal_lm, load_sequence_classifier, load_tokenizer
from kleash.reward_model.evaluation import score_sequences

if TYPE_CHECKING:
    from kleash.demo.pipeline import Demo

DIMENSIONS = ("helpful", "harmless", "honest")
EVALUATION_SEED = 20_000
"""Far from the seeds of training: responses of the evaluation are draws of their own."""
SAMPLES_PER_KIND = 2
MAX_BATCH_TOKENS = 8192
HELD_OUT_FIGURES = (
    "loss", "mean_margin", "expected_calibration_error", "calibration", "score_length_correlation",
    "num_pairs",
)  # fmt: skip
PPO_FIGURES = (
    "steps", "kl_per_sequence_nats", "reward_mean_first", "reward_mean_last", "score_mean_first",
    "score_mean_last", "step_s_mean", "samples_per_s_mean",
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """A model's responses to the held-out prompts and their gold scores, in the prompts' order."""

    responses: list[str]
    totals: np.ndarray
    gold: dict[str, float]
    """Mean total, and mean by dimension over the prompts that are about it."""
    sycophancy: float
    """Share of wrong claims that it agrees with."""
    digest: str


@dataclass(frozen=True)
class Evaluation:
    """What the end of the demo measures."""

    records: list[dict[str, Any]]
    """The held-out prompts."""
    judged: dict[str, Judged]
    """By model: base, sft, ppo."""
    reward_model_digest: str
    gold_sign_accuracy: float
    """Of the reward model."""


def evaluate(demo: Demo) -> Evaluation:
    """Judge the three models and the reward model on what nothing was trained on."""
    records = read_lines(demo.data / "held-out.jsonl")
    folders = {
        "base": demo.out / "base",
        "sft": demo.out / "sft",
        "ppo": demo.out / "ppo" / "policy",
    }
    judged = {}
    demo.progress.start(len(folders), "evaluation")
    for name, folder in folders.items():
        judged[name] = judge_model(folder, records, max_new_tokens=demo.settings.max_new_tokens)
        demo.progress.advance(1, gold=judged[name].gold["total"])
    reward_model = demo.out / "reward-model"
    return Evaluation(
        records=records,
        judged=judged,
        reward_model_digest=model_digest(load_sequence_classifier(reward_model)),
        gold_sign_accuracy=reward_model_gold_accuracy(
            reward_model, demo.data / "held-out-comparisons.jsonl"
        ),
    )


def write_report(demo: Demo, evaluation: Evaluation) -> dict[str, Any]:
    """Write report.json and report.html."""
    judged = evaluation.judged
    pairs = {"ppo_vs_sft": ("ppo", "sft"), "sft_vs_base": ("sft", "base")}
    compared = {
        name: compare_paired(judged[first].totals, judged[second].totals, seed=demo.config.seed)
        for name, (first, second) in pairs.items()
    }
    stages = stage_figures(demo.out)
    stages["reward_model"]["gold_sign_accuracy"] = evaluation.gold_sign_accuracy
    report = {
        "title": "Kleash demo: three stages of RLHF on the small world",
        "summary": _summary(demo, stages),
        "seed": demo.config.seed,
        "stages": stages,
        "gold": {name: result.gold for name, result in judged.items()},
        "sycophancy": {name: result.sycophancy for name, result in judged.items()},
        "win_rate": {name: result.win_rate.to_dict() for name, result in compared.items()},
        "gold_difference": {
            name: {"mean": result.mean_difference, "ci95": list(result.ci95)}
            for name, result in compared.items()
        },
        "wall_seconds": demo.wall_seconds,
        "versions": _versions(),
        "digests": {name: result.digest for name, result in judged.items()}
        | {"reward_model": evaluation.reward_model_digest},
    }
    render_report(
        report,
        read_lines(demo.out / "ppo" / "metrics.jsonl"),
        _samples(evaluation.records, judged["sft"], judged["ppo"]),
        demo.out / "report.html",
    )
    write_whole(demo.out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def stage_figures(out: Path) -> dict[str, dict[str, Any]]:
    """What the stages themselves reported, from the files that they left."""
    comparisons = _read(out / RESULTS["comparisons"])
    held_out = _read(out / "reward-model" / "report.json")["held_out"]
    return {
        "base": _pick(_read(out / "base" / "report.json"), loss="loss_last", steps="steps"),
        "sft": _pick(
            _read(out / "sft" / "report.json"),
            loss="loss_last",
            **{key: key for key in ("loss_first", "steps", "evaluation_loss")},
        ),
        "comparisons": comparisons,
        "reward_model": {
            **{key: held_out[key] for key in ("accuracy", "accuracy_ci95")},
            **{key: comparisons[key] for key in ("label_noise_ceiling", "annotator_disagreement")},
            **{key: held_out[key] for key in HELD_OUT_FIGURES},
        },
        "ppo": {key: _read(out / RESULTS["ppo"])[key] for key in PPO_FIGURES},
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _pick(report: dict[str, Any], **names: str) -> dict[str, Any]:
    """Figures of a report under other names."""
    return {name: report[key] for name, key in names.items()}


def judge_model(folder: Path, records: list[dict[str, Any]], *, max_new_tokens: int) -> Judged:
    """Sample one response to each prompt at temperature 1 and judge it."""
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    stop_ids = frozenset({tokenizer.eos_token_id})
    requests = [
        DecodeRequest(
            prompt=render_prompt(tokenizer, record["prompt"]),
            prompt_id=record["id"],
            sample_index=0,
            seed=EVALUATION_SEED,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
        )
        for record in records
    ]
    responses = [
        tokenizer.decode(decoded.ids.tolist(), skip_special_tokens=True)
        for decoded in generate(model, requests, max_slots=128)
    ]
    verdicts = [
        score(record, response) for record, response in zip(records, responses, strict=True)
    ]
    totals = np.array([verdict.total for verdict in verdicts])
    of_dimension = {
        name: [verdict.total for verdict in verdicts if verdict.dimension == name]
        for name in DIMENSIONS
    }
    wrong_claims = [v for r, v in zip(records, verdicts, strict=True) if r["kind"] == "wrong_claim"]
    return Judged(
        responses=responses,
        totals=totals,
        gold={"total": float(totals.mean())}
        | {name: float(np.mean(of)) for name, of in of_dimension.items()},
        sycophancy=float(np.mean([verdict.is_sycophantic for verdict in wrong_claims])),
        digest=model_digest(model),
    )


def reward_model_gold_accuracy(folder: Path, comparisons: Path) -> float:
    """Share of held-out pairs of different worth that the reward model orders as the judge does."""
    model, tokenizer = load_sequence_classifier(folder), load_tokenizer(folder)
    rows = read_lines(comparisons)
    sequences = [
        render_response(tokenizer, row["prompt"], response)
        for row in rows
        for response in row["responses"]
    ]
    scores = iter(score_sequences(model, sequences, MAX_BATCH_TOKENS).tolist())
    by_prompt = [[next(scores) for _ in row["responses"]] for row in rows]
    return gold_sign_accuracy([row["gold"] for row in rows], by_prompt)[0]


def _samples(records: list[dict[str, Any]], before: Judged, after: Judged) -> list[DialogueSample]:
    """The first prompts of every kind: the file is in random order, so not chosen by score."""
    seen: defaultdict[str, int] = defaultdict(int)
    samples = []
    for index, record in enumerate(records):
        seen[record["kind"]] += 1
        if seen[record["kind"]] <= SAMPLES_PER_KIND:
            samples.append(
                DialogueSample(
                    prompt=record["prompt"][0]["content"],
                    kind=record["kind"].replace("_", " "),
                    before=before.responses[index],
                    before_score=float(before.totals[index]),
                    after=after.responses[index],
                    after_score=float(after.totals[index]),
                )
            )
    return sorted(samples, key=lambda sample: sample.kind)


def _summary(demo: Demo, stages: dict[str, dict[str, Any]]) -> str:
    world, rankings = demo.settings.world, int(stages["comparisons"]["num_rankings"])
    return (
        f"A base model of {demo.settings.model.num_layers} layers was trained from nothing on "
        f"{world.base_dialogues} dialogues, fine-tuned on {world.sft_dialogues} demonstrations, a "
        f"reward model on {rankings} noisy rankings, and the policy by "
        f"{demo.settings.ppo.total_steps} steps of PPO against three gRPC services. "
        f"Seed {demo.config.seed}."
    )


def _versions() -> dict[str, str]:
    import grpc
    import torch
    import transformers

    from kleash.base.version import software_version

    return {
        "kleash": software_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "grpcio": grpc.__version__,
    }
