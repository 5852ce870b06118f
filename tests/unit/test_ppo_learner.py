"""The trainer on tiny models in one process: facts/ppo.md section 4, rows 1-3, 8-11, 16-28, 42.

Policy, reward and reference are the services' own engines without gRPC. The model is a random Llama
of two layers; numbers in comments are what the bug of that row would give.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kleash.base.config import load_config
from kleash.base.errors import ConfigError
from kleash.client.types import GeneratedSequence, Prompt, Sampling
from kleash.lm.digest import canonical_tensors, model_digest, tokenizer_sha256
from kleash.lm.heads import ValueModel
from kleash.lm.load import load_causal_lm, load_tokenizer
from kleash.policy.config import PolicyConfig
from kleash.policy.local import LocalPolicy, LocalWeights
from kleash.ppo.config import PPOConfig
from kleash.ppo.learner import Learner
from kleash.ppo.publish import Publisher
from kleash.ppo.report import PPOReport
from kleash.ppo.rollout import RolloutError, Sample
from kleash.ppo.services import Services
from kleash.ppo.train import train
from kleash.reference.config import ReferenceConfig
from kleash.reference.local import LocalReference
from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward
from kleash.rpc.errors import Unavailable

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit

EXACT = 1e-5
"""Same numbers from the same weights in batches of another shape: rounding of float32."""


@pytest.fixture(scope="module")
def samples(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """One rollout of the SFT policy, used by every test of the learner alone."""
    return world.rollout(world.config(tmp_path_factory.mktemp("unused"))).samples


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in canonical_tensors(model).items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# ---------------------------------------------------------------------------------- the rollout


def test_kl_from_the_reference_is_zero_before_the_first_update(
    world: World, tmp_path: Path
) -> None:
    """Rows 3 and 9. Row by row on both sides the numbers are the same bits."""
    config = world.config(tmp_path, micro_batch_tokens=1, services={"group_size": 1})
    rollout = world.rollout(config)
    learner = world.learner(config)
    batch, figures = learner.prepare(rollout.samples)
    assert figures["kl_per_sequence"] == 0.0
    assert torch.equal(batch.old_log_probs, batch.reference_log_probs)

    with torch.no_grad():
        next(iter(learner.policy.parameters())).mul_(1.5)
    _, changed = learner.prepare(rollout.samples)
    assert abs(changed["kl_per_sequence"]) > 0.01


def test_kl_is_zero_up_to_rounding_in_batches(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    _, figures = world.learner(world.config(tmp_path)).prepare(samples)
    assert abs(figures["kl_per_sequence"]) < EXACT


def test_a_reference_at_another_temperature_would_be_seen(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Row 3, the failing control."""
    digest = tokenizer_sha256(load_tokenizer(world.model))
    wrong = world.reference.log_probs(
        [sample.sequence for sample in samples], temperature=1.0, tokenizer_sha256=digest
    )
    changed = [
        replace(sample, reference_log_probs=log_probs)
        for sample, log_probs in zip(samples, wrong, strict=True)
    ]
    _, figures = world.learner(world.config(tmp_path)).prepare(changed)
    assert abs(figures["kl_per_sequence"]) > 0.01


def test_sampler_and_trainer_agree_on_log_probs(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Rows 1, 2 and 34: 1.30 when the slice is off by one, .29 at another temperature."""
    _, figures = world.learner(world.config(tmp_path)).prepare(samples)
    assert figures["behaviour_gap_max"] <= EXACT
    assert figures["importance_effective_fraction"] == pytest.approx(1, abs=EXACT)
    _, wrong = world.learner(world.config(tmp_path, sampling={"temperature": 1.0})).prepare(samples)
    assert wrong["behaviour_gap_max"] > 0.01


def test_rows_come_in_the_order_of_the_prompts_and_repeats_differ(
    world: World, samples: list[Sample]
) -> None:
    ids = [sample.record.prompt_id for sample in samples]
    assert ids == [str(line) for line in (1, 2, 3, 4, 5, 6)] * 2
    for sample in samples:
        np.testing.assert_array_equal(
            sample.sequence.ids[: sample.sequence.response_start], sample.record.ids
        )
    first, second = samples[0].sequence, samples[6].sequence
    assert first.ids.tolist() != second.ids.tolist()


def test_a_response_that_ends_with_a_stop_token_is_stopped(
    world: World, samples: list[Sample]
) -> None:
    """Rows 28 and 29: the rule follows the stop ids of the run, and the stop token is kept."""
    for sample in samples:
        assert sample.is_stopped == (sample.sequence.ids[-1] in world.stop_ids)
        assert sample.is_stopped or sample.sequence.response_length == 12
    assert 0 < sum(sample.is_stopped for sample in samples) < len(samples)


def test_two_replicas_draw_what_one_draws(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    shared = world.rollout(world.config(tmp_path), world.services(num_policies=2)).samples
    assert [s.sequence.ids.tolist() for s in shared] == [s.sequence.ids.tolist() for s in samples]
    assert [s.score for s in shared] == pytest.approx([s.score for s in samples], abs=EXACT)


def test_many_samples_of_one_prompt_are_shared_without_gaps(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    prompts = [samples[0].record] * 7 + [samples[1].record] * 2
    drawn = []
    for num_policies in (1, 2):
        services = world.services(num_policies=num_policies)
        collector = world.collector(services, world.config(tmp_path))
        collected = collector.collect(prompts, seed=7, weights_version=0).samples
        drawn.append([sample.sequence.ids.tolist() for sample in collected])
    assert drawn[0] == drawn[1]


class FailingPolicy:
    """A replica that goes away after three responses, once, and loses its weights."""

    def __init__(self, policy: LocalPolicy) -> None:
        self.policy = policy
        self.calls: list[int] = []

    def get_policy(self) -> Any:
        return self.policy.get_policy()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, **options: Any
    ) -> Generator[GeneratedSequence, None, None]:
        self.calls.append(sum(prompt.num_samples for prompt in prompts))
        stream = self.policy.generate(prompts, sampling, **options)
        for count, generated in enumerate(stream):
            if len(self.calls) == 1 and count == 3:
                raise Unavailable("the replica is gone.")
            yield generated


def test_a_replica_that_fails_is_republished_and_asked_for_the_rest(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    config = world.config(tmp_path)
    services = world.services()
    policy = FailingPolicy(services.policies[0])  # pyright: ignore[reportArgumentType]
    ensured: list[tuple[int, int]] = []
    collector = world.collector(
        replace(services, policies=[policy]),
        config,
        ensure_weights=lambda replica, version: ensured.append((replica, version)),
    )
    prompts = [sample.record for sample in samples]
    again = collector.collect(prompts, seed=7, weights_version=0).samples
    assert policy.calls == [12, 9]
    assert ensured == [(0, 0), (0, 0)]
    assert [s.sequence.ids.tolist() for s in again] == [s.sequence.ids.tolist() for s in samples]


def test_tokens_of_another_version_are_refused(world: World, tmp_path: Path) -> None:
    """Row 35."""
    config = world.config(tmp_path)
    services = world.services()
    Publisher(services.weights, "another-run", 1).publish(load_causal_lm(world.model), 5)
    with pytest.raises(RolloutError, match=r"version \[5\], and the trainer is at 0"):
        world.rollout(config, services)


@dataclass(frozen=True)
class Broken:
    """A service of which one method is replaced."""

    service: Any
    method: str
    replacement: Callable[..., Any]

    def __getattr__(self, name: str) -> Any:
        return self.replacement if name == self.method else getattr(self.service, name)


def test_a_log_prob_that_is_not_finite_is_an_error(world: World, tmp_path: Path) -> None:
    def log_probs(sequences: Sequence[Any], **_: Any) -> list[np.ndarray]:
        return [np.full(s.response_length, np.nan, np.float32) for s in sequences]

    reference: Any = Broken(world.reference, "log_probs", log_probs)
    services = replace(world.services(), reference=reference)
    with pytest.raises(RolloutError, match="not finite"):
        world.rollout(world.config(tmp_path), services)


def test_a_response_that_cannot_be_scored_is_named(world: World, tmp_path: Path) -> None:
    """The reward service takes 20 tokens; one bad item never becomes a number."""
    limits = {"max_item_tokens": 20}
    config = RewardConfig.model_validate({"model": world.reward_model, "limits": limits})
    services = replace(world.services(), reward=LocalReward.load(config))
    with pytest.raises(RolloutError, match=r"prompt '[126]' was not scored \(INPUT_TOO_LONG\)"):
        world.rollout(world.config(tmp_path), services)


def test_a_missing_score_is_an_error(world: World, tmp_path: Path) -> None:
    def score_tokens(sequences: Sequence[Any], **options: Any) -> list[Any]:
        return world.reward.score_tokens(sequences, **options)[:-1]

    reward: Any = Broken(world.reward, "score_tokens", score_tokens)
    with pytest.raises(RolloutError, match=r"4 sequences were sent to be scored, 3 came back"):
        world.rollout(world.config(tmp_path), replace(world.services(), reward=reward))


# ---------------------------------------------------------------------------------- the targets


def test_rewards_sum_to_the_score_minus_the_leash(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Row 11, and the missing-EOS rule tied to the finish reason (row 28)."""
    config = world.config(tmp_path, kl={"coefficient": 0.3}, algorithm={"missing_eos": "subtract"})
    learner = world.learner(config)
    with torch.no_grad():
        learner.policy.get_input_embeddings().weight.mul_(1.2)
    batch, figures = learner.prepare(samples)
    assert figures["kl_per_sequence"] != pytest.approx(0, abs=0.01)
    penalty = np.mean([0.0 if sample.is_stopped else 1.0 for sample in samples])
    scores = np.mean([sample.score for sample in samples])
    expected = scores - penalty - 0.3 * figures["kl_per_sequence"]
    assert figures["reward_mean"] == pytest.approx(expected, abs=1e-5)
    assert 0 < penalty < 1
    assert figures["score_mean"] == pytest.approx(scores, abs=1e-5)
    assert bool((batch.mask.sum(1) == batch.response_lengths).all())


def test_returns_are_raw_advantages_plus_values_and_advantages_are_whitened(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Rows 16, 18 and 25."""
    white, _ = world.learner(world.config(tmp_path)).prepare(samples)
    config = world.config(tmp_path, algorithm={"whiten_advantages": False})
    raw, _ = world.learner(config).prepare(samples)
    assert white.advantages is not None
    assert raw.advantages is not None
    assert raw.returns is not None
    assert white.returns is not None
    torch.testing.assert_close(raw.returns - raw.old_values, raw.advantages)
    assert torch.equal(white.returns, raw.returns)
    inside = white.advantages[white.mask]
    assert float(inside.mean()) == pytest.approx(0, abs=1e-6)
    assert float(inside.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert float(raw.advantages[raw.mask].std(correction=0)) != pytest.approx(1, abs=0.01)
    assert not white.advantages.requires_grad
    assert not white.old_log_probs.requires_grad


# ----------------------------------------------------------------------------------- the update


def test_the_first_minibatch_finds_the_old_policy(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Rows 8 and 10: .29 when old log-probs are taken after an update, .24 with dropout."""
    learner = world.learner(world.config(tmp_path))
    batch, _ = learner.prepare(samples)
    figures = learner.update(batch, step=1)
    assert figures["first_minibatch/log_ratio_max"] <= EXACT
    assert figures["first_minibatch/approx_kl"] <= 1e-9
    assert figures["first_minibatch/clip_fraction"] == 0.0
    # The control: later minibatches do see a changed policy.
    assert figures["log_ratio_max"] > 1e-3
    assert figures["approx_kl"] > 1e-7


def test_one_optimizer_step_for_each_minibatch(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Rows 20 and 21: trl 1.12 makes 10 where 16 are due."""
    learner = world.learner(world.config(tmp_path, algorithm={"epochs": 3, "minibatches": 4}))
    counts = {"policy": 0, "value": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    learner.policy_optimizer.register_step_post_hook(count("policy"))
    learner.value_optimizer.register_step_post_hook(count("value"))
    batch, _ = learner.prepare(samples)
    figures = learner.update(batch, step=1)
    assert counts == {"policy": 12, "value": 12}
    assert figures["optimizer_steps"] == 12


def test_the_split_into_micro_batches_does_not_matter(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Row 19: .188 against .108 when means of micro-batches are averaged."""
    results = []
    for micro_batch_tokens in (1, 60, 100_000):
        config = world.config(
            tmp_path,
            micro_batch_tokens=micro_batch_tokens,
            algorithm={"epochs": 1, "minibatches": 1, "entropy_coefficient": 0.01},
        )
        learner = world.learner(config)
        batch, _ = learner.prepare(samples)
        # Another learner's policy is not the old one: nothing about the loss is trivial.
        with torch.no_grad():
            learner.policy.get_input_embeddings().weight.mul_(1.3)
        figures = learner.update(batch, step=1)
        results.append((figures, weights(learner.policy), weights(learner.value)))
    (figures, policy, value), *others = results
    assert abs(figures["policy_loss"]) > 1e-3
    for other_figures, other_policy, other_value in others:
        for name in ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio_max"):
            assert other_figures[name] == pytest.approx(figures[name], abs=1e-5), name
        for name in ("policy_grad_norm", "value_grad_norm"):
            assert other_figures[name] == pytest.approx(figures[name], rel=1e-4), name
        assert largest_difference(policy, other_policy) < 2e-4
        assert largest_difference(value, other_value) < 2e-4


def test_without_a_learning_rate_the_ratio_stays_one(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Row 22: trl 1.12 logs .4998."""
    learner = world.learner(world.config(tmp_path, policy={"learning_rate": 0}))
    before = weights(learner.policy)
    batch, _ = learner.prepare(samples)
    figures = learner.update(batch, step=1)
    assert figures["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert figures["ratio_max"] == pytest.approx(1, abs=EXACT)
    assert figures["policy_grad_norm"] > 1e-3
    assert largest_difference(before, weights(learner.policy)) == 0.0


def test_the_value_network_and_the_policy_do_not_touch_each_other(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Row 25: with the targets fixed, another value network gives the same policy, bit for bit."""
    results = []
    for scale in (1.0, 3.0):
        learner = world.learner(world.config(tmp_path))
        batch, _ = learner.prepare(samples)
        with torch.no_grad():
            learner.value.head.weight.mul_(scale)
        learner.update(batch, step=1)
        results.append((weights(learner.policy), weights(learner.value)))
    assert largest_difference(results[0][0], results[1][0]) == 0.0
    assert largest_difference(results[0][1], results[1][1]) > 1e-3


def test_importance_weights_matter_only_for_another_sampler(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """X9: one version behind, the weights are not 1; on policy they change nothing."""
    learned = {}
    for is_stale in (False, True):
        for cap in (None, 2.0):
            algorithm = {"epochs": 1, "minibatches": 1, "importance_weight_cap": cap}
            learner = world.learner(world.config(tmp_path, algorithm=algorithm))
            if is_stale:
                with torch.no_grad():
                    learner.policy.get_input_embeddings().weight.mul_(1.3)
            batch, figures = learner.prepare(samples)
            assert (figures["behaviour_gap_max"] > 0.01) == is_stale
            assert (figures["importance_effective_fraction"] < 0.999) == is_stale
            learner.update(batch, step=1)
            learned[is_stale, cap] = weights(learner.policy)
    assert largest_difference(learned[False, None], learned[False, 2.0]) < 1e-4
    assert largest_difference(learned[True, None], learned[True, 2.0]) > 1e-4


def test_value_warm_up_leaves_the_policy_alone(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    learner = world.learner(world.config(tmp_path, value={"warmup_steps": 1}))
    policy, value = weights(learner.policy), weights(learner.value)
    batch, _ = learner.prepare(samples)
    figures = learner.update(batch, step=1)
    assert largest_difference(policy, weights(learner.policy)) == 0.0
    assert largest_difference(value, weights(learner.value)) > 1e-4
    assert figures["learning_rate"] == 0.0
    assert "policy_loss" not in figures
    assert learner.update(batch, step=2)["learning_rate"] == pytest.approx(1e-3)


def test_targets_stay_fixed_over_all_epochs(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Row 24: values clipped around recomputed values."""
    learner = world.learner(world.config(tmp_path, algorithm={"epochs": 3}))
    batch, _ = learner.prepare(samples)
    names = ("old_log_probs", "old_values", "advantages", "returns", "reference_log_probs")
    before = {name: getattr(batch, name).clone() for name in names}
    learner.update(batch, step=1)
    for name in names:
        assert torch.equal(getattr(batch, name), before[name]), name


def test_learning_rates_follow_the_schedule_per_ppo_step(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Row 42: linear to 0 over the run's steps, not over minibatches."""
    config = world.config(tmp_path, total_steps=4, value={"schedule": "constant"})
    learner = world.learner(config)
    batch, _ = learner.prepare(samples)
    figures = [learner.update(batch, step) for step in (1, 2, 3, 4)]
    expected = [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    assert [row["learning_rate"] for row in figures] == pytest.approx(expected)
    assert [row["value_learning_rate"] for row in figures] == pytest.approx([1e-3] * 4)


def test_the_epochs_stop_at_the_target_kl(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    config = world.config(tmp_path, algorithm={"epochs": 5, "target_kl": 1e-9})
    learner = world.learner(config)
    batch, _ = learner.prepare(samples)
    assert learner.update(batch, step=1)["optimizer_steps"] == 2


def test_the_pretraining_mix_adds_its_cross_entropy(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    sequences = [sample.sequence for sample in samples[:3]]
    results = []
    for pretraining in ([], sequences):
        config = world.config(
            tmp_path,
            algorithm={"epochs": 1, "minibatches": 1},
            ptx={"coefficient": 50.0, "batch_size": 3},
        )
        policy = load_causal_lm(world.model)
        value = ValueModel.from_reward_model(world.reward_model)
        learner = Learner(policy, value, config, pretraining)
        batch, _ = learner.prepare(samples)
        results.append((learner.update(batch, step=1), weights(learner.policy)))
    (without, policy_without), (with_mix, policy_with) = results
    assert "pretraining_loss" not in without
    # Log-probs of the behaviour at temperature .7 are not those of the mix, which uses 1.
    assert 3 < with_mix["pretraining_loss"] < 9
    assert with_mix["policy_grad_norm"] > 3 * without["policy_grad_norm"]
    assert with_mix["policy_loss"] == pytest.approx(without["policy_loss"], abs=1e-6)
    assert largest_difference(policy_without, policy_with) > 1e-4


# ------------------------------------------------------------------------------------ whole runs


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
    models = [world.reward._scorer.frozen.model, world.reference._scorer.frozen.model]
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
    services = replace(world.services(), policies=[policy], weights=[LocalWeights(policy.engine)])
    with pytest.raises(ConfigError, match="the policy service has another tokenizer"):
        train(world.config(tmp_path / "run"), services)
    assert not (tmp_path / "run").exists()


def test_a_service_that_takes_shorter_sequences_is_refused(world: World, tmp_path: Path) -> None:
    limits = {"max_item_tokens": 51}
    config = PolicyConfig.model_validate({"model": world.model, "limits": limits})
    policy = LocalPolicy.load(config)
    services = replace(world.services(), policies=[policy], weights=[LocalWeights(policy.engine)])
    sentence = r"takes sequences of 51 tokens, but max_prompt_tokens 40 plus .* 12 is 52"
    with pytest.raises(ConfigError, match=sentence):
        train(world.config(tmp_path / "run"), services)


def test_a_sequence_that_the_model_cannot_hold_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is 262, but the model in .* takes 256 tokens"):
        train(world.config(tmp_path / "run", max_prompt_tokens=250), world.services())


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
