"""Policy replicas that come and go while a run lives, over real gRPC."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.services.test_publish import LIMITS, started
from tests.unit.conftest import World, world  # noqa: F401  (a fixture)

from kleash.base.errors import ConfigError
from kleash.base.progress import NullProgress
from kleash.cluster import fleet as fleet_module
from kleash.cluster import trainer as trainer_module
from kleash.cluster.discovery import by_dns, split_address
from kleash.cluster.fleet import ElasticFleet, Misfit
from kleash.policy.config import PolicyConfig
from kleash.policy.service import PolicyService
from kleash.policy.v1 import policy_pb2
from kleash.ppo.config import ServicesConfig
from kleash.ppo.control import Control
from kleash.ppo.services import Services
from kleash.ppo.train import train
from kleash.rpc.errors import Unavailable
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.rpc.static_tokens import make_token

pytestmark = pytest.mark.services

WAIT_S = 20.0


@dataclass
class Script:
    """A discovery that a test writes: the addresses are what it says they are."""

    addresses: frozenset[str]
    changed: threading.Condition = field(default_factory=threading.Condition)

    def say(self, *addresses: str) -> None:
        with self.changed:
            self.addresses = frozenset(addresses)
            self.changed.notify_all()

    def discover(self, stopping: threading.Event) -> Iterator[frozenset[str]]:
        told: frozenset[str] | None = None
        while not stopping.is_set():
            with self.changed:
                if told == self.addresses:
                    self.changed.wait(0.1)
                told = self.addresses
            yield told


def services_config(**changes: object) -> ServicesConfig:
    keys = {"policy": ["policies:1"], "discovery": "dns", "group_size": 4, "wait_s": 10, **changes}
    return ServicesConfig.model_validate(keys)


@contextlib.contextmanager
def following(
    script: Script, config: ServicesConfig, misfit: Misfit = lambda _: ""
) -> Iterator[ElasticFleet]:
    fleet = ElasticFleet(config, script.discover, misfit)
    fleet.start()
    try:
        yield fleet
    finally:
        fleet.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def test_a_run_goes_on_with_the_replicas_that_are_there(world: World, tmp_path: Path) -> None:  # noqa: F811
    """1 → 2 → 1: the new one serves the right version, and the one that leaves is not missed."""
    config = world.config(
        tmp_path / "run",
        total_steps=6,
        services={"discovery": "dns", "policy": ["policies:1"], "wait_s": 10},
    )
    control = Control()
    with (
        started(world.model) as first,
        started(world.model) as second,
        following(Script(frozenset({first.address})), config.services) as fleet,
    ):
        script = _script_of(fleet)
        fleet.wait_for_one(lambda: False)

        def change() -> None:
            if control.snapshot.step == 2:
                script.say(first.address, second.address)
                until(lambda: len(fleet.members) == 2)
            if control.snapshot.step == 4:
                script.say(second.address)
                until(lambda: len(fleet.members) == 1)

        control.add_listener(change)
        services = Services(fleet.policies, fleet.weights, world.reward, world.reference)
        report = train(config, services, control=control)
        served = second.weights.get_weights()
    assert report.is_complete
    assert [row["publish_replicas"] for row in world.learned(tmp_path / "run")] == [
        1,
        1,
        2,
        2,
        1,
        1,
    ]
    assert (served.version, served.digest) == (report.weights_version, report.digests["policy"])


def test_a_replica_that_dies_is_not_waited_for(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Discovery still names it, as it does a pod whose container starts again."""
    config = world.config(
        tmp_path / "run",
        total_steps=4,
        services={"discovery": "dns", "policy": ["policies:1"], "wait_s": 10},
    )
    control = Control()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(started(world.model))
        dying = contextlib.ExitStack()
        second = dying.enter_context(started(world.model, drain_grace_s=0.1))
        stack.callback(dying.close)
        script = Script(frozenset({first.address, second.address}))
        fleet = stack.enter_context(following(script, config.services))
        until(lambda: len(fleet.members) == 2)

        def kill() -> None:
            if control.snapshot.step == 2:
                dying.close()

        control.add_listener(kill)
        services = Services(fleet.policies, fleet.weights, world.reward, world.reference)
        report = train(config, services, control=control)
        served = first.weights.get_weights()
    assert report.is_complete
    counts = [row["publish_replicas"] for row in world.learned(tmp_path / "run")]
    assert counts == [2, 2, 1, 1]
    assert served.version == report.weights_version


def test_an_only_replica_that_is_replaced_is_not_waited_for(
    world: World,  # noqa: F811
    tmp_path: Path,
) -> None:
    """As by a rolling restart of one replica: no publish is due that would find the new one."""
    config = world.config(
        tmp_path / "run",
        total_steps=4,
        services={"discovery": "dns", "policy": ["policies:1"], "wait_s": 15},
    )
    control = Control()
    with contextlib.ExitStack() as stack:
        leaving = contextlib.ExitStack()
        first = leaving.enter_context(started(world.model, drain_grace_s=0.1))
        stack.callback(leaving.close)
        second = stack.enter_context(started(world.model))
        script = Script(frozenset({first.address}))
        fleet = stack.enter_context(following(script, config.services))
        fleet.wait_for_one(lambda: False)

        def replace() -> None:
            if control.snapshot.step == 2:
                leaving.close()
                script.say(second.address)
                until(lambda: fleet.members == frozenset({1}))

        control.add_listener(replace)
        services = Services(fleet.policies, fleet.weights, world.reward, world.reference)
        report = train(config, services, control=control)
        served = second.weights.get_weights()
    assert report.is_complete
    assert served.version == report.weights_version


def test_an_address_that_is_no_policy_is_left_out(world: World) -> None:  # noqa: F811
    with started(world.model) as replica:
        script = Script(frozenset({replica.address, "127.0.0.1:1"}))
        with following(script, services_config()) as fleet:
            until(lambda: len(fleet.members) == 1)
            time.sleep(1.2)  # another round of probes
            assert [fleet.weights[number].address for number in fleet.weights] == [replica.address]


def test_a_number_is_never_used_again(world: World) -> None:  # noqa: F811
    with started(world.model) as replica:
        script = Script(frozenset({replica.address}))
        with following(script, services_config()) as fleet:
            until(lambda: set(fleet.members) == {0})
            script.say()
            until(lambda: not fleet.members)
            # A call may be under way to the one that left.
            assert fleet.policies[0].get_policy().model.name
            script.say(replica.address)
            until(lambda: set(fleet.members) == {1})


@pytest.mark.parametrize(
    ("addresses", "seen"),
    [((), "found: no address at all"), (("127.0.0.1:1",), "found: 127.0.0.1:1")],
)
def test_without_a_replica_the_error_says_what_was_found(
    addresses: tuple[str, ...], seen: str
) -> None:
    with (
        following(Script(frozenset(addresses)), services_config(wait_s=1.5)) as fleet,
        pytest.raises(Unavailable, match=seen),
    ):
        fleet.wait_for_one(lambda: False)


def test_a_start_that_nobody_wants_any_more_ends_at_once() -> None:
    with (
        following(Script(frozenset()), services_config(wait_s=600)) as fleet,
        pytest.raises(Unavailable),
    ):
        fleet.wait_for_one(lambda: True)


def looked_up(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> frozenset[str]:
    """What DNS discovery makes of these addresses of a name."""
    families = {True: socket.AF_INET6, False: socket.AF_INET}
    rows = [(families[":" in its], socket.SOCK_STREAM, 6, "", (its, 50051)) for its in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: rows)
    return next(iter(by_dns("policies:50051")(threading.Event())))


def test_dns_gives_every_address_of_a_name() -> None:
    found = next(iter(by_dns("dns:///localhost:50051")(threading.Event())))
    assert found == {"127.0.0.1:50051"}


def test_dns_gives_the_addresses_of_one_ip_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pod of a Service with both has two, and nothing says which belong together."""
    both = ("10.0.0.1", "fd00::1", "10.0.0.2", "fd00::2")
    assert looked_up(monkeypatch, *both) == {"10.0.0.1:50051", "10.0.0.2:50051"}
    assert looked_up(monkeypatch, "fd00::1", "fd00::2") == {"[fd00::1]:50051", "[fd00::2]:50051"}


def test_a_name_without_addresses_has_no_replicas_and_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A headless Service whose pods are all away."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert next(iter(by_dns("policies:50051")(threading.Event()))) == frozenset()
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == []


def test_an_unknown_name_has_no_replicas() -> None:
    stopping = threading.Event()
    assert next(iter(by_dns("no-such-name.invalid:50051")(stopping))) == frozenset()


@pytest.mark.parametrize("address", ["policy", "policy:", ":50051", "policy:grpc"])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(address)


STRANGER = "stranger"


def misfit(told: policy_pb2.GetPolicyResponse) -> str:
    """As of a run in whose place a model of that name cannot work."""
    return "has another tokenizer" if told.model.name == STRANGER else ""


def test_a_late_replica_that_does_not_fit_the_run_is_never_used(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fleet_module, "PROBE_S", 0.2)
    with started(world.model) as replica, started(world.model, name=STRANGER) as late:
        script = Script(frozenset({replica.address}))
        with following(script, services_config(), misfit) as fleet:
            fleet.wait_for_one(lambda: False)
            script.say(replica.address, late.address)
            until(lambda: "PolicyReplicaRefused" in _events(caplog))
            time.sleep(1.5)  # it is asked again
            assert [fleet.weights[number].address for number in fleet.weights] == [replica.address]
    sentence = f"the policy replica at {late.address} is not used: has another tokenizer; it is"
    assert caplog.text.count(sentence) == 1


def test_replicas_of_which_none_fits_end_the_wait_at_once(tiny_folder: Path) -> None:
    with (
        started(tiny_folder, name=STRANGER) as only,
        following(Script(frozenset({only.address})), services_config(wait_s=600), misfit) as fleet,
        pytest.raises(ConfigError, match=rf"{only.address} \(has another tokenizer\); serve the"),
    ):
        fleet.wait_for_one(lambda: False)


def test_a_trainer_follows_those_that_have_its_tokenizer(
    world: World,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `kleash ppo` compares is what the handshake compares."""
    opened: list[Any] = []

    def run(_config: object, _progress: object, *, open_services: Any, **_: object) -> None:
        opened.append(open_services)

    monkeypatch.setattr(trainer_module, "run_trainer", run)
    services = {"discovery": "dns", "policy": ["policies:1"], "wait_s": 10}
    trainer_module.run(world.config(tmp_path / "run", services=services), NullProgress())
    describe = opened[0].keywords["misfit"]
    with started(world.model) as replica:
        told = replica.policy.get_policy()
    assert describe(told) == ""
    told.limits.max_item_tokens = 3
    assert describe(told).startswith("takes sequences of 3 tokens, but max_prompt_tokens")
    told.tokenizer_sha256 = "0" * 64
    assert describe(told).startswith("has another tokenizer (000000000000) than ")


def test_a_refusal_is_in_the_sentence_at_the_end(tiny_folder: Path, tmp_path: Path) -> None:
    """A policy that wants credentials which the trainer does not send."""
    tokens = tmp_path / "tokens"
    tokens.write_text(make_token("trainer")[1] + "\n")
    auth = {"mode": "token", "tokens_file": tokens}
    server = ServerConfig.model_validate({"auth": auth})
    service = PolicyService(PolicyConfig.model_validate({"model": tiny_folder, "limits": LIMITS}))
    with (
        BackgroundServer([service], server) as policy,
        following(Script(frozenset({policy.address})), services_config(wait_s=2)) as fleet,
        pytest.raises(Unavailable) as refusal,
    ):
        fleet.wait_for_one(lambda: False)
    sentence = str(refusal.value)
    assert f"(found: {policy.address} (" in sentence
    assert "KLEASH_TOKEN" in sentence.partition("(found: ")[2].partition("))")[0]
    assert sentence.endswith("server.auth of the policy, or services.policy.")


def _events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [vars(record).get("event", "") for record in caplog.records]


def _script_of(fleet: ElasticFleet) -> Script:
    return fleet._discover.__self__  # type: ignore[attr-defined]
