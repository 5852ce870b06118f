"""The three services as objects in this process: same checks, same batches, same bits, no gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kleash.policy.config import PolicyConfig
from kleash.policy.local import LocalPolicy, LocalWeights
from kleash.ppo.services import Services
from kleash.reference.config import ReferenceConfig
from kleash.reference.local import LocalReference
from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward
from kleash.up.config import UpConfig


@contextlib.contextmanager
def local_services(config: UpConfig) -> Iterator[Services]:
    """Load the models of ``config`` and close them at the end."""
    policy_config, reward_config, reference_config = (
        config.section(name) for name in ("policy", "reward", "reference")
    )
    assert isinstance(policy_config, PolicyConfig)
    assert isinstance(reward_config, RewardConfig)
    assert isinstance(reference_config, ReferenceConfig)
    with contextlib.closing(LocalPolicy.load(policy_config)) as policy:
        yield Services(
            policies={0: policy},
            weights={0: LocalWeights(policy.engine)},
            reward=LocalReward.load(reward_config),
            reference=LocalReference.load(reference_config),
        )
