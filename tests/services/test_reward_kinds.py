"""One server with a model of every kind, and a reward service behind it: every call, every kind."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.classifier_folders import TEXTS, write_classifier

from kleash.base.config import parse_tree
from kleash.client.reward import RewardClient
from kleash.client.reward_admin import RewardAdminClient
from kleash.lm.heads import Normalization, reward_model_from_causal_lm
from kleash.lm.load import load_tokenizer, save_checkpoint_folder
from kleash.lm.sequences import TokenSequence
from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.errors import (
    PreconditionFailed,
)
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.up.config import ServeConfig

pytestmark = pytest.mark.services

RULES = """
def score(items):
    return [float(len(item.get("response", item.get("text", "")))) for item in items]
"""
TALK = [{"role": "user", "content": "What is 3 plus 4?"}, {"role": "assistant", "content": "7"}]
KINDS = {
    "judge": reward_pb2.MODEL_KIND_CLASSIFIER,
    "traits": reward_pb2.MODEL_KIND_CLASSIFIER,
    "encoder": reward_pb2.MODEL_KIND_CLASSIFIER,
    "rules": reward_pb2.MODEL_KIND_FUNCTION,
    "far": reward_pb2.MODEL_KIND_REMOTE,
    "panel": reward_pb2.MODEL_KIND_ENSEMBLE,
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}[SEP]{% endfor %}"


@dataclass
class World:
    """The server, the one behind it, and its folder."""

    address: str
    behind: str
    folder: Path

    def client(self, model: str = "", **options: Any) -> RewardClient:
        return RewardClient(self.address, model=model, **options)


@pytest.fixture(scope="module")
def world(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    root = tmp_path_factory.mktemp("kinds")
    (root / "rules.py").write_text(RULES)
    (root / "chat.jinja").write_text(TEMPLATE)
    traits = write_classifier(root / "traits", "llama", labels=("helpful", "harmless", "honest"))
    behind = RewardService(RewardConfig(model=tiny_reward_folder, name="distant"))
    with BackgroundServer([behind], ServerConfig()) as server_behind:
        models = {
            "panel": {"ensemble": ["judge", "far", "rules"], "combine": "min"},
            "judge": {"model": tiny_reward_folder},
            "traits": {"model": traits, "heads": {"helpful": 1.0, "honest": -0.5}},
            "encoder": {
                "model": write_classifier(root / "encoder", "deberta-v2"),
                "chat_template": root / "chat.jinja",
            },
            "rules": {
                "function": "rules:score",
                "function_path": [root],
                "tokenizer": tiny_reward_folder,
            },
            "far": {"remote": server_behind.address},
        }
        config = RewardConfig.model_validate({"models": models, "default": "judge"})
        with BackgroundServer([RewardService(config)], ServerConfig()) as server:
            yield World(server.address, server_behind.address, root)


def test_every_model_is_listed_and_described(world: World) -> None:
    with world.client() as client:
        listed = {each.name: each.revision for each in client.list_models()}
    assert listed.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        with world.client(name) as client:
            told = client.get_model()
        assert (told.kind, told.model.name, told.model.revision) == (kind, name, listed[name])
        assert told.limits.max_item_tokens > 0
    assert listed["far"] == listed["judge"]


@pytest.mark.parametrize("name", KINDS)
def test_every_call_of_every_kind(name: str, world: World) -> None:
    """A text alone, in a list, in a stream and isolated has the same score."""
    with world.client(name) as client:
        revision = client.get_model().model.revision
        together = client.score_texts(TEXTS, normalize=False)
        scores = [each.score for each in together]
        assert {each.revision for each in together} == {revision}
        assert {each.model for each in together} == {name}
        assert len(set(scores)) == len(TEXTS)
        alone = [client.score_texts([text], normalize=False)[0].score for text in TEXTS]
        np.testing.assert_allclose(alone, scores, rtol=0, atol=1e-5)
        isolated = client.score_texts(TEXTS, normalize=False, isolate=True)
        np.testing.assert_allclose([s.score for s in isolated], scores, rtol=0, atol=1e-5)
        streamed = sorted(client.score_stream(TEXTS, normalize=False), key=lambda s: s.index)
        np.testing.assert_allclose([s.score for s in streamed], scores, rtol=0, atol=1e-5)

        conversations = [[TALK[0], {"role": "assistant", "content": text}] for text in TEXTS]
        said = [s.score for s in client.score_conversations(conversations)]
        compared = client.compare(TALK[:1], TEXTS)
        np.testing.assert_allclose([s.score for s in compared.scores], said, rtol=0, atol=1e-5)
        assert compared.ranking == sorted(range(len(TEXTS)), key=lambda i: -said[i])
        counts = client.count_tokens(TEXTS)
        assert [each.token_count for each in together] == counts


def test_token_ids_where_the_tokenizer_is_one(world: World, tiny_reward_folder: Path) -> None:
    ids = load_tokenizer(tiny_reward_folder)(TEXTS[0], add_special_tokens=False)["input_ids"]
    sequence = TokenSequence(np.array(ids, dtype=np.int32), 0)
    for name in ("judge", "far", "rules", "panel"):
        with world.client(name) as client:
            digest = client.get_model().tokenizer_sha256
            [by_ids] = client.score_tokens([sequence], tokenizer_sha256=digest)
            [by_text] = client.score_texts([TEXTS[0]])
        assert by_ids.score == pytest.approx(by_text.score, abs=1e-5)
        assert by_ids.token_count == len(ids)


def test_the_panel_is_the_least_of_its_members(world: World) -> None:
    """Normalized ones: the judge's figures are (0.25, 2.0)."""
    with world.client("panel") as client:
        got = client.score_texts(TEXTS)
    with world.client("judge") as client:
        judged = client.score_texts(TEXTS)
    for score, alone, text in zip(got, judged, TEXTS, strict=True):
        assert score.score == pytest.approx(min(alone.score, len(text)), abs=1e-5)
        assert score.components["rules"] == len(text)
        assert score.components["far"] == pytest.approx(score.components["judge"], abs=1e-5)
        assert score.components["judge"] == pytest.approx(alone.score * 2.0 + 0.25, abs=1e-5)
        assert score.uncertainty == pytest.approx(
            np.std([alone.score, alone.score, len(text)]), abs=1e-4
        )


def test_heads_are_told_by_name(world: World) -> None:
    with world.client("traits") as client:
        [score] = client.score_texts(TEXTS[:1])
        components = client.get_model().components
    assert [(each.name, each.weight) for each in components] == [("helpful", 1.0), ("honest", -0.5)]
    expected = score.components["helpful"] - 0.5 * score.components["honest"]
    assert score.score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["encoder", "rules", "panel"])
def test_scores_per_token_are_refused_where_there_are_none(name: str, world: World) -> None:
    with world.client(name) as client, pytest.raises(PreconditionFailed) as caught:
        client.score_texts(TEXTS, return_token_scores=True)
    assert caught.value.reason == "NO_TOKEN_SCORES"


def test_a_remote_model_has_the_facts_of_the_one_behind_it(world: World) -> None:
    with world.client("far") as ours, RewardClient(world.behind) as theirs:
        mine, told = ours.get_model(), theirs.get_model()
    for field in (
        "tokenizer_sha256", "chat_template_sha256", "dtype", "normalization_mean",
        "normalization_std", "supports_token_scores", "batch_tolerance",
    ):  # fmt: skip
        assert getattr(mine, field) == getattr(told, field), field
    assert mine.limits.max_item_tokens == told.limits.max_item_tokens
    assert mine.model.revision == told.model.revision


@pytest.mark.parametrize(
    "options",
    [
        {"return_token_scores": True},
        {"truncation": "left"},
        {"truncation": "right", "normalize": False},
        {"isolate": True},
    ],
)
def test_a_remote_model_answers_as_the_one_behind_it(world: World, options: Any) -> None:
    """Also for an item that is too long. Batches may differ, and with them the last bits."""
    inputs = [*TEXTS, "over the lazy dog " * 200]
    with world.client("far") as ours, RewardClient(world.behind) as theirs:
        got = ours.score_texts(inputs, raise_on_item_error=False, **options)
        expected = theirs.score_texts(inputs, raise_on_item_error=False, **options)
    assert {each.code for each in expected} == (
        {"OK"} if "truncation" in options else {"OK", "INPUT_TOO_LONG"}
    )
    for one, other in zip(got, expected, strict=True):
        for field in ("code", "error_message", "token_count", "is_truncated", "revision"):
            assert getattr(one, field) == getattr(other, field), field
        assert one.value == pytest.approx(other.value, abs=1e-5)
        assert (one.token_scores is None) == (other.token_scores is None)
        if one.token_scores is not None and other.token_scores is not None:
            np.testing.assert_allclose(one.token_scores, other.token_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("keep_s", "is_held"), [(600.0, True), (0.0, False)])
def test_a_remote_model_never_answers_with_another_revision(
    tiny_folder: Path, tmp_path: Path, keep_s: float, is_held: bool
) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    for seed in (1, 2):
        model = reward_model_from_causal_lm(tiny_folder, seed=seed)
        Normalization(0.25, 2.0).store(model.config)
        save_checkpoint_folder(model, tokenizer, tmp_path / str(seed), {"stage": "reward-model"})
    behind = RewardConfig.model_validate(
        {
            "model": tmp_path / "1",
            "admins": ["*"],
            "model_folders": [tmp_path],
            "keep_previous_s": keep_s,
        }
    )
    with BackgroundServer([RewardService(behind)], ServerConfig()) as server:
        local = LocalReward.load(RewardConfig(remote=server.address))
        before = local.score_texts(TEXTS)
        with RewardAdminClient(server.address) as admin:
            new = admin.load_model(str(tmp_path / "2")).model.revision
        if is_held:
            again = local.score_texts(TEXTS)
            assert [s.score for s in again] == [s.score for s in before]
            assert {s.revision for s in again} == {before[0].revision}
            assert not local.model.is_outdated
        else:
            with pytest.raises(PreconditionFailed, match="does not serve revision") as caught:
                local.score_texts(TEXTS)
            assert caught.value.reason == "REVISION_CHANGED"
            assert new in str(caught.value)
            assert local.model.is_outdated
            fresh = LocalReward.load(RewardConfig(remote=server.address))
            assert {s.revision for s in fresh.score_texts(TEXTS)} == {new}
            fresh.close()
        local.close()


def test_one_slow_function_does_not_hold_up_the_other_models(
    tiny_reward_folder: Path, tmp_path: Path
) -> None:
    """It waits for a file that is written once another model of the same process has answered."""
    flag = tmp_path / "flag"
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def score(items):\n"
        f"    while not pathlib.Path({str(flag)!r}).exists(): time.sleep(0.01)\n"
        "    return [1.0] * len(items)\n"
    )
    config = RewardConfig.model_validate(
        {
            "models": {
                "judge": {"model": tiny_reward_folder},
                "slow": {
                    "function": "slow:score",
                    "function_path": [tmp_path],
                    "function_timeout_s": 60,
                },
            },
            "default": "judge",
        }
    )
    service = RewardService(config)
    with BackgroundServer([service], ServerConfig()) as server:
        channel = grpc.insecure_channel(server.address)
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        item = reward_pb2.ScoreItem(text="a")
        request = reward_pb2.ScoreRequest(model="slow", items=[item])
        slow = stub.Score.future(request, timeout=60)
        with RewardClient(server.address, model="judge", timeout_s=30) as client:
            assert client.score_texts(["a"])[0].is_ok
        assert not slow.done()
        assert service.heartbeat_age_s() == 0.0
        flag.touch()
        assert slow.result().results[0].score == 1.0
        channel.close()


def test_the_configuration_in_the_manual_serves(
    world: World, tiny_reward_folder: Path, tmp_path: Path
) -> None:
    """docs/reward-models.md, with the folders and the address of this test."""
    page = (Path(__file__).parents[2] / "docs" / "reward-models.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    [source] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    name = source.splitlines()[0].removeprefix("# ")
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(source)
    for given, here in (
        ("models/judge", str(tiny_reward_folder)),
        ("models/traits", str(world.folder / "traits")),
        ('["rewards"]', f'["{tmp_path / "rewards"}"]'),
        ("reward.example:50051", world.behind),
        ('remote_model = "judge"', 'remote_model = "distant"'),
    ):
        assert given in block
        block = block.replace(given, here)
    config = parse_tree(ServeConfig, tomllib.loads(block)).reward
    assert config is not None
    with (
        BackgroundServer([RewardService(config)], ServerConfig()) as server,
        RewardClient(server.address) as client,
    ):
        [score] = client.score_conversations([TALK])
        assert score.model == "panel"
        assert score.components.keys() == {"judge", "traits", "rules", "far"}
        assert score.components["rules"] == 1.0
        values = [
            score.components["judge"] / 2.0 - 0.125,
            score.components["traits"],
            1.0,
            score.components["far"] / 2.0 - 0.125,
        ]
        expected = np.mean(values) - 0.5 * np.var(values)
        assert score.score == pytest.approx(expected, abs=1e-5)
