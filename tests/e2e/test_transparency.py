"""X9 of facts/ppo.md: the services are transparent.

The same run in one process and over gRPC, with three services as processes of their own, gives the
same tokens, log-probs within 1e-6, and the same losses, for five steps.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kleash.client.types import GeneratedSequence
from kleash.lm.digest import model_digest
from kleash.lm.load import load_causal_lm
from kleash.policy.config import PolicyConfig
from kleash.policy.local import LocalPolicy, LocalWeights
from kleash.ppo.report import PPOReport
from kleash.ppo.services import Services
from kleash.ppo.train import train
from kleash.reference.config import ReferenceConfig
from kleash.reference.local import LocalReference
from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.e2e


@dataclass
class Recorder:
    """Passes every call on and keeps what came back."""

    services: Services
    generated: dict[tuple[int, str, int], GeneratedSequence] = field(default_factory=dict)
    arrivals: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    reference_log_probs: list[np.ndarray] = field(default_factory=list)

    def recording(self) -> Services:
        return replace(
            self.services,
            policies={0: self},
            reward=_Of(self, self.services.reward, "score_tokens"),
            reference=_Of(self, self.services.reference, "log_probs"),
        )

    def get_policy(self) -> Any:
        return self.services.policies[0].get_policy()

    def generate(
        self, prompts: Sequence[Any], sampling: Any, **options: Any
    ) -> Generator[GeneratedSequence, None, None]:
        for each in self.services.policies[0].generate(prompts, sampling, **options):
            version = each.version_spans[0].weights_version
            self.generated[version, each.prompt_id, each.sample_index] = each
            self.arrivals.append(each.prompt_id)
            yield each

    def keep(self, answers: list[Any]) -> None:
        for answer in answers:
            if isinstance(answer, np.ndarray):
                self.reference_log_probs.append(answer)
            else:
                self.scores.append(answer.score)


@dataclass
class _Of:
    """A scoring service whose answers the recorder keeps."""

    recorder: Recorder
    service: Any
    method: str

    def pinned(self, revision: str) -> _Of:
        return replace(self, service=self.service.pinned(revision))

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.service, name)
        if name != self.method:
            return function

        def call(*arguments: Any, **options: Any) -> Any:
            answers = function(*arguments, **options)
            self.recorder.keep(answers)
            return answers

        return call


@dataclass(frozen=True)
class Run:
    """A run of five steps and what the services said in it."""

    out: Path
    report: PPOReport
    seen: Recorder


@pytest.fixture(scope="module")
def local_run(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    policy = LocalPolicy.load(PolicyConfig(model=cluster.model, device="cpu"))
    services = Services(
        policies={0: policy},
        weights={0: LocalWeights(policy.engine)},
        reward=LocalReward.load(RewardConfig(model=cluster.reward_model, device="cpu")),
        reference=LocalReference.load(ReferenceConfig(model=cluster.model, device="cpu")),
    )
    seen = Recorder(services)
    out = tmp_path_factory.mktemp("local") / "run"
    report = train(cluster.config(out), seen.recording())
    policy.close()
    return Run(out, report, seen)


@pytest.fixture(scope="module")
def remote_run(cluster: Cluster, remote: Services, tmp_path_factory: pytest.TempPathFactory) -> Run:
    seen = Recorder(remote)
    out = tmp_path_factory.mktemp("remote") / "run"
    return Run(out, train(cluster.config(out), seen.recording()), seen)


def test_one_process_and_grpc_give_the_same_run(
    cluster: Cluster, local_run: Run, remote_run: Run
) -> None:
    local, remote = local_run.seen, remote_run.seen
    assert len(remote.generated) == 5 * 16
    assert {version for version, _, _ in remote.generated} == {1, 2, 3, 4, 5}
    assert remote.generated.keys() == local.generated.keys()
    for key, there in remote.generated.items():
        here = local.generated[key]
        np.testing.assert_array_equal(there.ids, here.ids)
        np.testing.assert_allclose(there.log_probs, here.log_probs, rtol=0, atol=1e-6)
        assert there.finish_reason == here.finish_reason
    assert remote.arrivals == local.arrivals
    np.testing.assert_allclose(sorted(remote.scores), sorted(local.scores), rtol=0, atol=1e-6)

    rows = cluster.learned(remote_run.out)
    assert len(rows) == 5
    assert rows == cluster.learned(local_run.out)
    assert len({row["policy_loss"] for row in rows}) == 5
    assert len({row["value_loss"] for row in rows}) == 5
    assert remote_run.report.digests == local_run.report.digests


def test_the_served_weights_are_the_trained_ones(remote_run: Run, remote: Services) -> None:
    """Published over gRPC, saved as a folder, and still in the service: one digest."""
    served = remote.weights[0].get_weights()
    assert served.version == 6
    assert served.digest == model_digest(load_causal_lm(remote_run.out / "policy"))
    assert served.digest != remote_run.report.digests["sft_checkpoint"]
