"""docs/security.md: its names exist, its example runs, and its tables leave nothing out."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from tests.services.authority import Authority

from kleash.base.config import describe_config
from kleash.cli import tokens
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.rpc import auth, credentials, errors, static_tokens, token_review
from kleash.rpc.quota import DEFAULT_QUOTAS
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_keys_of_the_server_are_those_that_exist() -> None:
    keys = {f"server.{key}" for key, *_ in describe_config(ServerConfig)}
    named = set(re.findall(r"\bserver\.(?:tls\.|auth\.)?[a-z_]+[a-z]\b", TEXT))
    assert named - {"server.tls", "server.auth", "server.quotas", "server.crt"} <= keys
    assert {key for key in keys if key.startswith(("server.tls.", "server.auth."))} <= named


def test_the_quotas_in_the_docs_are_quotas() -> None:
    (example,) = re.findall(r"```toml\n(\[\[server\.quotas.*?)```", TEXT, flags=re.DOTALL)
    config = ServerConfig.model_validate(tomllib.loads(example)["server"])
    trainer, apps = config.quotas
    assert trainer == DEFAULT_QUOTAS[0]
    assert apps.max_running_calls == 32


def test_variables_are_those_that_clients_read() -> None:
    source = inspect.getsource(credentials)
    read = set(re.findall(r'"(KLEASH_[A-Z_]+)"', source))
    assert set(re.findall(r"KLEASH_[A-Z_]+[A-Z]", TEXT)) == read
    assert len(read) == 6


def test_reasons_are_those_that_are_raised() -> None:
    sources = [inspect.getsource(its) for its in (auth, static_tokens, token_review)]
    raised = set(re.findall(r'reason="([A-Z_]+)"', "".join(sources)))
    table = TEXT.partition("## What callers are told")[2].partition("## What is recorded")[0]
    explained = set(re.findall(r"^\| [A-Z_]+ \| `([A-Z_]+)`", table, re.MULTILINE))
    assert explained == raised | {"TLS", "UNREACHABLE"}
    made_here = inspect.getsource(errors)
    assert all(f'reason="{name}"' in made_here for name in ("TLS", "UNREACHABLE"))


def test_figures_are_those_of_the_code() -> None:
    assert (token_review.ACCEPTED_S, token_review.REFUSED_S) == (60.0, 5.0)
    assert "holds for 60 s" in TEXT
    assert "a refused one for 5 s" in TEXT
    assert f"At most {token_review.MAX_OPEN} questions" in TEXT


def test_the_example_runs(
    tmp_path: Path,
    tiny_reward_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    authority = Authority(tmp_path, "ca")
    assert authority.ca == tmp_path / "ca.crt"
    pair = authority.issue("server", x509.DNSName("localhost"))
    tokens.run(["guardrails", "--tokens_file=tokens"])
    (tmp_path / "guardrails.token").write_text(capsys.readouterr().out)
    config = ServerConfig.model_validate(
        {
            "tls": {"cert": pair.cert, "key": pair.key},
            "auth": {"mode": "token", "tokens_file": "tokens"},
        }
    )
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert "reward.rlhf.svc:50051" in code
    service = RewardService(RewardConfig(model=tiny_reward_folder))
    with BackgroundServer([service], config) as server:
        exec(code.replace("reward.rlhf.svc:50051", f"localhost:{server.port}"), {})
    assert capsys.readouterr().out.startswith("sha256:")
