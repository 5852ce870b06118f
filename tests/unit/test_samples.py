"""samples.jsonl: responses of a step with their figures and the versions of all models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.test_ppo_resume import stop_after

from kleash.lm.load import load_tokenizer
from kleash.ppo.control import Control
from kleash.ppo.report import PPOReport
from kleash.ppo.train import train

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit


def samples(out: Path) -> list[dict[str, Any]]:
    path = out / "samples.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def digest_after(out: Path, step: int) -> str:
    lineage = out / f"checkpoints/step-{step:06d}/policy/kleash.json"
    return json.loads(lineage.read_text())["digest"]


@pytest.fixture(scope="module")
def out(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PPOReport]:
    """Two steps of which every response is kept; KL is steered, so that beta changes."""
    path = tmp_path_factory.mktemp("samples") / "run"
    config = world.config(
        path,
        samples={"per_step": 12},
        checkpoint={"every": 1},
        kl={"controller": "adaptive", "coefficient": 0.3, "target": 0.01, "horizon": 24},
    )
    return path, train(config, world.services())


def test_figures_are_those_that_were_trained_on(world: World, out: tuple[Path, PPOReport]) -> None:
    """Their means over all responses are the figures of the step in metrics.jsonl."""
    path, _ = out
    coefficients = []
    for row in world.learned(path):
        of_step = [sample for sample in samples(path) if sample["step"] == row["step"]]
        assert len(of_step) == 12

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        assert mean([s["score"] for s in of_step]) == pytest.approx(row["score_mean"], abs=1e-5)
        assert mean([sum(s["kl"]) for s in of_step]) == pytest.approx(
            row["kl_per_sequence"], abs=1e-5
        )
        assert mean([sum(s["rewards"]) for s in of_step]) == pytest.approx(
            row["reward_mean"], abs=1e-5
        )
        assert mean([s["finish_reason"] == "stop" for s in of_step]) == pytest.approx(
            row["stop_fraction"]
        )
        coefficients.append(row["kl_coefficient"])
    assert coefficients[0] != coefficients[1], "the second step has a beta of its own"


def test_texts_tokens_and_lists_belong_together(world: World, out: tuple[Path, PPOReport]) -> None:
    tokenizer = load_tokenizer(world.model)
    for sample in samples(out[0]):
        ids = sample["response_token_ids"]
        assert len(ids) == len(sample["kl"]) == len(sample["rewards"]) == len(sample["log_probs"])
        assert sample["response"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert sample["prompt"] == world.texts[int(sample["prompt_id"]) - 1]
        assert (sample["finish_reason"] == "stop") == (ids[-1] in world.stop_ids)
        assert sample["uncalibrated_score"] == sample["score"]


def test_every_model_is_named(world: World, out: tuple[Path, PPOReport]) -> None:
    path, report = out
    rows = samples(path)
    assert {row["reward_revision"] for row in rows} == {report.digests["reward_model"]}
    reference = world.reference.get_model().model.revision
    assert {row["reference_revision"] for row in rows} == {reference}
    for row in rows:
        assert row["weights_versions"] == [[0, len(row["response_token_ids"]), row["step"]]]
    # Step 1 is drawn with the SFT checkpoint, step 2 with what step 1 made of it.
    assert {row["policy_digest"] for row in rows if row["step"] == 1} == {
        report.digests["sft_checkpoint"]
    }
    assert {row["policy_digest"] for row in rows if row["step"] == 2} == {digest_after(path, 1)}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [1] * 8 + [2] * 8),
        ({"per_step": 3, "every": 2}, [2] * 3),
        ({"per_step": 100}, [1] * 12 + [2] * 12),
    ],
)
def test_as_many_are_kept_as_the_run_wants(
    world: World, tmp_path: Path, settings: dict[str, int], steps: list[int]
) -> None:
    train(world.config(tmp_path / "run", samples=settings), world.services())
    assert [sample["step"] for sample in samples(tmp_path / "run")] == steps


def test_none_are_kept_without_a_number(world: World, tmp_path: Path) -> None:
    train(world.config(tmp_path / "run", samples={"per_step": 0}), world.services())
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_a_resumed_run_writes_each_sample_once(
    world: World, out: tuple[Path, PPOReport], tmp_path: Path
) -> None:
    """A trainer that died left samples beyond its checkpoint, the last one half written."""
    path, control = tmp_path / "run", Control()
    stop_after(control, 1)
    changes: dict[str, Any] = {
        "samples": {"per_step": 12},
        "kl": {"controller": "adaptive", "coefficient": 0.3, "target": 0.01, "horizon": 24},
    }
    train(world.config(path, **changes), world.services(), control=control)
    with (path / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "response": "a line\u2028of two"}\n{"step": 2, "resp')
    train(world.config(path, resume=True, **changes), world.services())
    assert samples(path) == samples(out[0])
