"""`kleash sft` on a user's own model and data: three architectures, messages and text.

What comes out is used the way anybody would use it: with transformers alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kleash.base.progress import NullProgress
from kleash.data.chat import render_prompt
from kleash.lm.decode import DecodeRequest
from kleash.lm.generate import generate
from kleash.lm.tiny import Kind
from kleash.sft.config import SFTConfig
from kleash.sft.train import SFTReport, train

pytestmark = pytest.mark.e2e

KINDS: tuple[Kind, ...] = ("llama", "qwen2", "gpt2")


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def sums() -> list[dict[str, Any]]:
    """Sums as conversations and as text, in one file."""
    rows: list[dict[str, Any]] = []
    for a in range(1, 7):
        for b in range(1, 5):
            rows.append(chat(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."))
            rows.append({"prompt": f"{a} + {b} =", "completion": f" {a + b}"})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sft(model: Path, data: Path, out: Path, *, epochs: int) -> SFTReport:
    config = SFTConfig(
        model=model, data=str(data), out=out, epochs=epochs, learning_rate=0.01, schedule="constant"
    )
    return train(config, NullProgress())


def kleash_sft(model: Path, data: Path, out: Path, **settings: Any) -> Any:
    """The command, in a process of its own."""
    flags = {"model": model, "data": data, "out": out, "num_threads": 1, **settings}
    command = [sys.executable, "-m", "kleash.cli", "sft"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_and_the_folder_is_a_plain_checkpoint(
    tiny_folders: dict[Kind, Path], tmp_path: Path, kind: Kind
) -> None:
    data, out = write(tmp_path / "sums.jsonl", sums()), tmp_path / "sft"
    settings = {"learning_rate": 0.01, "epochs": 16, "batch_size": 8, "evaluation_fraction": 0.1}
    done = kleash_sft(tiny_folders[kind], data, out, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"sft: done, {out}\n")

    report = json.loads((out / "report.json").read_text())
    assert report["loss_last"] < 1.5 < 3.0 < report["loss_first"]
    assert report["evaluation_loss"] < report["evaluation_loss_first"] - 2
    assert (report["samples"], report["samples_held_out"]) == (43, 5)

    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert type(model) is type(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_folders[kind])
    )
    assert tokenizer.chat_template
    # The loss that transformers computes from labels has fallen with ours.
    ids = torch.tensor([tokenizer("3 + 4 = 7").input_ids])
    labels = ids.clone()
    labels[:, : len(tokenizer("3 + 4 =").input_ids)] = -100
    with torch.no_grad():
        assert model(ids, labels=labels).loss.item() < 2.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_demonstration_is_memorised(
    tiny_folders: dict[Kind, Path], tmp_path: Path, kind: Kind
) -> None:
    """Rendering, labels, shift, end token and decoding all have to agree for this."""
    question, answer = "Who jumps over the lazy dog?", "The quick brown fox, naïvely."
    out = tmp_path / "sft"
    data = write(tmp_path / "one.jsonl", [chat(question, answer)])
    assert sft(tiny_folders[kind], data, out, epochs=80).loss_last < 0.05

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    generated = model.generate(**prompt, max_new_tokens=100, do_sample=False)[0]
    response = generated[prompt["input_ids"].shape[1] :]
    assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(response, skip_special_tokens=True) == answer

    # The engine of the policy service says the same, from the ids that PPO would send.
    ids = render_prompt(tokenizer, [{"role": "user", "content": question}])
    assert ids.tolist() == prompt["input_ids"][0].tolist()
    request = DecodeRequest(
        prompt=ids, prompt_id="1", sample_index=0, seed=0, max_new_tokens=100, temperature=0,
        stop_ids=frozenset({tokenizer.eos_token_id}),
    )  # fmt: skip
    (decoded,) = generate(model, [request])
    assert (decoded.finish_reason, decoded.ids.tolist()) == ("stop", response.tolist())


def test_text_is_learned_verbatim(tiny_folder: Path, tmp_path: Path) -> None:
    """A text prompt gets no template and no extra space."""
    out = tmp_path / "sft"
    data = write(tmp_path / "one.jsonl", [{"prompt": "the quick", "completion": " brown fox"}])
    sft(tiny_folder, data, out, epochs=60)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("the quick", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=50, do_sample=False)[0]
    assert tokenizer.decode(generated) == "the quick brown fox<|end|>"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "bad.jsonl:2: field 'completion': is missing; the record has 'prompt'."),
        ({"epoch": 3}, "unknown key 'epoch'; did you mean 'epochs'?"),
        ({"model": "nowhere"}, "model folder nowhere does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    tiny_folder: Path, tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    data = write(tmp_path / "bad.jsonl", [{"prompt": "x", "completion": "y"}, {"prompt": "x"}])
    done = kleash_sft(settings.pop("model", tiny_folder), data, tmp_path / "sft", **settings)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
