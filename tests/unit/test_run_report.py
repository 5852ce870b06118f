"""kleash report: what is on the page, for runs with and without evaluations, samples and steps."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tests.run_folders import write_run

from kleash.cli.main import main
from kleash.evaluate.report_figures import CHAPTERS, COMPARED, judge_figure
from kleash.evaluate.report_samples import choose_samples
from kleash.evaluate.run_data import read_run, read_runs

pytestmark = pytest.mark.unit

LONG = 2000
FIGURES = ("score_mean", "reward_mean", "kl_per_sequence", "entropy", "response_length_mean",
           "stop_fraction", "approx_kl", "clip_fraction", "explained_variance", "value_loss",
           "step_s", "time_generate_s", "publish_bytes")  # fmt: skip


def report(*runs: Path, **flags: Any) -> str:
    out = runs[0].parent / "page.html"
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    assert main(["report", *map(str, runs), f"--out={out}", *arguments]) == 0
    return out.read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_two_groups_with_bands(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / f"beta-{beta}-seed-{seed}",
            {"score_mean": [0.0, 0.1 * seed, 0.5 + 0.1 * seed], "kl_per_sequence": [0, 1, 4]},
            evaluations={"evaluation/score_mean": [0.1], "evaluation/judge": [0.3]},
            num_samples=2,
            seed=seed,
            kl={"coefficient": beta},
        )
        for beta in (0.1, 0.02)
        for seed in (0, 1, 2)
    ]
    page = report(*runs, title="Leashes")
    assert "<h1>Leashes</h1>" in page
    assert "6 runs in 2 groups" in page
    # Final scores 0.5, 0.6 and 0.7: mean 0.6, deviation 0.1.
    assert "0.6 ± 0.1" in page
    assert "0.5 to 0.7, n = 3" in page
    chart = data_of(page)["charts"]["score_mean"]
    assert [line["label"] for line in chart["lines"]] == [
        "kl.coefficient=0.1",
        "kl.coefficient=0.02",
    ]
    assert chart["lines"][0]["points"][-1][2:] == ["3", "0.6", "0.5 to 0.7"]
    assert page.count('class="band c0"') >= 1


def test_one_step_without_evaluations_samples_and_origin(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {"score_mean": [0.5]}, is_complete=False)
    (path / "environment.json").unlink()
    (path / "config.json").unlink()
    page = report(path)
    assert "No samples were kept in this run" in page
    assert "No judge figures in this run" in page
    assert "Not recorded in this run." in page
    assert "ended before its last step" in page


def test_an_evaluation_before_the_first_step(tmp_path: Path) -> None:
    page = report(
        write_run(tmp_path / "run", {}, evaluations={"evaluation/score_mean": [0.5]}, every=5)
    )
    assert "No step is complete yet." in page
    assert list(data_of(page)["charts"]) == ["evaluation-score_mean"]


def test_figures_that_are_not_finite_do_not_break_it(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", {"score_mean": [math.nan, 0.5, math.inf]}))
    assert len(data_of(page)["charts"]["score_mean"]["lines"][0]["points"]) == 1


def test_nothing_is_loaded_and_nothing_else_may_run(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", {"score_mean": [0.5, 1.0]}, num_samples=1))
    assert not re.search(r"(src|href)=[\"'](?!#)", page)
    assert "url(" not in page
    assert "@import" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert "default-src &#39;none&#39;" in policy[1]
    assert "unsafe" not in policy[1]
    assert not re.search(r'\sstyle="|\son\w+="', page)


def test_texts_of_models_cannot_become_markup(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {"score_mean": [0.5]}, num_samples=1, run_id="<i>x</i>")
    text = (path / "samples.jsonl").read_text().replace("cannot", "</script><script>alert(1)")
    (path / "samples.jsonl").write_text(text)
    page = report(path, title="<b>bold</b>")
    assert page.count("</script>") == 2
    assert "<b>bold</b>" not in page
    assert "</script><script>alert(1)" in data_of(page)["samples"]["rows"][0]["tokens"][1]


def test_a_long_run_of_three_seeds_stays_below_two_megabytes(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / f"seed-{seed}",
            {name: [seed + step**0.5 for step in range(LONG)] for name in FIGURES},
            evaluations={"evaluation/score_mean": [float(step) for step in range(LONG // 10)]},
            every=10,
            num_samples=4,
            seed=seed,
        )
        for seed in range(3)
    ]
    page = report(*runs)
    assert len(page.encode()) < 2e6
    assert len(data_of(page)["charts"]["score_mean"]["lines"][0]["points"]) <= 300
    assert "one point for 7 steps" in page


def test_samples_are_spread_over_the_run_and_not_chosen(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {"score_mean": [0.0] * 11}, num_samples=3)
    chosen = choose_samples([read_run(path)], 12)
    assert [row["step"] for row in chosen["rows"]] == [1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11]
    assert {row["prompt_id"] for row in chosen["rows"]} == {"1", "2"}
    assert chosen["num_kept"] == 33
    assert choose_samples([read_run(path)], 0)["rows"] == []


def test_tokens_of_older_runs_have_their_numbers(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {"score_mean": [0.0]}, num_samples=1)
    row = json.loads((path / "samples.jsonl").read_text())
    del row["response_tokens"]
    (path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (shown,) = choose_samples(read_runs([path]), 1)["rows"]
    assert shown["tokens"][:2] == ["⟨0⟩", "⟨1⟩"]


def test_the_page_of_one_run_lies_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run", {"score_mean": [0.5]})
    assert main(["report", str(path)]) == 0
    assert (path / "run-report.html").exists()
    assert f"report: {path}/run-report.html, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: RUN"),
        (["nowhere"], "is no folder"),
        (["nowhere", "--samples=-1"], "--samples=-1 is not between 0 and 1000"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error


def test_every_figure_is_one_of_a_run(tmp_path: Path) -> None:
    drawn = [figure for chapter in CHAPTERS for figure in chapter.figures]
    assert all(figure.defined.name == figure.key for figure in (*drawn, *COMPARED))
    assert judge_figure("evaluation/judge/total").unit == judge_figure("evaluation/judge").unit
    page = report(write_run(tmp_path / "run", {"kl_per_sequence": [0.0, 1.0]}))
    assert "<code>kl.controller=adaptive</code>" in page, "what to do when it looks wrong"
