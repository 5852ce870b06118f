"""Policy replicas that come and go while a run lives, over real gRPC."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.services.test_publish import started
from tests.unit.conftest import World, world  # noqa: F401  (a fixture)

from kleash.cluster.discovery import by_dns, split_address
from kleash.cluster.fleet import ElasticFleet
from kleash.ppo.config import ServicesConfig
from kleash.ppo.control import Control
from kleash.ppo.services import Services
from kleash.ppo.train import train
from kleash.rpc.errors import Unavailable

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
def following(script: Script, config: ServicesConfig) -> Iterator[ElasticFleet]:
    fleet = ElasticFleet(config, script.discover)
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


def test_dns_gives_every_address_of_a_name() -> None:
    stopping = threading.Event()
    found = next(iter(by_dns("dns:///localhost:50051")(stopping)))
    assert "127.0.0.1:50051" in found


def test_an_unknown_name_has_no_replicas() -> None:
    stopping = threading.Event()
    assert next(iter(by_dns("no-such-name.invalid:50051")(stopping))) == frozenset()


@pytest.mark.parametrize("address", ["policy", "policy:", ":50051", "policy:grpc"])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(address)


def _script_of(fleet: ElasticFleet) -> Script:
    return fleet._discover.__self__  # type: ignore[attr-defined]
