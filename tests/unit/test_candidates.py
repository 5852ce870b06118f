"""Candidates: K responses per prompt, written as JSON Lines that rankings are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kleash.base.config import load_config
from kleash.base.errors import ConfigError, DataError, ModelError, UserError
from kleash.base.progress import NullProgress
from kleash.data.chat import render_prompt
from kleash.data.comparisons import load_comparisons
from kleash.lm.decode import DecodeRequest
from kleash.lm.generate import generate
from kleash.lm.load import load_causal_lm, load_tokenizer
from kleash.reward_model.candidates import CandidatesConfig, CandidatesReport, run

pytestmark = pytest.mark.unit

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "the quick", "id": "fox", "answer": {"sum": 7}},
    {"prompt": [{"role": "user", "content": "What is 3 plus 4?"}], "kind": "sum"},
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return str(path)


def sample(
    model: Path, data: str, out: Path, **settings: Any
) -> tuple[CandidatesReport, list[dict[str, Any]]]:
    settings = {"max_new_tokens": 8, "num_responses": 5, "seed": 3, **settings}
    report = run(CandidatesConfig(model=model, data=data, out=out, **settings), NullProgress())
    return report, [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_lines_hold_prompt_fields_and_responses(
    tiny_folder: Path, data: str, tmp_path: Path
) -> None:
    report, lines = sample(tiny_folder, data, tmp_path / "out.jsonl", keep_token_ids=True)
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in PROMPTS]
    assert [line["id"] for line in lines] == ["fox", "2"]
    assert (lines[0]["answer"], lines[1]["kind"]) == ({"sum": 7}, "sum")
    assert (report.prompts, report.responses, report.prompts_left_out) == (2, 10, 0)

    # The same tokens as the decoder draws for (seed, prompt id, sample index).
    tokenizer, model = load_tokenizer(tiny_folder), load_causal_lm(tiny_folder)
    requests = [
        DecodeRequest(
            prompt=render_prompt(tokenizer, row["prompt"]), prompt_id=line["id"],
            sample_index=index, seed=3, max_new_tokens=8,
            stop_ids=frozenset({tokenizer.eos_token_id}),
        )
        for row, line in zip(PROMPTS, lines, strict=True)
        for index in range(5)
    ]  # fmt: skip
    expected = [decoded.ids.tolist() for decoded in generate(model, requests)]
    assert [ids for line in lines for ids in line["response_token_ids"]] == expected
    assert report.tokens == sum(map(len, expected))
    special = tokenizer.all_special_ids
    for line in lines:
        for text, ids in zip(line["responses"], line["response_token_ids"], strict=True):
            assert text == tokenizer.decode([id_ for id_ in ids if id_ not in special])
        assert line["finish_reasons"] == ["length"] * 5


def test_result_depends_on_the_seed_and_not_on_the_slots(
    tiny_folder: Path, data: str, tmp_path: Path
) -> None:
    _, first = sample(tiny_folder, data, tmp_path / "a")
    _, again = sample(tiny_folder, data, tmp_path / "b", max_slots=1)
    _, other = sample(tiny_folder, data, tmp_path / "c", seed=4)
    assert first == again != other
    assert "response_token_ids" not in first[0]


def test_labelled_candidates_are_rankings(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    _, lines = sample(tiny_folder, data, tmp_path / "out.jsonl", num_responses=3)
    ranked = [line | {"ranks": list(range(1, len(line["responses"]) + 1))} for line in lines]
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ranked))
    rankings = load_comparisons(str(path), load_tokenizer(tiny_folder), max_tokens=99)
    assert [len(ranking.pairs) for ranking in rankings] == [3, 3]


def stopping_folder(tiny_folder: Path, folder: Path) -> Path:
    """A model that ends its response at once about half of the time, else says one token first."""
    import torch

    model, tokenizer = load_causal_lm(tiny_folder), load_tokenizer(tiny_folder)
    favourites = [tokenizer.eos_token_id, tokenizer.encode("x")[0]]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # Logits are the embeddings times one constant direction, far larger for the favourites.
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.embed_tokens.weight[favourites] = 2.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_empty_and_repeated_responses_are_left_out(
    tiny_folder: Path, data: str, tmp_path: Path
) -> None:
    folder = stopping_folder(tiny_folder, tmp_path / "stopping")
    settings = {"max_new_tokens": 3, "num_responses": 16}
    report, lines = sample(folder, data, tmp_path / "distinct", **settings)
    assert report.responses_empty > 4
    assert report.responses_duplicate > 0
    total = report.responses + report.responses_empty + report.responses_duplicate
    assert total == 16 * 2
    for line in lines:
        assert set(line["responses"]) <= {"x", "xx", "xxx"}
        assert len(set(line["responses"])) == len(line["responses"]) >= 2
        for text, reason in zip(line["responses"], line["finish_reasons"], strict=True):
            assert reason == ("length" if text == "xxx" else "stop")
    kept, _ = sample(folder, data, tmp_path / "all", drop_duplicates=False, **settings)
    assert kept.responses == 32 - report.responses_empty
    assert kept.responses_duplicate == 0


def test_nothing_to_compare_is_an_error(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    folder = stopping_folder(tiny_folder, tmp_path / "stopping")
    with pytest.raises(DataError, match="no prompt got enough different responses"):
        sample(folder, data, tmp_path / "out", max_new_tokens=1, num_responses=8)
    assert not list(tmp_path.glob("*out*"))


def test_one_greedy_response_is_allowed(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.jsonl"
    report, lines = sample(tiny_folder, data, out, temperature=0, num_responses=1)
    assert {len(line["responses"]) for line in lines} == {1}
    assert len(lines) == 2 - report.responses_empty
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_refused(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    def refused(error: type[UserError], message: str, **settings: Any) -> None:
        with pytest.raises(error, match=message):
            sample(tiny_folder, settings.pop("data", data), tmp_path / "refused", **settings)
        assert not list(tmp_path.glob("*refused*"))

    refused(ConfigError, "max_new_tokens is 256, but the model", max_new_tokens=256)
    refused(DataError, r"prompts.jsonl:2: field 'prompt': .* more than the 6", max_new_tokens=250)
    refused(DataError, "no such file", data="no.jsonl")
    (tmp_path / "out").write_text("kept")
    with pytest.raises(ModelError, match="out exists already"):
        sample(tiny_folder, data, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "kept"
    with pytest.raises(ConfigError, match="temperature 0 gives the same response each time"):
        load_config(CandidatesConfig, ["--model=m", "--data=d", "--out=o", "--temperature=0"])


def test_tokens_that_the_model_does_not_know(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    load_causal_lm(tiny_folder).save_pretrained(folder)
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    data = tmp_path / "extra.jsonl"
    data.write_text('{"prompt": "the <extra> fox"}\n')
    with pytest.raises(ModelError, match=r"prompt '1' has the token id 320, but .* knows 320"):
        sample(folder, str(data), tmp_path / "out")


def test_skipped_prompts_are_counted(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    with Path(data).open("a") as file:
        file.write('{"prompt": ""}\n')
    report, _ = sample(tiny_folder, data, tmp_path / "out", skip_bad=True)
    assert (report.prompts, report.prompts_skipped) == (2, 1)
