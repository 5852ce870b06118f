"""Faults while weights are published, with real processes.

After each of them: no replica serves weights that differ from a version which was decided to be
committed, no token carries a wrong version, and publishing goes on.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.e2e.conftest import START_S, Cluster, start_process
from tests.e2e.faulty_publisher import PHASES as PUBLISHER_PHASES
from tests.e2e.faulty_publisher import weights_of
from tests.e2e.faulty_replica import PHASES as REPLICA_PHASES
from tests.e2e.warm import WarmProcess

from kleash.client.policy import PolicyClient
from kleash.client.types import Prompt, Sampling
from kleash.client.weights import WeightsClient
from kleash.lm.digest import model_digest
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sequences import TokenSequence, pack
from kleash.ppo.config import PublishConfig
from kleash.ppo.publish import Publisher, PublishReport
from kleash.rpc.errors import (
    Cancelled,
    Overloaded,
    PreconditionFailed,
    ServiceError,
    Unavailable,
)
from kleash.rpc.server import BackgroundServer
from kleash.up.supervisor import free_port
from kleash.weights.fetch import chunk
from kleash.weights.manifest import manifest_hash
from kleash.weights.store import Store, read_log
from kleash.weights.store_service import StoreService
from kleash.weights.v1 import weights_pb2

pytestmark = pytest.mark.e2e

HERE = Path(__file__).parent
fences = count(1)
"""Every publisher of this file is a new trainer: replicas outlive a test."""


@dataclass
class Replica:
    """A policy process on a port of its own."""

    model: Path
    log: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | WarmProcess | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, *arguments: str, fault: tuple[str, int] | None = None, limit: str = "") -> None:
        command = [sys.executable, "-m", "kleash.cli", "serve", "policy"]
        if fault is not None:
            command = [sys.executable, str(HERE / "faulty_replica.py"), fault[0], str(fault[1])]
        command += [
            f"--model={self.model}", f"--server.port={self.port}",
            "--device=cpu", "--num_threads=1", *arguments,
        ]  # fmt: skip
        if limit:
            command = ["bash", "-c", f'{limit}; exec "$@"', "bash", *command]
        self.process = start_process(command, self.log)

    def wait(self) -> None:
        """Until it answers."""
        with WeightsClient(self.address, timeout_s=5) as weights:
            until(lambda: answers(weights.get_weights), f"a policy; {self.log.read_text()}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def until(is_done: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + START_S
    while not is_done():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def answers(ask: Callable[[], Any]) -> bool:
    try:
        ask()
    except ServiceError:
        return False
    return True


@pytest.fixture(scope="module")
def fleet(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    """Two replicas that every test leaves in good order."""
    folder = tmp_path_factory.mktemp("fleet")
    replicas = [Replica(tiny_folder, folder / f"policy-{index}.log") for index in range(2)]
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.wait()
        yield replicas
    finally:
        for replica in replicas:
            replica.stop()


@contextlib.contextmanager
def publishing(
    folder: Path,
    replicas: list[Replica],
    make_store: Callable[[Path], Store] = Store,
    **config: Any,
) -> Iterator[Publisher]:
    """A publisher in this process, of a new trainer."""
    store = make_store(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        server = stack.enter_context(BackgroundServer([StoreService(store)]))
        clients = [stack.enter_context(WeightsClient(its.address)) for its in replicas]
        yield Publisher(
            dict(enumerate(clients)),
            store,
            run_id="run",
            fence=next(fences),
            config=PublishConfig.model_validate(config),
            store_address=server.address,
        )


def publish_until_served(publisher: Publisher, model: Any, version: int) -> PublishReport:
    """As the trainer does: again, while a replica is away."""
    end = time.monotonic() + START_S
    while True:
        try:
            return publisher.publish(model, version)
        except (Unavailable, Cancelled, Overloaded, PreconditionFailed):
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


def check_sound(replicas: list[Replica], store: Path) -> None:
    """Bits, tokens and versions agree, on every replica, with what was decided."""
    decided = {its["digest"] for its in read_log(store) if its["event"] != "stored"}
    prompt = Prompt("p", np.array([7, 8, 9], np.int32))
    for replica in replicas:
        with (
            WeightsClient(replica.address) as weights,
            PolicyClient(replica.address, checks_health=False) as policy,
        ):
            served = weights.get_weights(audit=True)
            model = weights_of(replica.model, served.version or 1)
            assert served.digest == model_digest(model)
            assert served.version in (0, 1) or served.digest in decided
            (its,) = policy.generate([prompt], Sampling(seed=1, max_new_tokens=12))
            assert {span.weights_version for span in its.version_spans} == {served.version}
            whole = TokenSequence(np.append(prompt.ids, its.ids), len(prompt.ids))
            with torch.inference_mode():
                expected = response_log_probs(model, pack([whole]))[0].numpy()
            np.testing.assert_allclose(its.log_probs, expected, atol=1e-5)


def publisher_command(store: Path, replicas: list[Replica], phase: str, versions: int) -> list[str]:
    return [
        sys.executable, str(HERE / "faulty_publisher.py"), str(replicas[0].model), str(store),
        str(next(fences)), phase, str(versions), *(replica.address for replica in replicas),
    ]  # fmt: skip


@pytest.mark.parametrize("phase", PUBLISHER_PHASES)
def test_a_publisher_is_killed(fleet: list[Replica], tmp_path: Path, phase: str) -> None:
    command = publisher_command(tmp_path / "weights", fleet, phase, 2)
    process = start_process(command, tmp_path / "publisher.log")
    assert process.wait(START_S) == -signal.SIGKILL
    check_sound(fleet, tmp_path / "weights")
    with publishing(tmp_path / "weights", fleet) as publisher:  # the trainer that is started again
        for version in (1, 2, 3):
            report = publisher.publish(weights_of(fleet[0].model, version), version)
    assert report.replicas == (0, 1)
    check_sound(fleet, tmp_path / "weights")


@pytest.mark.parametrize("phase", REPLICA_PHASES)
def test_a_replica_is_killed(
    fleet: list[Replica], tiny_folder: Path, tmp_path: Path, phase: str
) -> None:
    """The other one does not serve the version alone; the restarted one gets it too."""
    mortal = Replica(tiny_folder, tmp_path / "policy.log")
    replicas = [fleet[0], mortal]
    try:
        mortal.start(fault=(phase, 2))
        mortal.wait()
        assert mortal.process is not None
        with publishing(tmp_path / "weights", replicas) as publisher:
            publisher.publish(weights_of(tiny_folder, 1), 1)
            with pytest.raises(Unavailable):
                publisher.publish(weights_of(tiny_folder, 2), 2)
            assert mortal.process.wait(START_S) == -signal.SIGKILL
            check_sound([fleet[0]], tmp_path / "weights")
            with WeightsClient(fleet[0].address) as weights:
                assert weights.get_weights().version == 1
            mortal.start()
            report = publish_until_served(publisher, weights_of(tiny_folder, 2), 2)
            assert report.replicas == (0, 1)
            check_sound(replicas, tmp_path / "weights")
    finally:
        mortal.stop()


def test_an_old_trainer_wakes_up(fleet: list[Replica], tmp_path: Path) -> None:
    command = publisher_command(tmp_path / "old", fleet, "pause", 3)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as old:
        assert old.stdout is not None
        assert [old.stdout.readline() for _ in range(3)][2] == "pause\n"
        old.send_signal(signal.SIGSTOP)
        with publishing(tmp_path / "new", fleet) as publisher:
            publisher.publish(weights_of(fleet[0].model, 1), 1)
            report = publisher.publish(weights_of(fleet[0].model, 2), 2)
            old.send_signal(signal.SIGCONT)
            output, _ = old.communicate("go on\n", timeout=START_S)
            assert output == "error STALE_FENCE\n"
            check_sound(fleet, tmp_path / "new")
            for replica in fleet:
                with WeightsClient(replica.address) as weights:
                    assert weights.get_weights().digest == report.digest


def test_a_disk_is_full(fleet: list[Replica], tiny_folder: Path, tmp_path: Path) -> None:
    """Room for no file of more than 32 KiB: the delta fits, all weights do not."""
    small = Replica(tiny_folder, tmp_path / "policy.log")
    try:
        small.start(limit="ulimit -f 32")
        small.wait()
        with publishing(tmp_path / "weights", [small]) as publisher:
            publisher.publish(weights_of(tiny_folder, 1), 1)
            publisher.publish(weights_of(tiny_folder, 2), 2)
            check_sound([small], tmp_path / "weights")
        with publishing(tmp_path / "other", [small]) as publisher:
            with pytest.raises(Overloaded, match="has no room for") as caught:
                publisher.publish(weights_of(tiny_folder, 5), 1)
            assert caught.value.reason == "SPOOL_FULL"
        check_sound([small], tmp_path / "weights")
    finally:
        small.stop()


class FaultyStore(Store):
    """Sends small chunks of an object wrongly, ``num_faults`` times, and then as it should."""

    def __init__(self, folder: Path, fault: str, num_faults: int = 1) -> None:
        super().__init__(folder)
        self._fault, self.num_faults = fault, num_faults

    def fetch(self, object_id: bytes, offset: int) -> Iterator[weights_pb2.FetchResponse]:
        data = b"".join(part.data for part in super().fetch(object_id, offset))
        parts = [chunk(offset + at, data[at : at + 700]) for at in range(0, len(data), 700)]
        if self.num_faults and len(parts) > 3:
            self.num_faults -= 1
            middle = 0 if self._fault == "always" else len(parts) // 2
            if self._fault == "torn":
                yield from parts[:middle]
                raise Unavailable("the stream is torn")
            if self._fault == "duplicate":
                parts.insert(middle, parts[middle - 2])
            elif self._fault == "reordered":
                parts[middle], parts[middle + 1] = parts[middle + 1], parts[middle]
            else:
                damaged = bytearray(parts[middle].data)
                damaged[5] ^= 8
                parts[middle].data = bytes(damaged)
        yield from parts


@pytest.mark.parametrize("fault", ["torn", "duplicate", "reordered", "bit flip"])
def test_a_network_that_errs(fleet: list[Replica], tmp_path: Path, fault: str) -> None:
    """Whatever came in sound is kept, and the rest is asked for again."""
    with publishing(
        tmp_path / "weights", fleet[:1], lambda folder: FaultyStore(folder, fault)
    ) as publisher:
        publisher.publish(weights_of(fleet[0].model, 1), 1)
        report = publisher.publish(weights_of(fleet[0].model, 2), 2)
        assert report.replicas == (0,)
        check_sound(fleet[:1], tmp_path / "weights")


def test_a_network_that_always_errs(fleet: list[Replica], tmp_path: Path) -> None:
    with publishing(
        tmp_path / "weights", fleet[:1], lambda folder: FaultyStore(folder, "always", 0)
    ) as publisher:
        publisher.publish(weights_of(fleet[0].model, 1), 1)
        assert isinstance(publisher.store, FaultyStore)
        publisher.store.num_faults = 999
        with pytest.raises(PreconditionFailed) as caught:
            publisher.publish(weights_of(fleet[0].model, 2), 2)
        assert (caught.value.reason, caught.value.metadata["layer"]) == ("DIGEST_MISMATCH", "chunk")
        check_sound(fleet[:1], tmp_path / "weights")


def test_a_wrong_base_is_refused(fleet: list[Replica], tmp_path: Path) -> None:
    """A change of weights that nobody has: nothing is fetched for it, nothing touched."""
    with publishing(tmp_path / "weights", fleet[:1]) as publisher:
        publisher.publish(weights_of(fleet[0].model, 1), 1)
        pending = publisher._encode(weights_of(fleet[0].model, 2), 2)
        manifest = pending.manifest
        manifest.base_digest = "sha256:" + 64 * "0"
        manifest.manifest_hash = manifest_hash(manifest)
        with pytest.raises(PreconditionFailed) as caught:
            publisher._coordinator.publish(manifest)
        assert caught.value.reason == "NO_PLAN"
        check_sound(fleet[:1], tmp_path / "weights")


def decisions(out: Path) -> list[list[int]]:
    """The replicas of every version that was decided, oldest first."""
    log = read_log(out / "weights")
    return [row["replicas"] for row in log if row["event"] == "deciding"]


def test_a_run_loses_a_replica_and_gets_another(
    cluster: Cluster, tiny_folder: Path, tmp_path: Path
) -> None:
    """With a quorum the run goes on without it; the one that joins comes to the right version."""
    replicas = [Replica(tiny_folder, tmp_path / f"policy-{index}.log") for index in range(2)]
    store = f"127.0.0.1:{free_port()}"
    config = cluster.config(
        tmp_path / "run",
        total_steps=5000,
        services={"policy": [its.address for its in replicas]},
        publish={"quorum": 1, "server": {"port": int(store.rpartition(":")[2])}},
    )
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.wait()
        trainer = cluster.trainer(config)
        trainer.wait_for_steps(2)
        replicas[1].stop()
        lost_at = len(Cluster.steps(config.out))
        trainer.wait_for_steps(lost_at + 2)
        replicas[1].start(f"--weights.publisher={store}")
        with WeightsClient(replicas[1].address, timeout_s=5) as weights:
            until(
                lambda: answers(weights.get_weights) and weights.get_weights().version > lost_at,
                "a replica that has caught up",
            )
        # It catches up by itself before the trainer has found it again.
        trainer.wait_until(lambda: len(decisions(config.out)[-1]) == 2, "publish to both")
        assert trainer.end(signal.SIGTERM) == 128 + signal.SIGTERM, trainer.log.read_text()
        steps = [row["step"] for row in Cluster.steps(config.out)]
        assert steps == list(range(1, len(steps) + 1))
        log = read_log(config.out / "weights")
        decided = [len(each) for each in decisions(config.out)]
        assert (decided[0], decided[-1]) == (2, 2)
        assert 1 in decided
        head = [row for row in log if row["event"] == "committed"][-1]
        assert head["version"] == len(steps) + 1
        for replica in replicas:
            with WeightsClient(replica.address) as weights:
                assert weights.get_weights().version == head["version"]
                assert weights.get_weights(audit=True).digest == head["digest"]
    finally:
        for replica in replicas:
            replica.stop()
