"""Publishing weights over real gRPC: what the trainer sends is what the policy generates with."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kleash.client.policy import PolicyClient
from kleash.client.types import GeneratedSequence, Prompt, Sampling
from kleash.client.weights import WeightsClient, WeightsStoreClient
from kleash.lm.decode import DecodeRequest
from kleash.lm.digest import canonical_tensors, model_digest
from kleash.lm.generate import generate
from kleash.lm.load import load_causal_lm
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sequences import TokenSequence, pack
from kleash.lm.tiny import Kind
from kleash.policy.config import PolicyConfig, PolicyLimits
from kleash.policy.service import PolicyService
from kleash.ppo.config import PublishConfig
from kleash.ppo.publish import Canary, Publisher
from kleash.rpc.errors import (
    InternalError,
    InvalidRequest,
    PermissionDenied,
    PreconditionFailed,
    ServiceError,
)
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.weights.manifest import encoded_bytes
from kleash.weights.store import Store
from kleash.weights.store_service import StoreService
from kleash.weights.v1 import weights_pb2

pytestmark = pytest.mark.services

LIMITS = PolicyLimits(max_item_tokens=256)
WAIT_S = 20.0


class Replica:
    """A policy service and a client of its weights."""

    def __init__(self, service: PolicyService, address: str) -> None:
        self.address = address
        self.engine = service.engine
        self.weights = WeightsClient(address)
        self.policy = PolicyClient(address, checks_health=False)

    @property
    def digest(self) -> str:
        """Of the tensors that the replica computes with."""
        return model_digest(self.engine.frozen.model)

    def is_ready(self) -> bool:
        """Whether health says that it may generate."""
        import grpc

        with grpc.insecure_channel(self.address) as channel:
            request = health_pb2.HealthCheckRequest(service="kleash.policy.v1.PolicyService")
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(request, timeout=WAIT_S)
        return answer.status == health_pb2.HealthCheckResponse.SERVING


@dataclass
class Trainer:
    """A store on a server of its own, and publishers over it."""

    store: Store
    address: str

    def publisher(
        self,
        replicas: list[Replica],
        *,
        fence: int = 1,
        canary: Canary | None = None,
        **config: Any,
    ) -> Publisher:
        return Publisher(
            {index: its.weights for index, its in enumerate(replicas)},
            self.store,
            run_id="run",
            fence=fence,
            config=PublishConfig.model_validate(config),
            store_address=self.address,
            canary=canary,
        )


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    store = Store(tmp_path / "weights")
    with BackgroundServer([StoreService(store)]) as server:
        yield Trainer(store, server.address)
    store.close()


@pytest.fixture
def replica(tiny_folder: Path) -> Iterator[Replica]:
    with started(tiny_folder) as replica:
        yield replica


@contextlib.contextmanager
def started(folder: Path, drain_grace_s: float = 30.0, **settings: Any) -> Iterator[Replica]:
    config = PolicyConfig.model_validate({"model": folder, "limits": LIMITS, **settings})
    service = PolicyService(config)
    with BackgroundServer([service], ServerConfig(drain_grace_s=drain_grace_s)) as server:
        replica = Replica(service, server.address)
        with replica.weights, replica.policy:
            yield replica


@contextlib.contextmanager
def fleet(folder: Path, count: int) -> Iterator[list[Replica]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(started(folder)) for _ in range(count)]


def after_training(folder: Path, seed: int = 0) -> Any:
    """The model of ``folder`` with some elements of every tensor moved."""
    model = load_causal_lm(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            is_moved = torch.rand(parameter.shape, generator=generator) < 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * is_moved, alpha=0.1)
    return model


@pytest.fixture
def trained(tiny_folder: Path) -> Any:
    return after_training(tiny_folder)


def prompts_of(count: int) -> list[Prompt]:
    rng = np.random.default_rng(1)
    return [Prompt(f"p{n}", rng.integers(5, 260, 6).astype(np.int32)) for n in range(count)]


def log_probs_of(model: Any, prompt: Prompt, its: GeneratedSequence) -> np.ndarray:
    whole = TokenSequence(np.append(prompt.ids, its.ids), len(prompt.ids))
    with torch.inference_mode():
        return response_log_probs(model, pack([whole]))[0].numpy()


def wait_until(is_done: Any, what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not is_done():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_policy_generates_with_the_published_weights(
    tiny_folders: dict[Kind, Path], kind: Kind, trainer: Trainer
) -> None:
    first, model = load_causal_lm(tiny_folders[kind]), after_training(tiny_folders[kind])
    prompts, sampling = prompts_of(8), Sampling(seed=4, max_new_tokens=12)
    with started(tiny_folders[kind]) as replica:
        publisher = trainer.publisher([replica])
        assert publisher.publish(first, 1).bytes == 0
        report = publisher.publish(model, 2)
        assert report.digest == model_digest(model) == replica.digest
        assert replica.weights.get_weights(audit=True).digest == report.digest
        assert report.version == replica.policy.get_policy().weights_version == 2
        dense = sum(tensor.nbytes for tensor in canonical_tensors(model).values())
        assert 0 < report.bytes < report.dense_bytes == dense
        assert 0 < report.pause_s < report.seconds
        found = list(replica.policy.generate(prompts, sampling, min_weights_version=2, max_lag=0))
        eos = frozenset([model.config.eos_token_id])
        requests = [
            DecodeRequest(its.ids, its.prompt_id, 0, 4, 12, stop_ids=eos) for its in prompts
        ]
        expected = {its.request.prompt_id: its for its in generate(model, requests)}
        for its in found:
            assert its.ids.tolist() == expected[its.prompt_id].ids.tolist()
            assert np.abs(its.log_probs - expected[its.prompt_id].log_probs).max() < 1e-5
            assert {span.weights_version for span in its.version_spans} == {2}


def test_a_replica_with_other_weights_gets_an_anchor(
    replica: Replica, trained: Any, trainer: Trainer
) -> None:
    """The first version is the trainer's weights as they are; who has them fetches nothing."""
    report = trainer.publisher([replica]).publish(trained, 1)
    assert report.bytes == 0
    assert replica.digest == report.digest == model_digest(trained)
    anchors = [it for it in trainer.store.versions() if not it.base_digest]
    assert [it.encoded_bytes for it in anchors] == [
        replica.engine.weights._before.staged.fetched_bytes  # type: ignore[union-attr]
    ]


def test_all_replicas_commit_together(tiny_folder: Path, trained: Any, trainer: Trainer) -> None:
    with fleet(tiny_folder, 3) as replicas:
        publisher = trainer.publisher(replicas)
        publisher.publish(load_causal_lm(tiny_folder), 1)
        report = publisher.publish(trained, 2)
        assert report.replicas == (0, 1, 2)
        assert {its.digest for its in replicas} == {report.digest}
        assert [event["event"] for event in events(trainer)] == [
            "stored", "deciding", "committed", "stored", "deciding", "committed",
        ]  # fmt: skip


def events(trainer: Trainer) -> list[dict[str, Any]]:
    from kleash.weights.store import read_log

    return read_log(trainer.store.folder)


def test_none_commits_when_one_cannot_prepare(
    tiny_folder: Path, trained: Any, trainer: Trainer
) -> None:
    with fleet(tiny_folder, 2) as replicas:
        publisher = trainer.publisher(replicas)
        first = publisher.publish(load_causal_lm(tiny_folder), 1)
        newer = weights_pb2.VersionKey(run_id="another", fence=9, version=1)
        replicas[1].weights.abort(newer)  # another trainer has taken over this replica
        with pytest.raises(PermissionDenied) as caught:
            publisher.publish(trained, 2)
        assert caught.value.reason == "STALE_FENCE"
        assert [its.digest for its in replicas] == [first.digest] * 2
        assert trainer.store.head is not None
        assert trainer.store.head.version == 1
        assert replicas[0].weights.get_weights().state == weights_pb2.REPLICA_STATE_SERVING


def test_a_quorum_goes_on_without_the_rest(
    tiny_folder: Path, trained: Any, trainer: Trainer
) -> None:
    with fleet(tiny_folder, 2) as replicas:
        publisher = trainer.publisher(replicas, quorum=1)
        publisher.publish(load_causal_lm(tiny_folder), 1)
        replicas[1].weights.abort(weights_pb2.VersionKey(run_id="another", fence=9))
        report = publisher.publish(trained, 2)
        assert report.replicas == (0,)
        assert replicas[0].digest == report.digest != replicas[1].digest


def test_a_failed_commit_is_rolled_back_everywhere(
    tiny_folder: Path, trained: Any, trainer: Trainer
) -> None:
    """A canary that is off on one replica: the version is served by none."""
    ids = np.arange(5, 12, dtype=np.int32)
    sequence = TokenSequence(ids, 1)

    def right(model: Any) -> Any:
        return lambda _: response_log_probs(model, pack([sequence]))[0].detach().numpy()

    with fleet(tiny_folder, 2) as replicas:
        base = load_causal_lm(tiny_folder)
        publisher = trainer.publisher(replicas, canary=Canary(ids, right(base)))
        first = publisher.publish(base, 1)
        head = replicas[1].engine.frozen.model.model.norm
        handle = head.register_forward_hook(lambda _module, _inputs, output: output * 1.5)
        publisher._canary = Canary(ids, right(trained))
        with pytest.raises(InternalError, match="the canary is") as caught:
            publisher.publish(trained, 2)
        assert caught.value.reason == "CANARY_MISMATCH"
        assert [its.digest for its in replicas] == [first.digest] * 2
        assert [its.weights.get_weights().version for its in replicas] == [1, 1]
        handle.remove()
        assert publisher.publish(trained, 2).digest == replicas[0].digest == replicas[1].digest


def test_bfloat16_replicas_serve_the_rounded_bits(
    tiny_folder: Path, trained: Any, trainer: Trainer
) -> None:
    with started(tiny_folder, dtype="bfloat16") as replica:
        publisher = trainer.publisher([replica])
        publisher.publish(load_causal_lm(tiny_folder), 1)
        report = publisher.publish(trained, 2)
        assert report.digest == model_digest(trained.to(torch.bfloat16)) == replica.digest


def test_another_architecture_is_refused(
    replica: Replica, tiny_folders: dict[Kind, Path], trainer: Trainer
) -> None:
    before = replica.digest
    with pytest.raises(PreconditionFailed, match="serve the checkpoint") as caught:
        trainer.publisher([replica]).publish(load_causal_lm(tiny_folders["gpt2"]), 1)
    assert caught.value.reason == "SCHEMA_MISMATCH"
    assert replica.digest == before


def test_an_old_trainer_that_wakes_up_is_refused(
    replica: Replica, trained: Any, tiny_folder: Path, trainer: Trainer
) -> None:
    old = trainer.publisher([replica], fence=1)
    old.publish(load_causal_lm(tiny_folder), 1)
    trainer.publisher([replica], fence=2).publish(trained, 1)
    before = replica.digest
    with pytest.raises(PermissionDenied, match="another trainer has taken over") as caught:
        old.publish(after_training(tiny_folder, 3), 2)
    assert caught.value.reason == "STALE_FENCE"
    assert replica.digest == before


@pytest.mark.parametrize("mode", ["keep", "reprefill", "drain", "abort_partial"])
def test_a_commit_in_the_middle_of_a_generation(
    replica: Replica, trained: Any, tiny_folder: Path, trainer: Trainer, mode: str
) -> None:
    """Spans name the version of every token, and the log-probs are those of that version."""
    prompts = prompts_of(8)
    sampling = Sampling(seed=2, max_new_tokens=120, stop_token_ids=(0,))
    old = load_causal_lm(tiny_folder)
    publisher = trainer.publisher([replica], in_flight=mode)
    publisher.publish(old, 1)
    found: list[GeneratedSequence] = []
    reader = threading.Thread(
        target=lambda: found.extend(replica.policy.generate(prompts, sampling))
    )
    is_half_way, steps = threading.Event(), itertools.count()

    def slow_down(*_: object) -> None:
        time.sleep(0.005)
        if next(steps) == 25:
            is_half_way.set()

    handle = replica.engine.frozen.model.lm_head.register_forward_pre_hook(slow_down)
    reader.start()
    assert is_half_way.wait(WAIT_S)
    report = publisher.publish(trained, 2)
    handle.remove()
    reader.join()
    assert report.pause_s > 0
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    assert len(found) == len(prompts)
    num_mixed = 0
    for its in found:
        spans = its.version_spans
        assert spans[0].start == 0
        assert spans[-1].end == len(its.ids)
        assert all(one.end == next_.start for one, next_ in itertools.pairwise(spans))
        num_mixed += len(spans) == 2
        old_gap = np.abs(its.log_probs - log_probs_of(old, by_id[its.prompt_id], its))
        new_gap = np.abs(its.log_probs - log_probs_of(trained, by_id[its.prompt_id], its))
        for span in spans:
            if span.weights_version == 1:
                assert old_gap[span.start : span.end].max() < 1e-5
            else:  # ppo.md row 35: stale weights would be seen
                assert old_gap[span.start : span.end].max() > 1e-3
                if mode == "reprefill":
                    assert new_gap[span.start : span.end].max() < 1e-5
    ends = {its.finish_reason for its in found}
    assert (num_mixed > 0) == (mode in ("keep", "reprefill"))
    assert ("aborted" in ends) == (mode == "abort_partial")
    unmixed = replica.policy.generate(prompts, sampling, min_weights_version=2)
    assert {its.version_spans[0].weights_version for its in unmixed} == {2}


def test_a_replica_that_joins_catches_up_by_itself(
    tiny_folder: Path, trained: Any, trainer: Trainer
) -> None:
    """Not ready before it has the required version, and never asked by a trainer."""
    with started(tiny_folder) as first:
        publisher = trainer.publisher([first])
        publisher.publish(load_causal_lm(tiny_folder), 1)
        settings: dict[str, Any] = {"weights": {"publisher": trainer.address}}
        with started(tiny_folder, **settings) as late:
            wait_until(late.is_ready, "a replica that serves version 1")
            for version in (2, 3, 4):
                model = after_training(tiny_folder, version)
                report = publisher.publish(model, version)
            wait_until(lambda: late.weights.get_weights().version == 4, "version 4")
            assert late.digest == report.digest == model_digest(model)
            wait_until(late.is_ready, "readiness")
            assert late.weights.get_weights(audit=True).required_version == 4


def test_a_late_joiner_takes_one_squashed_delta(tiny_folder: Path, trainer: Trainer) -> None:
    with started(tiny_folder) as first:
        publisher = trainer.publisher([first])
        publisher.publish(load_causal_lm(tiny_folder), 1)
        for version in (2, 3, 4):
            publisher.publish(after_training(tiny_folder, version), version)
        settings: dict[str, Any] = {"weights": {"publisher": trainer.address}}
        with started(tiny_folder, **settings) as late:
            wait_until(late.is_ready, "a replica that serves version 4")
            assert late.digest == first.digest
            steps = late.engine.weights._before.staged.steps  # type: ignore[union-attr]
            assert [step.manifest.base_version for step in steps] == [1]
            late.weights.get_weights(audit=True)


def test_catching_up_goes_on_after_an_error(
    tiny_folder: Path, trained: Any, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong once, the replica tries again as long as it lives."""
    with started(tiny_folder) as first:
        publisher = trainer.publisher([first])
        settings: dict[str, Any] = {"weights": {"publisher": trainer.address}}
        with started(tiny_folder, **settings) as late:
            prepare, calls = late.engine.weights.prepare, itertools.count()

            def broken(*arguments: Any) -> Any:
                if next(calls) == 0:
                    raise OSError("the disk is on fire")
                return prepare(*arguments)

            monkeypatch.setattr(late.engine.weights, "prepare", broken)
            publisher.publish(trained, 1)
            wait_until(late.is_ready, "a replica that serves version 1")
            assert next(calls) > 1


def test_a_damaged_anchor_is_made_again(tiny_folder: Path, trained: Any, trainer: Trainer) -> None:
    """A bit that flips in the publisher's files blocks nobody."""
    with started(tiny_folder) as first:
        publisher = trainer.publisher([first])
        publisher.publish(trained, 1)
        (anchor,) = (it for it in trainer.store.folder.glob("*.object") if it.stat().st_size)
        data = bytearray(anchor.read_bytes())
        data[len(data) // 2] ^= 1
        anchor.write_bytes(data)
    with started(tiny_folder) as second:
        publisher._coordinator.replicas = {0: second.weights}
        report = publisher.publish(trained, 1)
        assert second.digest == report.digest == model_digest(trained)


def test_who_lost_the_lease_while_it_prepared_commits_nothing(
    tiny_folder: Path, trained: Any, trainer: Trainer
) -> None:
    """A preparation may take minutes, a lease lasts seconds."""
    asked: list[int] = []

    def may_publish() -> None:
        asked.append(len(asked))
        if len(asked) == 4:  # twice for the first version; again before the second is committed
            raise PermissionDenied("another trainer has the lease.", reason="LEASE_LOST")

    with started(tiny_folder) as replica:
        publisher = Publisher(
            {0: replica.weights},
            trainer.store,
            run_id="run",
            fence=1,
            store_address=trainer.address,
            may_publish=may_publish,
        )
        first = publisher.publish(load_causal_lm(tiny_folder), 1)
        with pytest.raises(PermissionDenied, match="has the lease"):
            publisher.publish(trained, 2)
        served = replica.weights.get_weights()
        assert (served.version, served.digest) == (1, first.digest)
        assert trainer.store.head is not None
        assert trainer.store.head.version == 1


def test_peers_serve_peers(tiny_folder: Path, trained: Any, trainer: Trainer) -> None:
    """With one flat replica the second fetches from the first, and the third from it as well."""
    with fleet(tiny_folder, 3) as replicas:
        publisher = trainer.publisher(replicas, flat_replicas=1, peer_fan_out=2)
        publisher.publish(load_causal_lm(tiny_folder), 1)
        fetched: list[bytes] = []
        original = trainer.store.fetch

        def counted(object_id: bytes, offset: int) -> Any:
            fetched.append(object_id)
            return original(object_id, offset)

        trainer.store.fetch = counted  # type: ignore[method-assign]
        report = publisher.publish(trained, 2)
        assert {its.digest for its in replicas} == {report.digest}
        assert len(fetched) == 1
        assert publisher._coordinator.sources(publisher._coordinator.replicas, 2) == [
            replicas[0].address,
            trainer.address,
        ]


def test_a_peer_that_is_gone_is_not_missed(
    tiny_folder: Path, trained: Any, trainer: Trainer
) -> None:
    """The publisher is the second source."""
    with fleet(tiny_folder, 2) as replicas:
        publisher = trainer.publisher(replicas, flat_replicas=1)
        publisher.publish(load_causal_lm(tiny_folder), 1)
        replicas[0].weights.address = "127.0.0.1:1"  # where nobody listens
        report = publisher.publish(trained, 2)
        assert {its.digest for its in replicas} == {report.digest}


def test_a_replica_does_not_plan(replica: Replica, trainer: Trainer) -> None:
    with WeightsStoreClient(replica.address) as store:
        with pytest.raises(PreconditionFailed) as caught:
            store.get_head()
        assert caught.value.reason == "NOT_A_PUBLISHER"
    with WeightsStoreClient(trainer.address) as store:
        assert store.get_head() is None


def test_the_head_is_watched(replica: Replica, trained: Any, trainer: Trainer) -> None:
    with WeightsStoreClient(trainer.address) as store:
        heads = store.watch_head()
        assert next(heads) is None
        publisher = trainer.publisher([replica])
        publisher.publish(trained, 1)
        head = next(heads)
        assert head == trainer.store.head == store.get_head()
        (anchor, version) = sorted(store.list_versions(), key=lambda it: it.key.version)
        assert (anchor.key.version, version.key.version) == (0, 1)
        assert [it.is_committed for it in (anchor, version)] == [False, True]


@pytest.mark.parametrize(
    ("token_ids", "sentence"),
    [(b"123", "has 3 bytes"), (b"1234", "has 4 bytes"), (b"\xff" * 8, "token_ids: ")],
)
def test_a_canary_is_checked(replica: Replica, token_ids: bytes, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        replica.weights.check_canary(token_ids)


def test_an_unknown_mode_is_refused(replica: Replica) -> None:
    with pytest.raises(InvalidRequest, match="in_flight is 9"):
        replica.weights.commit(weights_pb2.VersionKey(), 9)  # type: ignore[arg-type]


def test_manifests_of_the_store_are_those_of_the_objects(
    replica: Replica, trained: Any, tiny_folder: Path, trainer: Trainer
) -> None:
    publisher = trainer.publisher([replica])
    publisher.publish(load_causal_lm(tiny_folder), 1)
    publisher.publish(trained, 2)
    with WeightsStoreClient(trainer.address) as store:
        plan = store.plan_update(
            model_digest(load_causal_lm(tiny_folder)), replica.weights.get_weights().schema_digest
        )
        (manifest,) = plan.manifests
        parts = list(store.fetch(manifest.manifest_hash, 100))
        assert parts[0].offset == 100
        assert 100 + sum(len(part.data) for part in parts) == encoded_bytes(manifest)


def test_a_server_ends_while_it_fetches(tiny_folder: Path, trained: Any, trainer: Trainer) -> None:
    """A publisher that hangs does not keep a stopped replica alive."""
    is_entered, may_end = threading.Event(), threading.Event()

    def hang(object_id: bytes, offset: int) -> Iterator[weights_pb2.FetchResponse]:
        is_entered.set()
        may_end.wait(WAIT_S)
        yield from ()

    outcome: list[Any] = []

    def publish(publisher: Publisher) -> None:
        try:
            publisher.publish(trained, 2)
        except ServiceError as error:
            outcome.append(error)

    with contextlib.ExitStack() as stack:
        stack.callback(may_end.set)
        with started(tiny_folder, drain_grace_s=0.2) as replica:
            stack.enter_context(own := WeightsClient(replica.address))
            replica.weights, its = own, replica.weights
            publisher = trainer.publisher([replica])
            replica.weights = its
            publisher.publish(load_causal_lm(tiny_folder), 1)
            trainer.store.fetch = hang  # type: ignore[method-assign]
            thread = threading.Thread(target=publish, args=(publisher,))
            thread.start()
            assert is_entered.wait(WAIT_S)
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert outcome
