"""Whole runs in one process: what they leave, and what they refuse before anything is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kleash.base.config import load_config
from kleash.base.errors import ConfigError
from kleash.client.types import Prompt, Sampling
from kleash.lm.digest import model_digest
from kleash.lm.load import load_causal_lm, load_tokenizer
from kleash.policy.config import PolicyConfig
from kleash.policy.local import LocalPolicy, LocalWeights
from kleash.ppo.config import PPOConfig
from kleash.ppo.report import PPOReport
from kleash.ppo.services import Policy, Services
from kleash.ppo.train import train
from kleash.reference.config import ReferenceConfig
from kleash.reference.local import LocalReference

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit

EXACT = 1e-5
"""Same numbers from the same weights in batches of another shape: rounding of float32."""


@dataclass(frozen=True)
class Run:
    """A finished run of two steps with seed 0."""

    out: Path
    report: PPOReport
    services: Services
    frozen_before: list[str]
    frozen_after: list[str]


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    services, out = world.services(), tmp_path_factory.mktemp("runs") / "run"
    reward: Any = world.reward.model
    models = [reward.frozen.model, world.reference._scorer.frozen.model]
    before = [model_digest(model) for model in models]
    report = train(world.config(out), services)
    return Run(out, report, services, before, [model_digest(model) for model in models])


def test_a_run_changes_nothing_that_is_frozen(run: Run) -> None:
    """Row 26."""
    assert run.frozen_before == run.frozen_after
    assert run.report.digests["reward_model"] == run.frozen_before[0]
    assert run.report.digests["sft_checkpoint"] == run.frozen_before[1]
    assert run.report.digests["policy"] != run.frozen_before[1]


def test_the_last_policy_is_served_and_saved(run: Run) -> None:
    served = run.services.weights[0].get_weights()
    assert served.digest == run.report.digests["policy"]
    assert served.version == run.report.weights_version == 3
    assert model_digest(load_causal_lm(run.out / "policy")) == run.report.digests["policy"]
    lineage = json.loads((run.out / "policy" / "kleash.json").read_text())
    assert lineage["stage"] == "ppo"
    assert lineage["parent_digest"] == run.report.digests["sft_checkpoint"]
    assert lineage["digest"] == run.report.digests["policy"]
    written = json.loads((run.out / "report.json").read_text())
    assert written["steps"] == 2
    assert written["reward_mean_last"] == run.report.reward_mean_last


def test_evaluation_does_not_change_the_training(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed gives the same run, with or without evaluations in between."""
    code = "def judge(record, response): return float(len(response))"
    (tmp_path / "judge_of_length.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    evaluation = {
        "prompts": str(world.prompts),
        "every": 1,
        "num_prompts": 4,
        "judge": "judge_of_length:judge",
    }
    report = train(world.config(tmp_path / "run", evaluation=evaluation), world.services())
    assert world.learned(tmp_path / "run") == world.learned(run.out)
    files = sorted((tmp_path / "run" / "evaluations").iterdir())
    assert [path.name for path in files] == [f"step-{step:06d}.jsonl" for step in (0, 1, 2)]
    first, last = report.evaluation_first, report.evaluation_last
    assert (first["step"], last["step"]) == (0, 2)
    assert first["evaluation/kl_per_sequence"] == pytest.approx(0, abs=EXACT)
    assert abs(last["evaluation/kl_per_sequence"]) > 1e-4
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(world.texts[:4])
    assert first["evaluation/score_mean"] == pytest.approx(np.mean([row["score"] for row in rows]))
    assert first["evaluation/judge"] == pytest.approx(
        np.mean([len(row["response"]) for row in rows])
    )


class Recording:
    """A policy that notes the seed and the prompts of every call."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.calls: list[tuple[int, list[str]]] = []

    def get_policy(self) -> Any:
        return self.policy.get_policy()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, **options: Any) -> Any:
        ids = [prompt.prompt_id for prompt in prompts for _ in range(prompt.num_samples)]
        self.calls.append((sampling.seed, ids))
        return self.policy.generate(prompts, sampling, **options)


def test_what_each_step_draws_and_publishes(world: World, tmp_path: Path) -> None:
    """Prompts go on where the step before ended; only evaluation repeats its random numbers."""
    services = world.services()
    policy = Recording(services.policies[0])
    config = world.config(
        tmp_path / "run",
        total_steps=3,
        batch_size=4,
        policy={"learning_rate": 0},
        value={"warmup_steps": 1},
        evaluation={"prompts": str(world.prompts), "every": 1, "num_prompts": 2},
    )
    train(config, replace(services, policies={0: policy}))
    evaluations, steps = policy.calls[::2], policy.calls[1::2]
    prompts = [prompt_id for _, batch in steps for prompt_id in batch]
    every_id = ["1", "2", "3", "4", "5", "6"]
    assert sorted(prompts) == sorted(every_id * 2)
    assert len({tuple(sorted(batch)) for _, batch in steps}) > 1
    seeds = [seed for seed, _ in steps]
    assert len({*seeds, evaluations[0][0]}) == 4
    assert evaluations == [evaluations[0]] * 4
    # The first step trains the value network alone: there is nothing to publish after it.
    assert [row["weights_version"] for row in world.learned(tmp_path / "run")] == [1, 2, 3]


def test_another_seed_gives_another_run(world: World, run: Run, tmp_path: Path) -> None:
    train(world.config(tmp_path / "run", seed=4, total_steps=1), world.services())
    other = world.learned(tmp_path / "run")
    assert other[0]["score_mean"] != world.learned(run.out)[0]["score_mean"]


def test_a_reference_that_is_not_the_sft_checkpoint_is_refused(
    world: World, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    from kleash.lm.tiny import build_causal_lm

    other = tmp_path / "other"
    tokenizer = load_tokenizer(world.model)
    build_causal_lm("llama", vocab_size=len(tokenizer), seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    reference = LocalReference.load(ReferenceConfig(model=other))
    services = replace(world.services(), reference=reference)
    with pytest.raises(ConfigError, match="is not the SFT checkpoint"):
        train(world.config(tmp_path / "run"), services)
    assert not (tmp_path / "run").exists()


def test_a_service_with_another_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    from kleash.lm.tiny import write_tiny_folder

    other = write_tiny_folder(tmp_path / "other", "llama", ["entirely different text"])
    policy = LocalPolicy.load(PolicyConfig(model=other))
    services = replace(
        world.services(), policies={0: policy}, weights=[LocalWeights(policy.engine)]
    )
    with pytest.raises(ConfigError, match="the policy service has another tokenizer"):
        train(world.config(tmp_path / "run"), services)
    assert not (tmp_path / "run").exists()


def test_a_service_that_takes_shorter_sequences_is_refused(world: World, tmp_path: Path) -> None:
    limits = {"max_item_tokens": 51}
    config = PolicyConfig.model_validate({"model": world.model, "limits": limits})
    policy = LocalPolicy.load(config)
    services = replace(
        world.services(), policies={0: policy}, weights=[LocalWeights(policy.engine)]
    )
    sentence = r"takes sequences of 51 tokens, but max_prompt_tokens 40 plus .* 12 is 52"
    with pytest.raises(ConfigError, match=sentence):
        train(world.config(tmp_path / "run"), services)


def test_a_sequence_that_the_model_cannot_hold_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is 262, but the model in .* takes 256 tokens"):
        train(world.config(tmp_path / "run", max_prompt_tokens=250), world.services())


@pytest.mark.parametrize("token", [-1, 9999])
def test_a_stop_token_outside_of_the_vocabulary_is_refused(
    world: World, tmp_path: Path, token: int
) -> None:
    config = world.config(tmp_path / "run", sampling={"stop_token_ids": (5, token)})
    with pytest.raises(ConfigError, match=rf"stop_token_ids has {token}, and the model in .* 0 to"):
        train(config, world.services())
    assert not (tmp_path / "run").exists()


def test_a_value_network_from_the_policy_starts_at_zero(world: World, tmp_path: Path) -> None:
    changes = {"reward_model": None, "value": {"init": "policy"}, "total_steps": 1}
    train(world.config(tmp_path / "run", **changes), world.services())
    (row,) = world.learned(tmp_path / "run")
    assert row["value_mean"] == 0.0
    assert row["value_grad_norm"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sampling.top_p=0.9"], "another distribution than the one PPO scores"),
        (["--sampling.top_k=5"], "another distribution than the one PPO scores"),
        (["--batch_size=10", "--algorithm.minibatches=3"], "not a multiple"),
        (["--kl.target=6"], "set controller to adaptive"),
        (["--kl.controller=adaptive"], "needs a target"),
        (["--value.warmup_steps=100"], "leaves none of the 100 total_steps"),
        (["--evaluation.judge=a:b"], "judge has no effect without prompts"),
        (["--value.init=reward_model", "--reward_model=null"], "reward_model is required"),
        (["--sampling.temperature=0"], "greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: list[str], sentence: str) -> None:
    needed = ["--out=o", "--prompts=p", "--model=m", "--reward_model=r"]
    with pytest.raises(ConfigError, match=sentence):
        load_config(PPOConfig, [*needed, *arguments])
