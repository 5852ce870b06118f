"""The client with the oldest and the newest packages that it takes, in environments without torch.

``make client-venvs`` makes them; one that is missing is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.services.client_venvs import KINDS, PYTHONS

from kleash.client import RewardClient
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = [pytest.mark.services, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TEXTS = ["hello", "the quick brown fox"]
ENVIRONMENTS = [f"{version}-{kind}" for version in PYTHONS for kind in KINDS]

ASK = """
import asyncio, importlib.util, json, platform, sys
import google.protobuf, grpc
from kleash.client import AsyncRewardClient, NotFound, RewardClient

texts = json.loads(sys.argv[1])
turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]

def ask():
    with RewardClient.from_env(timeout_s=60) as reward:
        assert reward.score_conversations([turns])[0].is_ok
        assert sorted(reward.compare("hello", ["world", "dog"]).ranking) == [0, 1]
        assert len(list(reward.score_stream(texts))) == len(texts)
        assert reward.list_models()[0] == reward.get_model().model
        try:
            reward.with_options(model="other").score_texts(texts)
        except NotFound as error:
            assert error.reason and error.metadata, error
        else:
            raise AssertionError("another model was served")
        scored = reward.score_texts(texts, isolate=True, return_token_scores=True)
        assert all(len(score.token_scores) == score.token_count for score in scored)
        return [score.score for score in scored]

async def ask_aio():
    async with AsyncRewardClient.from_env(timeout_s=60) as reward:
        assert len([score async for score in reward.score_stream(texts)]) == len(texts)
        return [score.score for score in await reward.score_texts(texts, isolate=True)]

print(json.dumps({
    "python": platform.python_version(),
    "grpcio": grpc.__version__,
    "protobuf": google.protobuf.__version__,
    "torch": importlib.util.find_spec("torch") is not None,
    "sync": ask(),
    "aio": asyncio.run(ask_aio()),
}))
"""


@pytest.fixture(scope="module")
def address(tiny_reward_folder: Path) -> Iterator[str]:
    service = RewardService(RewardConfig(model=tiny_reward_folder))
    with BackgroundServer([service], ServerConfig()) as server:
        yield server.address


@pytest.fixture(scope="module")
def expected(address: str) -> list[float]:
    with RewardClient(address) as reward:
        return [score.score for score in reward.score_texts(TEXTS, isolate=True)]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_client_works(name: str, address: str, expected: list[float]) -> None:
    """Warnings are errors there, too."""
    folder = ROOT / "build" / "clients" / name
    if not (folder / ".installed").exists():
        pytest.skip(f"there is no {folder}; make client-venvs makes it where it finds that Python")
    python = folder / "bin" / "python"
    roots = os.pathsep.join(str(ROOT / root) for root in ("protos", "services", "trainer"))
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": roots,
        "KLEASH_REWARD_ADDRESS": address,
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), "-W", "error", *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    asked = run("-c", ASK, json.dumps(TEXTS))
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    version, _, kind = name.partition("-")
    assert answer["python"].startswith(f"{version}.")
    if kind == "oldest":
        assert (answer["grpcio"], answer["protobuf"]) == ("1.73.1", "6.33.5")
    else:
        assert int(answer["protobuf"].split(".")[0]) >= 7
    assert not answer["torch"]
    assert answer["sync"] == answer["aio"] == expected
    scored = run("-m", "kleash.cli", "score", *(f"--text={text}" for text in TEXTS))
    assert scored.returncode == 0, scored.stderr
    records = [json.loads(line) for line in scored.stdout.splitlines()]
    assert [record["score"] for record in records] == pytest.approx(expected, abs=1e-5)
