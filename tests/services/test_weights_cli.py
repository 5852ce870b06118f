"""``kleash weights`` over real gRPC: a policy replica and a publisher's store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kleash.cli.main import main
from kleash.client.weights import WeightsClient
from kleash.lm.digest import canonical_tensors, model_digest
from kleash.lm.load import load_causal_lm, load_tokenizer, save_checkpoint_folder
from kleash.policy.config import PolicyConfig, PolicyLimits
from kleash.policy.service import PolicyService
from kleash.ppo.publish import Publisher
from kleash.rpc.server import BackgroundServer
from kleash.up.supervisor import free_port
from kleash.weights.store import Store
from kleash.weights.store_service import StoreService

pytestmark = pytest.mark.services


class Fleet:
    """A publisher with its store and one bfloat16 replica, brought to version 1 by an anchor."""

    def __init__(self, folder: Path, model_folder: Path) -> None:
        config = PolicyConfig(
            model=model_folder, dtype="bfloat16", limits=PolicyLimits(max_item_tokens=256)
        )
        self.service = PolicyService(config)
        self.trained_folder = folder / "trained"
        self.store = Store(folder / "run" / "weights")
        self.run = folder / "run"
        self.model = load_causal_lm(model_folder)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.01)
        save_checkpoint_folder(self.model, load_tokenizer(model_folder), self.trained_folder, {})

    def publish(self, replica: str, publisher: str) -> None:
        with WeightsClient(replica) as weights:
            made = Publisher(
                {0: weights}, self.store, run_id="run", fence=1, store_address=publisher
            )
            self.digest = made.publish(self.model, 1).digest
        self.replica, self.publisher = replica, publisher


@pytest.fixture(scope="module")
def fleet(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), tiny_folder)
    with (
        BackgroundServer([StoreService(fleet.store)]) as publisher,
        BackgroundServer([fleet.service]) as replica,
    ):
        fleet.publish(replica.address, publisher.address)
        yield fleet
    fleet.store.close()


def kleash(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """Output of ``kleash weights``: of a command that ends well, or else its sentence."""
    assert main(["weights", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    assert bool(captured.err) == bool(status)
    return captured.err or captured.out


def test_inspect_a_replica(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(kleash(capsys, 0, "inspect", fleet.replica, "--json"))
    assert (found["run"], found["fence"], found["version"]) == ("run", 1, 1)
    assert (found["digest"], found["state"]) == (fleet.digest, "SERVING")
    assert fleet.store.head is not None
    assert found["key"] == fleet.store.head.manifest_hash.hex()
    assert f"digest            {fleet.digest}\n" in kleash(capsys, 0, "inspect", fleet.replica)


def test_inspect_a_publisher(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(kleash(capsys, 0, "inspect", fleet.publisher, "--json"))
    assert (found["head"], found["digest"], found["run"]) == (1, fleet.digest, "run")
    assert found["kept"] == {"delta": 1, "anchor": 1}
    assert found["dense_bytes"] == sum(
        tensor.numel() * 2 for tensor in canonical_tensors(fleet.model).values()
    )


def test_history_of_a_publisher_is_its_folder_s(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    of_address, of_folder = (
        [json.loads(line) for line in kleash(capsys, 0, "history", target, "--json").splitlines()]
        for target in (fleet.publisher, fleet.run)
    )
    for one, other in zip(of_address, of_folder, strict=True):
        # One is read from the files, the other from the log.
        assert one.pop("time_s") == pytest.approx(other.pop("time_s"), abs=60)
    assert of_address == of_folder
    assert [(its["kind"], its["state"]) for its in of_folder] == [
        ("delta", "committed"),
        ("anchor", "stored"),
    ]
    assert "keeps no history" in kleash(capsys, 2, "history", fleet.replica)


def test_verify_recomputes_a_replica_s_digest_and_compares(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = kleash(capsys, 0, "verify", fleet.replica)
    assert f"{fleet.digest}, computed again" in printed
    for other in (fleet.publisher, fleet.run, fleet.replica):
        printed = kleash(capsys, 0, "verify", fleet.replica, f"--against={other}")
        assert f"{other} has the same digest." in printed
    assert "is a publisher" in kleash(capsys, 2, "verify", fleet.publisher)
    assert "is a folder" in kleash(capsys, 2, "verify", fleet.run, f"--against={fleet.replica}")


def test_verify_against_another_replica(
    fleet: Fleet, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that serves the weights it was started with."""
    service = PolicyService(PolicyConfig(model=tiny_folder, dtype="bfloat16"))
    with BackgroundServer([service]) as other:
        error = kleash(capsys, 1, "verify", fleet.replica, f"--against={other.address}")
        printed = kleash(capsys, 0, "verify", other.address, f"--model={tiny_folder}")
    loaded = model_digest(load_causal_lm(tiny_folder, dtype="bfloat16"))
    assert error == (
        f"error: {fleet.replica} serves {fleet.digest}, and {other.address} has {loaded}.\n"
    )
    assert printed.endswith(f"{tiny_folder} has the same digest.\n")


def test_verify_against_a_model_in_the_replica_s_data_type(
    fleet: Fleet, tiny_folders: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder holds float32, and the replica serves bfloat16."""
    trained = fleet.trained_folder
    printed = kleash(capsys, 0, "verify", fleet.replica, f"--model={trained}")
    assert f"{trained} has the same digest." in printed
    before, other = tiny_folders["llama"], tiny_folders["gpt2"]
    assert f"and {before} has sha256:" in kleash(
        capsys, 1, "verify", fleet.replica, f"--model={before}"
    )
    assert f"the model in {other} has other tensors" in kleash(
        capsys, 1, "verify", fleet.replica, f"--model={other}"
    )


def test_verify_notices_a_changed_bit_in_memory(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = PolicyService(PolicyConfig(model=tiny_folder))
    with BackgroundServer([service]) as server:
        with torch.no_grad():
            next(service.engine.frozen.model.parameters()).view(-1)[7] += 1
        error = kleash(capsys, 1, "verify", server.address)
    assert error.startswith(f"error: {server.address}: the weights in memory have digest sha256:")


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    assert f"cannot reach the service at {address}" in kleash(capsys, 3, "inspect", address)
