"""What a run shows to Prometheus beyond the figures of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from prometheus_client import REGISTRY

from kleash.base import metrics
from kleash.lm import gpu_memory
from kleash.ppo.control import Control, RunState, SavedCheckpoint, Snapshot
from kleash.ppo.telemetry import export_run
from kleash.ppo.train import train
from kleash.rpc.errors import Unavailable

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit


def value(name: str, **labels: str) -> float:
    """Of a series; 0 without one."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Away:
    """A replica's weights, which cannot be reached at the first attempt to publish version 2."""

    def __init__(self, weights: Any) -> None:
        self._weights = weights
        self.num_failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def prepare(self, request: Any, *more: Any, **keywords: Any) -> Any:
        if request.key.version == 2 and not self.num_failures:
            self.num_failures += 1
            raise Unavailable("away.")
        return self._weights.prepare(request, *more, **keywords)


def test_a_run_shows_its_publishes_and_checkpoints(world: World, tmp_path: Path) -> None:
    names = ("committed", "failed")
    before = {name: value("kleash_publish_total", outcome=name) for name in names}
    seconds = value("kleash_publish_seconds_count")
    written = value("kleash_train_checkpoint_seconds_count")
    services = world.services()
    away = Away(services.weights[0])
    report = train(world.config(tmp_path / "run"), replace(services, weights={0: away}))
    assert report.steps == 2
    assert away.num_failures == 1
    grown = {name: value("kleash_publish_total", outcome=name) - before[name] for name in names}
    # Version 1 is the start, the others follow a step each.
    assert grown == {"committed": 3, "failed": 1}
    assert value("kleash_publish_seconds_count") - seconds == 3
    assert value("kleash_publish_version") == 3
    assert value("kleash_publish_replicas") == value("kleash_publish_known_replicas") == 1
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert value("kleash_train_checkpoint_bytes") == sum(path.stat().st_size for path in files)
    assert value("kleash_train_checkpoint_seconds_count") - written == 1


def states() -> dict[str, float]:
    """By name, those that are not 0."""
    every = {
        state.name.lower(): value("kleash_train_state", state=state.name.lower())
        for state in RunState
    }
    return {name: shown for name, shown in every.items() if shown}


def test_the_state_is_that_of_the_moment(tmp_path: Path) -> None:
    control = Control()
    export_run(control)
    assert states() == {"starting": 1}
    control.begin(
        Snapshot("run-1", RunState.STARTING, step=4, total_steps=9, checkpoint_step=4), []
    )
    assert value("kleash_train_info", run_id="run-1") == 1
    assert value("kleash_train_total_steps") == 9
    assert value("kleash_train_checkpoint_step") == 4
    assert control.may_continue(lambda: SavedCheckpoint(tmp_path, 4))
    assert states() == {"running": 1}
    control.pause()
    assert states() == {"paused": 1}
    control.checkpoint_saved(5)
    assert value("kleash_train_checkpoint_step") == 5
    control.stop()
    assert states() == {"stopping": 1}
    control.end(RunState.FAILED, "why")
    assert states() == {"failed": 1}


@pytest.fixture
def _two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory of device 0 is ones, of device 1 tens; the current one is 0."""
    amounts = {"allocated": 1, "reserved": 2, "total": 4}
    for kind, amount in amounts.items():
        monkeypatch.setitem(gpu_memory.READERS, kind, lambda index, n=amount: n * 10**index)
    monkeypatch.setattr(gpu_memory, "_devices", set())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield
    metrics.GPU_MEMORY_BYTES.clear()


@pytest.mark.usefixtures("_two_devices")
def test_memory_is_that_of_the_devices_in_use() -> None:
    def shown() -> list[float]:
        kinds = ("allocated", "reserved", "total")
        return [value("kleash_gpu_memory_bytes", kind=kind) for kind in kinds]

    gpu_memory.export_gpu_memory(torch.device("cpu"))
    assert REGISTRY.get_sample_value("kleash_gpu_memory_bytes", {"kind": "total"}) is None
    gpu_memory.export_gpu_memory(torch.device("cuda"))
    gpu_memory.export_gpu_memory(torch.device("cuda:0"))
    assert shown() == [1, 2, 4]
    gpu_memory.export_gpu_memory(torch.device("cuda:1"))
    assert shown() == [11, 22, 44]
