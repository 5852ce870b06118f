"""A reward service whose models are replaced while calls go on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

import kleash.reward.replace
from kleash.client.reward import RewardClient
from kleash.client.reward_admin import RewardAdminClient
from kleash.lm.heads import Normalization, reward_model_from_causal_lm
from kleash.lm.load import load_tokenizer, save_checkpoint_folder
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.rpc.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
)
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

TEXTS = [f"the quick brown fox jumps {'over ' * n}the lazy dog" for n in range(6)]


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three reward models that differ in their heads."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(tiny_folder)
    for seed, name in enumerate(("first", "second", "third")):
        model = reward_model_from_causal_lm(tiny_folder, seed=seed + 1)
        Normalization(0.25, 2.0).store(model.config)
        save_checkpoint_folder(model, tokenizer, root / name, {"stage": "reward-model"})
    return {path.name: path for path in root.iterdir()}


@dataclass
class World:
    """A server that starts with the first model, and its callers."""

    folders: dict[str, Path]
    server: BackgroundServer
    service: RewardService
    client: RewardClient
    admin: RewardAdminClient

    def load(self, name: str, **options: str) -> Any:
        return self.admin.load_model(str(self.folders[name]), **options)

    def scores(self, revision: str = "") -> list[float]:
        client = RewardClient(self.server.address, revision=revision)
        with client:
            return [score.score for score in client.score_texts(TEXTS)]

    @property
    def revision(self) -> str:
        return self.client.get_model().model.revision


@pytest.fixture
def world(folders: dict[str, Path]) -> Iterator[World]:
    yield from serve(folders)


def serve(folders: dict[str, Path], **settings: Any) -> Iterator[World]:
    root = folders["first"].parent
    config = {"model": folders["first"], "name": "judge", "admins": ["*"], "model_folders": [root]}
    service = RewardService(RewardConfig.model_validate(config | settings))
    with (
        BackgroundServer([service], ServerConfig()) as server,
        RewardClient(server.address) as client,
        RewardAdminClient(server.address) as admin,
    ):
        yield World(folders, server, service, client, admin)


def test_a_load_switches_and_holds_the_one_before(world: World) -> None:
    first, before = world.revision, world.scores()
    answer = world.load("second")
    assert (answer.model.name, answer.previous.name) == ("judge", "judge")
    assert (answer.model.revision, answer.previous.revision) == (world.revision, first)
    assert world.revision != first
    after = world.scores()
    assert after != pytest.approx(before, abs=1e-3)
    assert world.scores(first) == before
    assert world.scores(world.revision) == after
    assert [model.revision for model in world.client.list_models()] == [world.revision]


def test_only_the_last_two_revisions_are_held(world: World) -> None:
    first = world.revision
    second = world.load("second").model.revision
    third = world.load("third").model.revision
    with pytest.raises(NotFound) as caught:
        world.scores(first)
    assert caught.value.reason == "REVISION_NOT_SERVED"
    assert all(revision in str(caught.value) for revision in (first, second, third))
    assert world.scores(second)


def test_the_one_before_is_held_for_a_time(folders: dict[str, Path]) -> None:
    for world in serve(folders, keep_previous_s=0.2):
        first = world.revision
        world.load("second")
        give_up = time.monotonic() + 30
        while is_held(world, first) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert not is_held(world, first)
        assert world.scores()


def test_going_back_is_a_load_like_any_other(world: World) -> None:
    first, before = world.revision, world.scores()
    second = world.load("second").model.revision
    answer = world.load("first")
    assert (answer.model.revision, answer.previous.revision) == (first, second)
    assert world.scores() == before
    assert infos() == {first, second}


def test_what_is_served_already_is_not_loaded_again(world: World) -> None:
    first = world.revision
    answer = world.load("first")
    assert answer.model.revision == first
    assert not answer.HasField("previous")
    assert infos() == {first}


def test_unload_gives_the_memory_back(world: World) -> None:
    first = world.revision
    model: Any = world.service._shelf.find("", "").model  # type: ignore[union-attr]
    weights = weakref.ref(model.frozen.model)
    del model
    world.load("second")
    assert infos() == {first, world.revision}
    with pytest.raises(NotFound, match="not held beside the newest"):
        world.admin.unload_revision(world.revision)
    world.admin.unload_revision(first)
    with pytest.raises(NotFound):
        world.scores(first)
    assert infos() == {world.revision}
    give_up = time.monotonic() + 30
    while weights() is not None and time.monotonic() < give_up:
        gc.collect()
        time.sleep(0.05)
    assert weights() is None


@pytest.mark.parametrize(
    ("folder", "options", "error", "sentence"),
    [
        ("missing", {}, PreconditionFailed, "does not exist"),
        ("../elsewhere", {}, InvalidRequest, "not inside of this server's reward.model_folders"),
        ("", {}, InvalidRequest, "not inside of this server's reward.model_folders"),
        ("second", {"revision": "sha256:other"}, PreconditionFailed, "the call asks for sha256:ot"),
        ("second", {"model": "nobody"}, NotFound, "model 'nobody' is not served here"),
    ],
)
def test_a_load_that_fails_changes_nothing(
    world: World, folder: str, options: dict[str, str], error: type, sentence: str
) -> None:
    first, before = world.revision, world.scores()
    root = world.folders["first"].parent
    with pytest.raises(error, match=sentence):
        world.admin.load_model(str(root / folder) if folder else "", **options)
    assert (world.revision, world.scores()) == (first, before)
    assert infos() == {first}


@pytest.mark.parametrize("admins", [[], ["someone"]])
def test_only_administrators_load(folders: dict[str, Path], admins: list[str]) -> None:
    for world in serve(folders, admins=admins):
        with pytest.raises(PermissionDenied, match=r"reward\.admins"):
            world.load("second")
        with pytest.raises(PermissionDenied, match=r"reward\.admins"):
            world.admin.unload_revision("any")


def test_calls_go_on_while_models_are_replaced(world: World) -> None:
    """Each reply is whole: its scores are those of the revision that it names."""
    revisions = [world.revision]
    expected = {revisions[0]: world.scores()}
    seen: list[tuple[str, list[float]]] = []
    is_over = threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            while not is_over.is_set():
                scores = world.client.score_texts(TEXTS)
                seen.append((scores[0].revision, [score.score for score in scores]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for name in ("second", "third", "first", "second"):
        revision = world.load(name).model.revision
        expected[revision] = world.scores(revision)
        assert health(world.server.address) == health_pb2.HealthCheckResponse.SERVING
    is_over.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert {revision for revision, _ in seen} > {revisions[0]}
    for revision, scores in seen:
        assert scores == pytest.approx(expected[revision], abs=1e-5)


def test_a_load_goes_on_without_its_caller(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call of the same waits for it and finds the model served."""
    may_load = threading.Event()
    load = kleash.reward.replace.load_model

    def load_slowly(*arguments: Any) -> Any:
        assert may_load.wait(60)
        return load(*arguments)

    monkeypatch.setattr(kleash.reward.replace, "load_model", load_slowly)
    first = world.revision
    with (
        RewardAdminClient(world.server.address, timeout_s=0.2) as hasty,
        pytest.raises(DeadlineExceeded),
    ):
        hasty.load_model(str(world.folders["second"]))
    assert world.revision == first
    may_load.set()
    answer = world.load("second")
    assert not answer.HasField("previous")
    assert answer.model.revision == world.revision != first


def test_a_stream_ends_on_the_model_that_it_began_with(world: World) -> None:
    first = world.revision
    has_switched = threading.Event()

    def texts() -> Iterator[str]:
        yield from TEXTS
        assert has_switched.wait(60)
        yield from TEXTS

    stream = world.client.score_stream(texts())
    before = [next(stream) for _ in TEXTS]
    world.load("second")
    has_switched.set()
    scores = [*before, *stream]
    assert len(scores) == 2 * len(TEXTS)
    assert {score.revision for score in scores} == {first}


def test_a_service_that_stops_takes_no_new_model(folders: dict[str, Path]) -> None:
    """The shelf refuses, and the model is closed."""
    from kleash.reward.load import load_models
    from kleash.reward.shelf import ModelShelf
    from kleash.rpc.errors import Unavailable

    config = RewardConfig(model=folders["first"], name="judge")

    async def stop_and_switch() -> None:
        shelf = ModelShelf(
            load_models(config), config.limits, default_name="judge", keep_previous_s=1
        )
        await shelf.start()
        await shelf.stop()
        with pytest.raises(Unavailable, match="stopping"):
            await shelf.switch("judge", load_models(config)["judge"])

    asyncio.run(stop_and_switch())


def is_held(world: World, revision: str) -> bool:
    try:
        return bool(world.scores(revision))
    except NotFound:
        return False


def infos() -> set[str]:
    """Revisions that the metric names."""
    return {
        sample.labels["revision"]
        for metric in REGISTRY.collect()
        if metric.name == "kleash_model_info"
        for sample in metric.samples
        if sample.labels["service"] == "reward" and sample.labels["name"] == "judge"
    }


def health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service="")).status


@pytest.fixture
def several(folders: dict[str, Path], tmp_path: Path) -> Iterator[World]:
    """Two members, an ensemble of them, an ensemble of that, and a function."""
    (tmp_path / "counts.py").write_text(
        "def length(items):\n    return [len(item['text']) for item in items]\n"
    )
    yield from serve(
        folders,
        model=None,
        name="",
        default="both",
        models={
            "a": {"model": folders["first"]},
            "b": {"model": folders["second"]},
            "both": {"ensemble": ["a", "b"]},
            "all": {"ensemble": ["both", "count"]},
            "count": {"function": "counts:length", "function_path": [tmp_path]},
        },
    )


def revisions(world: World) -> dict[str, str]:
    return {model.name: model.revision for model in world.client.list_models()}


def test_ensembles_follow_their_members(several: World) -> None:
    before = revisions(several)
    several.load("third", model="b")
    after = revisions(several)
    assert {name for name in after if after[name] != before[name]} == {"b", "both", "all"}
    told = several.client.get_model()
    assert [each.revision for each in told.components] == [after["a"], after["b"]]

    def scores(name: str) -> list[float]:
        with RewardClient(several.server.address, model=name) as client:
            return [score.score for score in client.score_texts(TEXTS)]

    means = [(a + b) / 2 for a, b in zip(scores("a"), scores("b"), strict=True)]
    assert scores("both") == pytest.approx(means, abs=1e-5)


def test_ensembles_of_what_is_unloaded_go_with_it(several: World) -> None:
    before = revisions(several)
    several.load("third", model="b")
    for name in ("b", "both", "all"):
        with RewardClient(several.server.address, model=name, revision=before[name]) as client:
            assert all(score.is_ok for score in client.score_texts(TEXTS))
    several.admin.unload_revision(before["b"], model="b")
    for name in ("b", "both", "all"):
        with (
            RewardClient(several.server.address, model=name, revision=before[name]) as client,
            pytest.raises(NotFound),
        ):
            client.score_texts(TEXTS)


def test_what_has_no_folder_is_loaded_anew(several: World, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"'both' is an ensemble: load one of its .*\(a, b\)"):
        several.load("third", model="both")
    with pytest.raises(InvalidRequest, match="'count' is a function and has no folder"):
        several.load("third", model="count")
    before = revisions(several)
    (tmp_path / "counts.py").write_text("def length(items):\n    return [7.0] * len(items)\n")
    answer = several.admin.load_model("", model="count")
    assert answer.previous.revision == before["count"] != answer.model.revision
    with RewardClient(several.server.address, model="count") as client:
        assert [score.score for score in client.score_texts(TEXTS)] == [7.0] * len(TEXTS)


def test_a_remote_model_follows_its_service(world: World) -> None:
    """The service behind replaces its model; this one refuses, and then serves the new revision."""
    config = RewardConfig(remote=world.server.address, name="far")
    with (
        BackgroundServer([RewardService(config)], ServerConfig()) as server,
        RewardClient(server.address) as client,
    ):
        first = world.revision
        assert {score.revision for score in client.score_texts(TEXTS)} == {first}
        second = world.load("second").model.revision
        assert {score.revision for score in client.score_texts(TEXTS)} == {first}
        world.admin.unload_revision(first)
        give_up = time.monotonic() + 60
        seen: set[str] = set()
        while second not in seen and time.monotonic() < give_up:
            with contextlib.suppress(PreconditionFailed):
                seen |= {score.revision for score in client.score_texts(TEXTS)}
            time.sleep(0.1)
        assert seen == {second}
