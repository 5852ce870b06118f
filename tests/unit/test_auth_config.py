"""Keys of servers, credentials of clients and tokens: what is refused, in which words."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kleash.base.config import load_config
from kleash.base.errors import ConfigError
from kleash.cli import tokens
from kleash.rpc import credentials as credentials_module
from kleash.rpc import reloading
from kleash.rpc.credentials import Credentials, read_token
from kleash.rpc.reloading import Reloading
from kleash.rpc.server import ServerConfig
from kleash.rpc.static_tokens import make_token, read_keys

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tls": {"cert": "a"}}, "'tls': cert and key go together"),
        ({"tls": {"key": "a"}}, "'tls': cert and key go together"),
        ({"tls": {"client_ca": "a"}}, "'tls': client_ca needs TLS"),
        ({"auth": {"mode": "token"}}, "'auth': mode token needs tokens_file"),
        ({"auth": {"mode": "service_account"}}, "'auth': mode service_account needs audience"),
        ({"auth": {"mode": "mtls"}}, "auth.mode mtls needs tls.client_ca"),
        (
            {"auth": {"mode": "mtls"}, "tls": {"cert": "a", "key": "b"}},
            "auth.mode mtls needs tls.client_ca",
        ),
        ({"auth": {"tokens_file": "a"}}, "tokens_file has no effect in mode none"),
        ({"auth": {"mode": "mtls", "audience": "a"}}, "audience has no effect in mode mtls"),
        ({"auth": {"allowed_callers": ["a"]}}, "allowed_callers has no effect in mode none"),
        ({"auth": {"mode": "tokens"}}, "'auth.mode': Input should be"),
    ],
)
def test_a_configuration_that_contradicts_itself(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    path = tmp_path / "server.json"
    path.write_text(json.dumps(options))
    with pytest.raises(ConfigError) as caught:
        load_config(ServerConfig, [str(path)])
    assert sentence in str(caught.value)


def test_flags_reach_the_server() -> None:
    flags = ["--auth.mode=token", "--auth.tokens_file=keys", "--auth.allowed_callers=a,b*"]
    auth = load_config(ServerConfig, flags).auth
    assert (auth.mode, auth.tokens_file) == ("token", Path("keys"))
    assert auth.allowed_callers == ("a", "b*")


VARIABLES = {
    "KLEASH_TLS_CA": "ca.crt",
    "KLEASH_TLS_CERT": "tls.crt",
    "KLEASH_TLS_KEY": "tls.key",
    "KLEASH_TLS_SERVER_NAME": "policy.rlhf.svc",
    "KLEASH_TOKEN": "secret",
    "KLEASH_TOKEN_FILE": "token",
}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", Credentials()),
        ("CA", Credentials(ca=Path("ca.crt"))),
        ("TOKEN", Credentials(token="secret")),
        ("TOKEN_FILE", Credentials(token_file=Path("token"))),
        (
            "CA CERT KEY SERVER_NAME",
            Credentials(
                ca=Path("ca.crt"),
                cert=Path("tls.crt"),
                key=Path("tls.key"),
                server_name="policy.rlhf.svc",
            ),
        ),
        ("CA CERT", "set KLEASH_TLS_CERT and KLEASH_TLS_KEY, or neither"),
        ("CA KEY", "set KLEASH_TLS_CERT and KLEASH_TLS_KEY, or neither"),
        ("CERT KEY", "KLEASH_TLS_CERT has no effect without TLS; set KLEASH_TLS_CA"),
        ("SERVER_NAME", "KLEASH_TLS_SERVER_NAME has no effect without TLS; set KLEASH_TLS_CA"),
        ("TOKEN TOKEN_FILE", "KLEASH_TOKEN and KLEASH_TOKEN_FILE are both set"),
    ],
)
def test_credentials_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, names: str, expected: Credentials | str
) -> None:
    wanted = {f"KLEASH_{name}" for name in names.split()}
    wanted |= {f"KLEASH_TLS_{name}" for name in names.split()}
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value if name in wanted else "")
    if isinstance(expected, Credentials):
        assert Credentials.from_env() == expected
        assert expected.is_empty == (not names)
        return
    with pytest.raises(ConfigError) as caught:
        Credentials.from_env()
    assert expected in str(caught.value)


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(Credentials(token="secret"))


@pytest.mark.parametrize("text", [b"", b"\n", b"two words", b"one\nline", "é".encode(), b"\xff"])
def test_a_file_without_a_token(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))} does not hold a token"):
        read_token(path)
    path.write_bytes(b"  kleash_abc\n")
    assert read_token(path) == "kleash_abc"


def test_clients_of_a_process_share_what_they_watch(tmp_path: Path) -> None:
    """One that is opened while the file is being replaced takes the last good token."""
    path = tmp_path / "token"
    path.write_text("first")
    token = Credentials(token_file=path).watch_token()
    assert token is not None
    assert token() == "first"
    path.write_text("")
    again = Credentials(token_file=path).watch_token()
    assert again is not None
    assert again() == "first"
    with pytest.raises(ConfigError):
        credentials_module.read_token(path)


HEX = "0" * 64


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("trainer", ":2: a line is 'NAME sha256:HEX'"),
        (f"trainer {HEX}", ":2: a line is"),
        ("trainer sha256:abc", ":2: a line is"),
        (f"trainer sha256:{HEX.replace('0', 'A')}", ":2: a line is"),
        (f"-x sha256:{HEX}", ":2: a line is"),
        (f"a sha256:{HEX} until:2027-01-01T00:00:00Z more", ":2: a line is"),
        (f"a sha256:{HEX} until:tomorrow", "'until:tomorrow' is not an end"),
        (f"a sha256:{HEX} 2027-01-01T00:00:00Z", "'2027-01-01T00:00:00Z' is not an end"),
        (f"a sha256:{HEX} until:2027-01-01T00:00:00", "is not an end"),
        (f"a sha256:{HEX}\nb sha256:{HEX}", ":3: the key is that of 'a', too"),
        ("", "holds no key; kleash token NAME"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# of the trainer\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert str(path) in str(caught.value)
    assert sentence in str(caught.value)


def test_a_token_and_its_line(tmp_path: Path) -> None:
    until = datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC)
    token, line = make_token("a/b:c@d", until)
    assert re.fullmatch(r"kleash_[\w-]{43}", token)
    assert token not in line
    (tmp_path / "keys").write_text(line)
    (key,) = read_keys(tmp_path / "keys")
    assert (key.name, key.until) == ("a/b:c@d", until)
    assert make_token("x")[0] != make_token("x")[0]
    for name in ("", "a b", "-a", "é", "a#b"):
        with pytest.raises(ConfigError, match="cannot name a caller"):
            make_token(name)


def test_the_command_makes_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    assert tokens.run(["trainer"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("token: kleash_")
    path.write_text(second.removeprefix("line:").strip())  # without a line break at its end
    assert tokens.run(["guardrails", f"--tokens_file={path}", "--days=30"]) == 0
    printed = capsys.readouterr().out.strip()
    assert re.fullmatch(r"kleash_[\w-]{43}", printed)
    trainer, guardrails = read_keys(path)
    assert (trainer.name, trainer.until) == ("trainer", None)
    assert guardrails.until is not None
    left = guardrails.until - datetime.now(UTC)
    assert timedelta(days=29.99) < left <= timedelta(days=30)


def test_a_new_file_of_keys_is_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    mask = os.umask(0)
    try:
        tokens.run(["trainer", f"--tokens_file={path}"])
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: NAME"),
        (["a b"], "'a b' cannot name a caller"),
        (["a", "--days=0"], "--days=0 is not between 0 and"),
        (["a", "--days=nan"], "--days=nan is not between 0 and"),
        (["a", "--days=1e12"], "--days=1e+12 is not between 0 and"),
        (["a", "--day=1"], "unrecognized arguments: --day=1"),
        (["a", "--tokens_file=/nowhere/keys"], "cannot write /nowhere/keys: No such file"),
    ],
)
def test_the_command_refuses(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        tokens.run(arguments)
    assert sentence in str(caught.value)
    assert capsys.readouterr().out == ""


class Counted:
    """Reads a number from a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_reads = 0

    def __call__(self) -> int:
        self.num_reads += 1
        text = self.path.read_text()
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"{self.path} holds '{text}', not a number.") from None


def test_files_are_read_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(reloading, "CHECK_S", 0.0)
    path = tmp_path / "number"
    path.write_text("1")
    read = Counted(path)
    files = Reloading([path], read)
    assert [files.current() for _ in range(3)] == [1, 1, 1]
    assert read.num_reads == 1
    path.write_text("22")
    assert [files.current() for _ in range(3)] == [22, 22, 22]
    assert read.num_reads == 2
    assert caplog.text.count(f"reloaded {path}") == 1
    path.write_text("x")
    assert [files.current() for _ in range(3)] == [22, 22, 22]
    assert caplog.text.count(f"keeping the old {path}: {path} holds 'x', not a number.") == 1
    path.unlink()
    assert [files.current() for _ in range(3)] == [22, 22, 22]
    assert caplog.text.count(f"cannot read {path}: No such file") == 1
    path.write_text("22")  # back: nothing to tell
    assert files.current() == 22
    assert caplog.text.count("reloaded") == 1
    path.write_text("x")
    files.current()
    assert caplog.text.count("holds 'x'") == 2


def test_a_link_that_is_moved_is_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubernetes replaces a Secret: the folder behind ..data changes at once."""
    monkeypatch.setattr(reloading, "CHECK_S", 0.0)
    for number in (1, 2):
        (tmp_path / f"v{number}").mkdir()
        (tmp_path / f"v{number}" / "number").write_text(str(number))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "number").symlink_to("..data/number")
    files = Reloading([tmp_path / "number"], Counted(tmp_path / "number"))
    assert files.current() == 1
    (tmp_path / "..new").symlink_to("v2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert files.current() == 2


def test_files_are_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "number"
    path.write_text("1")
    now = 100.0
    monkeypatch.setattr(reloading.time, "monotonic", lambda: now)
    files = Reloading([path], Counted(path))
    path.write_text("2")
    assert files.current() == 1
    now = 100.9
    assert files.current() == 1
    now = 101.0
    assert files.current() == 2
    path.write_text("3")
    assert files.current() == 2


def test_files_must_be_good_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "number"
    with pytest.raises(ConfigError, match="cannot read"):
        Reloading([path], Counted(path))
    path.write_text("x")
    with pytest.raises(ConfigError, match="not a number"):
        Reloading([path], Counted(path))
