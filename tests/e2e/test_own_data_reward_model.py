"""``kleash reward-model`` on a user's own folder and data, as a command, then served.

Every data format of docs in one file, for a Llama, a Qwen2 and a GPT-2 folder. The rule to learn:
the response that says "fox" wins.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kleash.lm.load import read_lineage
from kleash.lm.tiny import Kind
from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward

pytestmark = pytest.mark.e2e

WORDS = "the quick brown jumps over lazy dog says hello to world bigger".split()  # noqa: SIM905


def kleash(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kleash.cli", *map(str, arguments), "--num_threads=1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def response(random: np.random.Generator, *, says_fox: bool) -> str:
    words = [str(word) for word in random.choice(WORDS, size=random.integers(2, 6))]
    if says_fox:
        words.insert(int(random.integers(0, len(words) + 1)), "fox")
    return " ".join(words)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def comparison(random: np.random.Generator, index: int) -> dict[str, Any]:
    """One record, in each of the formats in turn."""
    good, bad, worse = (response(random, says_fox=n == 0) for n in range(3))
    question = f"What is {index}?"
    match index % 5:
        case 0:
            return {"prompt": question, "chosen": good, "rejected": bad, "margin": 0.5}
        case 1:
            return {"prompt": [user(question)], "chosen": good, "rejected": [assistant(bad)]}
        case 2:
            return {
                "chosen": [user(question), assistant(good)],
                "rejected": [user(question), assistant(bad)],
                "dimension": "helpful",
                "annotator": 7,
            }
        case 3:
            return {"prompt": question, "responses": [bad, good, worse], "ranks": [2, 1, 2]}
        case _:
            turns = [user("hello"), assistant("the dog says hello"), user(question)]
            return {"prompt": turns, "responses": [worse, bad, good], "ranks": [3, 2, 1]}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_train_and_serve(kind: Kind, tiny_folders: dict[Kind, Path], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data = write(tmp_path / "comparisons.jsonl", [comparison(random, n) for n in range(400)])
    texts = [(f"What is {n}?", response(random, says_fox=n % 2 == 0)) for n in range(80)]
    conversations = [[user(prompt), assistant(answer)] for prompt, answer in texts]
    demonstrations = write(
        tmp_path / "demonstrations.jsonl",
        [{"messages": messages} for messages in conversations[:40]]
        + [{"prompt": prompt, "completion": answer} for prompt, answer in texts[40:]],
    )
    out = tmp_path / "reward-model"
    settings = tmp_path / "reward-model.toml"
    settings.write_text("learning_rate = 3e-3\nbatch_size = 8\nevaluation_fraction = 0.2\n")

    done = kleash(
        "reward-model", settings, f"--model={tiny_folders[kind]}", f"--data={data}",
        f"--reference-data={demonstrations}", f"--out={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    report = json.loads((out / "report.json").read_text())
    assert report["held_out"]["accuracy"] > 0.85
    assert report["held_out"]["accuracy_ci95"][0] > 0.75
    assert report["held_out"]["by_dimension"].keys() == {"helpful"}
    assert report["held_out"]["by_annotator"].keys() == {"7"}
    assert report["num_ties_dropped"] == 80
    assert report["references"]["num_responses"] == 80
    assert report["num_rankings"] + report["held_out"]["num_rankings"] == 400
    assert read_lineage(out)["config"]["learning_rate"] == 3e-3

    # This process has never seen the trained model: what puts the mean at 0 is in the folder.
    reward = LocalReward.load(RewardConfig(model=out, device="cpu"))
    whole_texts = [prompt + answer + "<|end|>" for prompt, answer in texts[40:]]
    results = reward.score_conversations(conversations[:40]) + reward.score_texts(whole_texts)
    scores = [result.score for result in results]
    assert abs(np.mean(scores)) < 0.02
    assert np.std(scores) == pytest.approx(1, abs=0.02)
    with_fox, without_fox = np.array(scores[::2]), np.array(scores[1::2])
    assert (with_fox[:, None] > without_fox).mean() > 0.95
    model = reward.get_model()
    assert model.model.revision == report["digest"]


def bad_line(path: Path) -> Path:
    random = np.random.default_rng(0)
    records = [comparison(random, n) for n in range(6)]
    del records[2]["rejected"]
    return write(path, records)


def test_mistakes_are_one_sentence_and_leave_no_output(tiny_folder: Path, tmp_path: Path) -> None:
    data, out = bad_line(tmp_path / "comparisons.jsonl"), tmp_path / "out"
    arguments = ("reward-model", f"--data={data}", f"--out={out}")

    bad = kleash(*arguments, f"--model={tiny_folder}")
    assert bad.returncode == 2
    assert f"error: {data}:3: field 'rejected'" in bad.stderr
    assert len(bad.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [data.name]

    skipped = kleash(*arguments, f"--model={tiny_folder}", "--skip-bad", "--evaluation_fraction=0")
    assert skipped.returncode == 0, skipped.stderr
    report = json.loads((out / "report.json").read_text())
    assert (report["num_records_skipped"], report["num_rankings"]) == (1, 5)
    again = kleash(*arguments, f"--model={tiny_folder}")
    assert again.returncode == 2
    assert f"{out} exists already" in again.stderr
