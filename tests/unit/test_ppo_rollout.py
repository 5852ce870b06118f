"""Collecting rollouts: order, replicas, failures, and answers that cannot be trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kleash.client.types import GeneratedSequence, Prompt, Sampling
from kleash.lm.load import load_causal_lm
from kleash.policy.local import LocalPolicy
from kleash.ppo.calibration import RewardState
from kleash.ppo.pinning import RewardModelError
from kleash.ppo.publish import Publisher
from kleash.ppo.rollout import RolloutError, Sample
from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward
from kleash.rpc.errors import Unavailable
from kleash.weights.store import Store

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit

EXACT = 1e-5
"""Same numbers from the same weights in batches of another shape: rounding of float32."""


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
        replace(services, policies={0: policy}),
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
    store = Store(tmp_path / "weights")
    Publisher(services.weights, store, run_id="another-run", fence=1).publish(
        load_causal_lm(world.model), 5
    )
    store.close()
    with pytest.raises(RolloutError, match=r"version \[5\], and the trainer is at 0"):
        world.rollout(config, services)


@dataclass(frozen=True)
class Broken:
    """A service of which one method is replaced."""

    service: Any
    method: str
    replacement: Callable[..., Any]

    def pinned(self, revision: str) -> Broken:
        return Broken(self.service.pinned(revision), self.method, self.replacement)

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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reward": RewardState("sha256:old")}, "the reward service serves .* sha256:old, with"),
        ({"reference_revision": "sha256:old"}, "the reference service serves .* sha256:old; serve"),
    ],
)
def test_a_frozen_model_that_was_replaced_is_refused(
    world: World, samples: list[Sample], tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    collector = replace(world.collector(world.services(), world.config(tmp_path)), **changes)
    prompts = [sample.record for sample in samples]
    with pytest.raises((RewardModelError, RolloutError), match=sentence):
        collector.collect(prompts, seed=7, weights_version=0)


@pytest.mark.parametrize("name", ["policy", "reward", "reference"])
def test_a_service_that_stays_away_is_waited_for_and_then_named(
    world: World, samples: list[Sample], tmp_path: Path, name: str
) -> None:
    """Its own error ends the run; without a limit this would wait for ever."""

    def away(*_: Any, **__: Any) -> Any:
        raise Unavailable(f"the {name} is gone.")

    services = world.services()
    gone: dict[str, Any] = {
        "policy": {"policies": {0: Broken(services.policies[0], "generate", away)}},
        "reward": {"reward": Broken(services.reward, "score_tokens", away)},
        "reference": {"reference": Broken(services.reference, "log_probs", away)},
    }
    config = world.config(tmp_path, services={"wait_s": 0.5})
    collector = world.collector(replace(services, **gone[name]), config)
    began = time.monotonic()
    with pytest.raises(Unavailable, match=f"the {name} is gone"):
        collector.collect([sample.record for sample in samples], seed=7, weights_version=0)
    assert 0.1 < time.monotonic() - began < 10
