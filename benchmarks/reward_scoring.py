"""Scores per second and latency of the reward service, against two others on the same model.

    python benchmarks/reward_scoring.py --out out.json     everything, about eleven minutes
    python benchmarks/reward_scoring.py --quick            one small model, under 45 s

serial: a FastAPI server that scores one request at a time on its event loop, as OpenRLHF's does
(reward_scoring_serial.py; ``make bench-framework`` installs FastAPI). ceiling: transformers called
directly, in this machine's best case of large batches sorted by length. Each runs in a process of
its own with ``--threads`` threads of torch, and so do the callers, which wait for each answer
before they ask again. What is compared is measured in turn, several times; figures are medians of
these rounds, ratios medians of the ratios of one round.
"room" is the ceiling by what the model does alone, one text after the other: no server that
computes the same can be further above the serial one than that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "aiohttp")
CALLERS = (1, 16, 64)
NUM_TEXTS = 512
CEILING_BATCH_TOKENS = (1024, 4096, 16_384)
"""Batches of these many padded tokens are tried, and the fastest are the ceiling."""
VOCABULARY, NUM_WORDS = 4096, 3000
PROMPT_TOKENS, NUM_CANDIDATES, ANSWER_TOKENS = 256, 16, 48


@dataclass(frozen=True)
class Case:
    """A model, texts, and how long one measurement takes."""

    name: str
    hidden_size: int
    num_layers: int
    median_tokens: int
    """Of a text; lengths are log-normal with sigma 0.6, within a sixth and six times of it."""
    seconds: float
    batch_items: int
    """Texts in one call, where callers send batches."""
    num_texts: int = NUM_TEXTS
    num_prompts: int = 8
    rounds: int = 3

    @property
    def num_parameters(self) -> int:
        """Without norms."""
        size = self.hidden_size
        return VOCABULARY * size + self.num_layers * (4 * size * size + 3 * size * 3 * size)


QUICK = (Case("1M, short", 128, 2, 24, 1.0, 64, num_texts=128, num_prompts=2, rounds=1),)
FULL = (
    Case("1M, short", 128, 2, 24, 2.5, 512),
    Case("3M deep, short", 128, 12, 24, 2.5, 512),
    # One row takes as long as sixty-four, as where a GPU waits for its next kernel.
    Case("2M deepest, short", 64, 32, 24, 2.5, 512),
    Case("6M", 256, 6, 128, 3.0, 128, num_texts=256, num_prompts=2),
    Case("56M", 640, 10, 128, 5.0, 16, num_texts=64, num_prompts=1, rounds=2),
)


def main() -> None:
    """Run, print, write."""
    from environment import environment

    options = _parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    cases = QUICK if options.quick else FULL
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            its = Path(folder) / case.name.replace(", ", "-").replace(" ", "-")
            its.mkdir()
            results[case.name] = run_case(case, its, options)
            print_case(case, results[case.name])
    summary = summarize(results)
    print(json.dumps(summary, indent=2))
    if options.out:
        document = {
            "summary": summary,
            "options": vars(options) | {"out": str(options.out)},
            "environment": environment(*PACKAGES),
            "results": results,
        }
        options.out.write_text(json.dumps(document, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small model, one short round")
    parser.add_argument("--out", type=Path, help="write everything to this JSON file")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each server")
    return parser.parse_args()


def run_case(case: Case, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every measurement of one model."""
    from reward_scoring_processes import Asked, Ours, Serial

    model, texts, candidates = write_inputs(case, folder)
    threads = options.threads
    rounds = []
    with (
        Ours(model, threads) as ours,
        Serial(model, threads) as serial,
        Asked("reward_scoring_callers.py") as callers,
        Asked("reward_scoring_ceiling.py", str(model), str(threads), "float32") as ceiling,
        Asked("reward_scoring_candidates.py", str(model), str(threads)) as in_process,
    ):
        ours.wait()
        serial.wait()
        check_scores(callers, ours.address, serial.address, texts)
        ceiling_of = _with_best_batches(ceiling, texts)

        def call(client: str, **job: Any) -> dict[str, Any]:
            job = {"texts": str(texts), "seconds": case.seconds, "items": 1} | job
            address = serial.address if client == "http" else ours.address
            return callers.ask(client=client, address=address, **job)

        for _ in range(case.rounds):
            rounds.append(_round(case, candidates, call, ceiling_of))
        reuse = in_process.ask(
            texts=str(candidates), rounds=case.rounds, num_candidates=NUM_CANDIDATES
        )
    found: dict[str, Any] = {"parameters": case.num_parameters, "rounds": rounds, "reuse": reuse}
    if not options.quick:
        found["bfloat16"] = run_bfloat16(case, model, texts, options)
    return found | {"medians": medians(rounds)}


def _with_best_batches(ceiling: Any, texts: Path) -> Callable[..., dict[str, Any]]:
    """Asks ``ceiling`` with the batches that are the fastest."""
    rates = {
        size: ceiling.ask(texts=str(texts), batch_tokens=size)["sequences_per_s"]
        for size in CEILING_BATCH_TOKENS
    }
    best = max(rates, key=lambda size: rates[size])

    def ask(texts: Path = texts, **job: Any) -> dict[str, Any]:
        return ceiling.ask(texts=str(texts), batch_tokens=best, **job)

    return ask


def _round(
    case: Case,
    candidates: Path,
    call: Callable[..., dict[str, Any]],
    ceiling: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """One measurement of everything, what is compared side by side."""
    found: dict[str, Any] = {}
    for number in CALLERS:
        found[f"ours_{number}"] = call("aio", callers=number)
        found[f"serial_{number}"] = call("http", callers=number)
    found["ours_sync_64"] = call("sync", callers=64)
    found["ours_batches"] = call("aio", items=case.batch_items, callers=4)
    found["ceiling"] = ceiling(alone=case.num_texts // 8)
    found["ours_candidates"] = call("aio", texts=str(candidates), items=NUM_CANDIDATES, callers=2)
    found["ceiling_candidates"] = ceiling(candidates)
    return found


def run_bfloat16(
    case: Case, model: Path, texts: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Batches with weights in bfloat16, beside transformers in bfloat16 and in float32."""
    from reward_scoring_processes import Asked, Ours

    threads = str(options.threads)
    rates: dict[str, list[float]] = {"ours": [], "ceiling_bfloat16": [], "ceiling_float32": []}
    with (
        Ours(model, options.threads, "--dtype=bfloat16") as ours,
        Asked("reward_scoring_callers.py") as callers,
        Asked("reward_scoring_ceiling.py", str(model), threads, "bfloat16") as half,
        Asked("reward_scoring_ceiling.py", str(model), threads, "float32") as full,
    ):
        ours.wait()
        half_of, full_of = (_with_best_batches(each, texts) for each in (half, full))
        for _ in range(case.rounds):
            job = {"items": case.batch_items, "callers": 4, "seconds": case.seconds}
            its = callers.ask(client="aio", address=ours.address, texts=str(texts), **job)
            rates["ours"].append(its["sequences_per_s"])
            rates["ceiling_bfloat16"].append(half_of()["sequences_per_s"])
            rates["ceiling_float32"].append(full_of()["sequences_per_s"])
    return {name: statistics.median(each) for name, each in rates.items()}


def check_scores(callers: Any, ours: str, serial: str, texts: Path) -> None:
    """Both servers must do the same work. Raises SystemExit."""
    few = texts.with_name("few.json")
    few.write_text(json.dumps(json.loads(texts.read_text())[:8]))
    one, other = (
        callers.ask(client=client, address=address, texts=str(few), items=1, seconds=0)["scores"]
        for client, address in (("aio", ours), ("http", serial))
    )
    apart = max(abs(a - b) for a, b in zip(one, other, strict=True))
    if apart > 1e-4:
        raise SystemExit(f"the two servers' scores are {apart:.2g} apart: {one}, {other}")


def medians(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each figure over the rounds, and of the ratios within a round."""
    found = {
        name: {key: statistics.median(each[name][key] for each in rounds) for key in keys}
        for name, keys in rounds[0].items()
    }

    def ratio(name: str, other: str, key: str = "sequences_per_s") -> float:
        pairs = [(each[name]["sequences_per_s"], each[other][key]) for each in rounds]
        return statistics.median(one / two for one, two in pairs)

    found["ratios"] = {
        **{f"serial_{n}_callers": ratio(f"ours_{n}", f"serial_{n}") for n in CALLERS},
        "ceiling": ratio("ours_batches", "ceiling"),
        "ceiling_candidates": ratio("ours_candidates", "ceiling_candidates"),
        "room": ratio("ceiling", "ceiling", "alone_per_s"),
    }
    return found


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """The headline: where the model leaves most room, and the worst against the ceiling."""
    ratios = {name: its["medians"]["ratios"] for name, its in results.items()}
    best = max(ratios, key=lambda name: ratios[name]["serial_64_callers"])
    return {
        "ratio_vs_serial_server_64_callers": ratios[best]["serial_64_callers"],
        "ratio_vs_serial_server_64_callers_of": best,
        "ratio_vs_ceiling": min(each["ceiling"] for each in ratios.values()),
        "candidates_speedup": max(its["reuse"]["speedup"] for its in results.values()),
        "by_case": ratios,
    }


def print_case(case: Case, found: dict[str, Any]) -> None:
    """A table."""
    print(f"\n{case.name}: {case.num_parameters / 1e6:.1f} M parameters, ", end="")
    print(f"texts of {case.median_tokens} tokens (median)")
    for name, its in found["medians"].items():
        if name == "ratios":
            continue
        print(f"  {name:20}{its['sequences_per_s']:10.1f} sequences/s", end="")
        print(*(f"  {key[:3]} {its[key]:9.1f} ms" for key in ("p50_ms", "p99_ms") if key in its))
    for name, ratio in found["medians"]["ratios"].items():
        print(f"  ratio {name:22}{ratio:6.2f}")
    reuse = found["reuse"]
    print(f"  {NUM_CANDIDATES} candidates, prompt once  {reuse['speedup']:6.2f} x", end="")
    print(f", scores apart {reuse['apart']:.1e}")
    for name, rate in found.get("bfloat16", {}).items():
        print(f"  bfloat16: {name:18}{rate:10.1f} sequences/s")


def write_inputs(case: Case, folder: Path) -> tuple[Path, Path, Path]:
    """The model's folder, a file of texts, and a file of texts that are candidates of a prompt."""
    from kleash.lm.heads import reward_model_from_causal_lm
    from kleash.lm.load import load_tokenizer, save_checkpoint_folder
    from kleash.lm.tiny import write_tiny_folder

    letters = random.Random(0)
    words = [
        "".join(letters.choices("etaoinshrdlucmfw", k=letters.randint(2, 9)))
        for _ in range(NUM_WORDS)
    ]
    base = write_tiny_folder(
        folder / "base",
        "llama",
        [_text(words, 400, seed) for seed in range(200)],
        vocab_size=VOCABULARY,
        hidden_size=case.hidden_size,
        num_layers=case.num_layers,
        num_heads=case.hidden_size // 64,
        max_positions=2048,
    )
    tokenizer = load_tokenizer(base)
    model = reward_model_from_causal_lm(base, seed=1)
    save_checkpoint_folder(model, tokenizer, folder / "reward", {"stage": "benchmark"})

    def text(num_tokens: int, seed: int) -> str:
        ids = tokenizer(_text(words, num_tokens, seed))["input_ids"][:num_tokens]
        return tokenizer.decode(ids)

    lengths = random.Random(1)
    middle = case.median_tokens

    def length(median: int) -> int:
        drawn = lengths.lognormvariate(math.log(median), 0.6)
        return round(min(max(drawn, median / 6), 6 * median))

    texts = [text(length(middle), 1000 + place) for place in range(case.num_texts)]
    prompts = [text(PROMPT_TOKENS, 9000 + place) for place in range(case.num_prompts)]
    candidates = [
        prompt + " " + text(length(ANSWER_TOKENS), 10_000 + NUM_CANDIDATES * place + answer)
        for place, prompt in enumerate(prompts)
        for answer in range(NUM_CANDIDATES)
    ]
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "candidates.json").write_text(json.dumps(candidates))
    return folder / "reward", folder / "texts.json", folder / "candidates.json"


def _text(words: list[str], num_words: int, seed: int) -> str:
    """Words with the frequencies of Zipf's law."""
    generator = random.Random(seed)
    weights = [1 / (place + 1) for place in range(len(words))]
    return " ".join(generator.choices(words, weights, k=num_words))


if __name__ == "__main__":
    main()
