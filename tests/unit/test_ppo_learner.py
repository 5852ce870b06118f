"""Targets and updates on tiny models in one process.

Rows 1-3, 8-11, 16-28 and 42 of facts/ppo.md section 4. Policy, reward and reference are the
services' own engines without gRPC. The model is a random Llama of two layers; numbers in comments
are what the bug of that row would give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kleash.lm.digest import canonical_tensors, tokenizer_sha256
from kleash.lm.heads import ValueModel
from kleash.lm.load import load_causal_lm, load_tokenizer
from kleash.ppo.learner import Learner
from kleash.ppo.rollout import Sample

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit

EXACT = 1e-5
"""Same numbers from the same weights in batches of another shape: rounding of float32."""


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in canonical_tensors(model).items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# ------------------------------------------------------------------------------ the log-probs


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


def test_beta_is_steered_by_nats_per_sequence(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Row 37: nats per token are a dozen times less, and would always ask for a lower beta."""
    changed = [
        replace(sample, reference_log_probs=sample.reference_log_probs - 0.1) for sample in samples
    ]
    nats = np.mean([0.1 * sample.sequence.response_length for sample in samples])
    kl = {"controller": "adaptive", "coefficient": 0.2, "target": nats / 1.1, "horizon": 120}
    learner = world.learner(world.config(tmp_path, kl=kl))
    batch, figures = learner.prepare(changed)
    assert figures["kl_per_sequence"] == pytest.approx(nats, abs=1e-4)
    learner.update(batch, step=1)
    assert learner.kl.coefficient == pytest.approx(0.2 * (1 + 0.1 * 12 / 120), rel=1e-5)


def test_the_entropy_bonus_raises_the_entropy(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    after = []
    for coefficient in (0.0, 10.0):
        algorithm = {"entropy_coefficient": coefficient}
        learner = world.learner(world.config(tmp_path, algorithm=algorithm))
        batch, before = learner.prepare(samples)
        learner.update(batch, step=1)
        after.append(learner.prepare(samples)[1]["entropy"] - before["entropy"])
    assert after[1] > max(after[0], 0) + 1e-3


def test_whitened_rewards_have_unit_spread_and_their_mean(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    """With gamma and lambda 1 the reward of a token is the difference of two returns."""
    rewards = []
    for whiten_rewards in (False, True):
        algorithm = {"whiten_rewards": whiten_rewards, "lam": 1.0}
        batch, _ = world.learner(world.config(tmp_path, algorithm=algorithm)).prepare(samples)
        assert batch.returns is not None
        later = torch.nn.functional.pad(batch.returns[:, 1:], (0, 1))
        rewards.append((batch.returns - later)[batch.mask])
    raw, whitened = rewards
    assert float(raw.std(correction=0)) != pytest.approx(1, abs=0.01)
    assert float(whitened.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert float(whitened.mean()) == pytest.approx(float(raw.mean()), abs=1e-5)


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
