"""``kleash reward-model`` on tiny models: facts/ppo.md R1 to R11, bugs 19, 27, 39, 41, 42.

The rule to learn: the response that says "fox" wins.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kleash.base.config import load_config
from kleash.base.errors import ConfigError, UserError
from kleash.base.progress import NullProgress
from kleash.data.comparisons import load_comparisons
from kleash.data.demonstrations import load_demonstrations
from kleash.lm.digest import model_digest
from kleash.lm.heads import Normalization, reward_model_from_causal_lm
from kleash.lm.load import load_causal_lm, load_sequence_classifier, load_tokenizer
from kleash.reward_model.batches import ranking_sequences
from kleash.reward_model.config import RewardModelConfig
from kleash.reward_model.evaluation import score_rankings, score_sequences
from kleash.reward_model.train import RewardModelReport, train

pytestmark = pytest.mark.unit

WORDS = [
    "the",
    "quick",
    "brown",
    "jumps",
    "over",
    "lazy",
    "dog",
    "says",
    "hello",
    "to",
    "world",
    "bigger",
]

Write = Callable[[str, list[dict[str, Any]]], str]


def response(random: np.random.Generator, *, says_fox: bool) -> str:
    words = list(random.choice(WORDS, size=random.integers(2, 6)))
    if says_fox:
        words.insert(random.integers(0, len(words) + 1), "fox")
    return " ".join(words)


def pairs(count: int, *, seed: int = 0, wrong: float = 0.0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    records = []
    for index in range(count):
        texts = [response(random, says_fox=True), response(random, says_fox=False)]
        chosen, rejected = texts[::-1] if random.random() < wrong else texts
        records.append({"prompt": f"What is {index}?", "chosen": chosen, "rejected": rejected})
    return records


def rankings(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Four responses, three ranks: one says fox, two are tied in the middle."""
    random = np.random.default_rng(seed)
    return [
        {
            "prompt": f"Which is {index}?",
            "responses": [response(random, says_fox=n == index % 4) for n in range(4)],
            "ranks": [1 if n == index % 4 else 2 + (n == (index + 1) % 4) for n in range(4)],
        }
        for index in range(count)
    ]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_jsonl(name: str, records: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write_jsonl


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Callable[..., RewardModelReport]:
    """Train into ``tmp_path / out`` with settings that suit a tiny model."""

    def run_training(data: str, out: str = "out", **options: Any) -> RewardModelReport:
        settings: dict[str, Any] = {
            "model": tiny_folder,
            "learning_rate": 3e-3,
            "batch_size": 8,
            "evaluation_fraction": 0.2,
        }
        config = RewardModelConfig(data=data, out=tmp_path / out, **settings | options)
        return train(config, NullProgress())

    return run_training


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_learns_the_rule_and_writes_a_whole_folder(
    run: Any, write: Write, tmp_path: Path, tiny_folder: Path
) -> None:
    report = run(write("pairs.jsonl", pairs(400)), evaluation_fraction=0.25, run_id="nightly-7")
    held_out = report.held_out
    assert held_out is not None
    assert held_out.accuracy > 0.95
    assert held_out.num_pairs == 100
    assert held_out.accuracy_ci95.low > 0.9
    assert held_out.loss < 0.2
    assert (report.num_rankings, report.steps) == (300, 38)
    assert report.training.accuracy > 0.95
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pairs.jsonl"]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["held_out"]["accuracy"] == held_out.accuracy
    assert written["held_out"]["accuracy_ci95"] == list(held_out.accuracy_ci95)
    lineage = json.loads((tmp_path / "out" / "kleash.json").read_text())
    model = load_sequence_classifier(tmp_path / "out")
    assert (lineage["stage"], lineage["run_id"]) == ("reward-model", "nightly-7")
    assert lineage["digest"] == report.digest == model_digest(model)
    assert lineage["parent_digest"] == model_digest(load_causal_lm(tiny_folder))
    assert len(lineage["data_sha256"]) == 64
    assert Normalization.of(model.config) == report.normalization


def test_shuffled_labels_teach_nothing(run: Any, write: Write) -> None:
    """The held-out accuracy of 500 coins is within 3 standard errors of 1/2."""
    report = run(
        write("pairs.jsonl", pairs(800, wrong=0.5)), evaluation_fraction=0.625, learning_rate=1e-3
    )
    assert abs(report.held_out.accuracy - 0.5) < 3 * math.sqrt(0.25 / 500)


def test_accuracy_on_noisy_labels_reaches_and_respects_the_ceiling(run: Any, write: Write) -> None:
    """With 20 % wrong labels no model is right on more than 80 % of them, up to 3 SE."""
    report = run(write("pairs.jsonl", pairs(700, wrong=0.2)), evaluation_fraction=0.4)
    assert abs(report.held_out.accuracy - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 280) + 0.02


def test_plain_transformers_gives_the_same_raw_scores(
    run: Any, write: Write, tmp_path: Path
) -> None:
    import transformers

    data = write("rankings.jsonl", rankings(12))
    run(data)
    tokenizer = load_tokenizer(tmp_path / "out")
    loaded = load_comparisons(data, tokenizer, max_tokens=200)
    sequences = [sequence for ranking in loaded for sequence in ranking_sequences(ranking)]
    ours = score_sequences(load_sequence_classifier(tmp_path / "out"), sequences, 400)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = tokenizer.pad({"input_ids": [s.ids.tolist() for s in sequences]}, return_tensors="pt")
    with torch.no_grad():
        theirs = plain(**batch).logits.squeeze(1).numpy()
    assert np.std(ours) > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_reference_responses_score_mean_zero_after_loading(
    run: Any, write: Write, tmp_path: Path
) -> None:
    """Bug 27, and checklist R8: mean and std travel inside the folder."""
    random = np.random.default_rng(1)
    demonstrations = write(
        "demonstrations.jsonl",
        [
            {"prompt": f"What is {n}?", "completion": response(random, says_fox=n % 3 > 0)}
            for n in range(60)
        ],
    )
    data = write("pairs.jsonl", pairs(60))
    report = run(data, reference_data=demonstrations)
    model, tokenizer = load_sequence_classifier(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    raw = score_sequences(model, load_demonstrations(demonstrations, tokenizer, max_tokens=99), 500)
    normalization = Normalization.of(model.config)
    scores = (raw - normalization.mean) / normalization.std
    assert abs(scores.mean()) < 1e-5
    assert scores.std() == pytest.approx(1, abs=1e-5)
    assert report.references.source == "demonstrations"
    assert report.references.num_responses == 60
    assert report.references.raw_mean == pytest.approx(raw.mean(), abs=1e-5)
    # The responses of the comparisons are others, with another mean.
    loaded = load_comparisons(data, tokenizer, max_tokens=99)
    others = (
        np.concatenate(score_rankings(model, loaded, 500)) - normalization.mean
    ) / normalization.std
    assert abs(others.mean()) > 0.1


def test_comparisons_stand_in_for_demonstrations(run: Any, write: Write, tmp_path: Path) -> None:
    data = write("pairs.jsonl", pairs(40))
    report = run(data, evaluation_fraction=0, normalization="mean")
    model, tokenizer = load_sequence_classifier(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    raw = np.concatenate(
        score_rankings(model, load_comparisons(data, tokenizer, max_tokens=99), 500)
    )
    assert report.references.source == "comparisons"
    assert report.references.num_responses == 80
    assert Normalization.of(model.config).mean == pytest.approx(raw.mean(), abs=1e-5)
    assert Normalization.of(model.config).std == 1
    assert report.held_out is None


def test_same_seed_same_weights(run: Any, write: Write) -> None:
    data = write("pairs.jsonl", pairs(24))
    first, again, other = run(data, "a"), run(data, "b"), run(data, "c", seed=1)
    assert first.digest == again.digest
    assert first.held_out == again.held_out
    assert other.digest != first.digest


def test_result_does_not_depend_on_the_micro_batches(
    run: Any, write: Write, tmp_path: Path
) -> None:
    """Bug 19: the loss of a step is that of all its prompts, however they are split."""
    data = write("mixed.jsonl", [*pairs(12), *rankings(12)])
    for name, tokens in (("a", 100_000), ("b", 150), ("c", 1)):
        run(data, name, micro_batch_tokens=tokens, batch_size=24)
    first, *others = (metrics_of(tmp_path / name)[0] for name in "abc")
    for other in others:
        for key in ("loss", "preference_loss", "accuracy", "grad_norm"):
            assert other[key] == pytest.approx(first[key], rel=1e-5)


def test_ties_are_dropped_and_counted(run: Any, write: Write, tmp_path: Path) -> None:
    """Bug 41: tied responses change nothing but the count."""
    records = pairs(16)
    tied = {
        "prompt": "What is it?",
        "responses": ["the dog", "hello world", "fox"],
        "ranks": [1] * 3,
    }
    same = {"prompt": "What is it?", "chosen": "the dog", "rejected": "the dog"}
    without = run(write("without.jsonl", records), "a")
    with_ties = run(write("with.jsonl", [*records[:9], tied, *records[9:], same]), "b")
    assert (without.num_ties_dropped, with_ties.num_ties_dropped) == (0, 4)
    assert with_ties.digest == without.digest
    ranked = run(write("rankings.jsonl", rankings(10)), "c", evaluation_fraction=0)
    assert (ranked.num_pairs, ranked.num_ties_dropped) == (50, 10)


def test_learning_rate_falls_to_zero_once_a_step(run: Any, write: Write, tmp_path: Path) -> None:
    """Bug 42: one value a step, by formula, whatever the micro-batches."""
    run(
        write("pairs.jsonl", pairs(20)), schedule="linear", warmup_fraction=0.0, batch_size=4,
        micro_batch_tokens=1, learning_rate=0.01,
    )  # fmt: skip
    rates = [row["learning_rate"] for row in metrics_of(tmp_path / "out")]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"use_margins": False}, lambda r: 0.0),
        ({"label_smoothing": 0.1, "use_margins": False}, lambda r: 0.1 * (r[0] - r[1])),
        ({"centring_coefficient": 0.5, "use_margins": False}, lambda r: 0.5 * (r[0] + r[1]) ** 2),
    ],
)
def test_loss_options_reach_the_loss(
    run: Any, write: Write, tmp_path: Path, tiny_folder: Path, options: Any, extra: Any
) -> None:
    """The first step's loss, from the scores of the model it starts with."""
    data = write("pairs.jsonl", [record | {"margin": 0.7} for record in pairs(4)])
    run(data, evaluation_fraction=0, **options)
    loaded = load_comparisons(data, load_tokenizer(tiny_folder), max_tokens=99)
    scores = score_rankings(reward_model_from_causal_lm(tiny_folder, seed=0), loaded, 500)
    expected = np.mean([np.logaddexp(0, r[1] - r[0]) + extra(r) for r in scores])
    assert metrics_of(tmp_path / "out")[0]["loss"] == pytest.approx(expected, rel=1e-5)
    run(data, "margins", evaluation_fraction=0)
    expected = np.mean([np.logaddexp(0, r[1] - r[0] + 0.7) for r in scores])
    assert metrics_of(tmp_path / "margins")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_data_is_reported_by_dimension_and_annotator(run: Any, write: Write) -> None:
    names = [{"dimension": "helpful", "annotator": "1"}, {"dimension": "honest", "annotator": "2"}]
    held_out = [record | names[i % 2] for i, record in enumerate(pairs(30, seed=2))]
    data = write("pairs.jsonl", pairs(20))
    report = run(data, evaluation_data=write("held.jsonl", held_out), evaluation_fraction=None)
    assert (report.num_rankings, report.held_out.num_rankings) == (20, 30)
    assert {k: v.num_pairs for k, v in report.held_out.by_dimension.items()} == {
        "helpful": 15, "honest": 15,
    }  # fmt: skip
    total = sum(group.accuracy * group.num_pairs for group in report.held_out.by_annotator.values())
    assert total / 30 == pytest.approx(report.held_out.accuracy)


def test_bfloat16_is_stored_and_normalized_as_stored(
    run: Any, write: Write, tmp_path: Path
) -> None:
    data = write("pairs.jsonl", pairs(60))
    report = run(data, dtype="bfloat16", evaluation_fraction=0)
    model = load_sequence_classifier(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert report.digest == model_digest(model)
    tokenizer = load_tokenizer(tmp_path / "out")
    for served in (model, load_sequence_classifier(tmp_path / "out", dtype="float32")):
        loaded = load_comparisons(data, tokenizer, max_tokens=99)
        raw = np.concatenate(score_rankings(served, loaded, 500))
        assert abs((raw.mean() - report.normalization.mean) / report.normalization.std) < 0.02


def test_divergence_stops_with_one_sentence(run: Any, write: Write, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"diverged at step \d.*lower learning_rate, which is 1e\+30"
    ):
        run(write("pairs.jsonl", pairs(40)), learning_rate=1e30)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 9}, r"pairs\.jsonl:1: field 'chosen': .* more than the 9 that fit"),
        ({"max_tokens": 4, "skip_bad": True}, r"pairs\.jsonl: holds no .*; all 6 were bad"),
        ({"max_tokens": 5000}, "takes 256 tokens"),
        ({"device": "cuda:9"}, "cuda|CUDA"),
        ({"data": "absent.jsonl"}, r"absent\.jsonl: there is no such file"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    run: Any, write: Write, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    data = write("pairs.jsonl", pairs(6))
    with pytest.raises(UserError, match=message) as caught:
        run(options.pop("data", data), **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_existing_output_is_refused_before_any_work(run: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        run("absent.jsonl")


def test_model_folder_without_weights_is_refused(
    run: Any, write: Write, tmp_path: Path, tiny_folder: Path
) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "empty")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"empty has no \*\.safetensors weights"):
        run(write("pairs.jsonl", pairs(6)), model=copy)
    assert not (tmp_path / "out").exists()


def test_configuration_refuses_contradictions_and_reads_itself_back(tmp_path: Path) -> None:
    required = ["--model=m", "--data=d", "--out=o"]
    with pytest.raises(ConfigError, match="exclude each other"):
        load_config(
            RewardModelConfig, [*required, "--evaluation_data=e", "--evaluation_fraction=0.1"]
        )
    with pytest.raises(ConfigError, match="label_smoothing"):
        load_config(RewardModelConfig, [*required, "--label_smoothing=0.5"])
    held_out = load_config(RewardModelConfig, [*required, "--evaluation_data=e"])
    assert held_out.held_out_fraction == 0
    assert load_config(RewardModelConfig, required).held_out_fraction == 0.05
    (tmp_path / "config.json").write_text(held_out.model_dump_json())
    assert load_config(RewardModelConfig, [str(tmp_path / "config.json")]) == held_out


def test_new_pad_token_gets_an_embedding(
    run: Any, write: Write, tmp_path: Path, tiny_folder: Path
) -> None:
    """A tokenizer without a pad token is refused with the remedy, which then works."""
    copy = shutil.copytree(tiny_folder, tmp_path / "without-pad")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    data = write("pairs.jsonl", pairs(8))
    with pytest.raises(UserError, match="no pad token; name one with --pad_token"):
        run(data, model=copy)
    run(data, model=copy, pad_token="<|fill|>")
    model = load_sequence_classifier(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.pad_token == "<|fill|>"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().num_embeddings > tokenizer.pad_token_id


def test_a_second_epoch_goes_on_from_the_first(run: Any, write: Write, tmp_path: Path) -> None:
    report = run(write("pairs.jsonl", pairs(16)), epochs=2, batch_size=4, evaluation_fraction=0)
    losses = [row["loss"] for row in metrics_of(tmp_path / "out")]
    assert report.steps == len(losses) == 8
    assert np.mean(losses[4:]) < np.mean(losses[:4])
