"""Callers by ServiceAccount tokens, against a real HTTPS server that implements TokenReview."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from tests.services.authority import LOOPBACK, Authority, Pair, TokenReviewer, listening
from tests.services.doubler import CALL_S, SERVICE, free_port, health_of, serving
from tests.services.test_auth_rotation import Named

from kleash.base.errors import ConfigError
from kleash.client import (
    Credentials,
    PermissionDenied,
    ReferenceClient,
    ServiceError,
    Unauthenticated,
    Unavailable,
)
from kleash.rpc import token_review
from kleash.rpc.server import BackgroundServer
from kleash.rpc.token_review import ApiServer, TokenReviews

pytestmark = pytest.mark.services

NAME = "system:serviceaccount:rlhf:trainer"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    authority = Authority(tmp_path)
    (tmp_path / "ca.crt").write_bytes(authority.ca.read_bytes())
    return authority.issue("api-server", *LOOPBACK)


@pytest.fixture
def away(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> TokenReviewer:
    """An API server that is not up yet, and a pod that knows where it is."""
    reviewer = TokenReviewer(free_port())
    (tmp_path / "token").write_text(reviewer.own_token)
    monkeypatch.setattr(token_review, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(reviewer.port))
    return reviewer


@pytest.fixture
def reviewer(away: TokenReviewer, pair: Pair) -> Iterator[TokenReviewer]:
    with listening(away, pair):
        yield away


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients are not sent away for long before they give up."""
    monkeypatch.setattr(token_review, "RETRY_S", 0.05)


@pytest.fixture
def service() -> Named:
    return Named()


@pytest.fixture
def server(service: Named, away: TokenReviewer) -> Iterator[BackgroundServer]:
    auth = {"mode": "service_account", "audience": "kleash"}
    with serving(service, auth=auth) as server:
        yield server


def ask(server: BackgroundServer, token: str, timeout_s: float = CALL_S) -> None:
    credentials = Credentials(token=token)
    with ReferenceClient(server.address, timeout_s=timeout_s, credentials=credentials) as client:
        client.get_model()


def refusal(server: BackgroundServer, token: str) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        ask(server, token)
    return caught.value


def outcomes() -> dict[str, float]:
    name = "kleash_token_reviews_total"
    return {
        outcome: REGISTRY.get_sample_value(name, {"outcome": outcome}) or 0.0
        for outcome in ("accepted", "refused", "failed")
    }


def test_one_question_for_many_calls(
    server: BackgroundServer, service: Named, reviewer: TokenReviewer
) -> None:
    before, token = outcomes(), reviewer.token("rlhf:trainer")
    for _ in range(10):
        ask(server, token)
    assert service.callers == [NAME] * 10
    assert reviewer.num_reviews == 1
    wrong = token[:-4] + "AAAA"
    for _ in range(3):
        assert refusal(server, wrong).reason == "BAD_CREDENTIALS"
    assert reviewer.num_reviews == 2
    assert outcomes() == {
        **before,
        "accepted": before["accepted"] + 1,
        "refused": before["refused"] + 1,
    }


def test_calls_of_one_token_at_a_time_ask_once(
    server: BackgroundServer, service: Named, reviewer: TokenReviewer
) -> None:
    """A caller that gives up does not take the answer from the others."""
    token = reviewer.token("rlhf:trainer")
    reviewer.may_answer.clear()
    with ThreadPoolExecutor(6) as threads:
        hasty = threads.submit(ask, server, token, 0.5)
        assert reviewer.entered.wait(CALL_S)
        calls = [threads.submit(ask, server, token) for _ in range(5)]
        assert "not answered in time" in str(hasty.exception())
        assert health_of(server.address, SERVICE) == "SERVING"
        reviewer.may_answer.set()
        for call in calls:
            call.result()
    assert reviewer.num_reviews == 1
    assert service.callers == [NAME] * 5


def test_an_answer_holds_for_its_time(
    server: BackgroundServer, reviewer: TokenReviewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_review, "ACCEPTED_S", 0.5)
    monkeypatch.setattr(token_review, "REFUSED_S", 0.5)
    right, wrong = reviewer.token("rlhf:trainer"), reviewer.token("rlhf:trainer") + "A"
    for count in (2, 4):
        ask(server, right)
        refusal(server, wrong)
        ask(server, right)
        refusal(server, wrong)
        assert reviewer.num_reviews == count
        time.sleep(0.6)


def test_an_answer_never_outlives_the_token(
    server: BackgroundServer, service: Named, reviewer: TokenReviewer
) -> None:
    end = time.time() + 2.0
    token = reviewer.token("rlhf:trainer", exp=end)
    ask(server, token)
    time.sleep(max(end - time.time(), 0) + 0.05)
    error = refusal(server, token)
    assert isinstance(error, Unauthenticated)
    assert error.reason == "EXPIRED"
    assert service.callers == [NAME]


def test_an_answer_ends_with_the_token_even_if_the_clock_of_the_pod_is_set_back() -> None:
    """The cache counts seconds from the question, whatever the wall clock does."""

    class Accepting:
        num_asked = 0

        def review(self, token: str, audience: str) -> dict[str, object]:
            self.num_asked += 1
            user = {"username": NAME}
            return {"authenticated": True, "audiences": [audience], "user": user}

    async def run() -> None:
        accepting = Accepting()
        reviews = TokenReviews(accepting, "kleash")  # type: ignore[arg-type]
        token = TokenReviewer(1).token("rlhf:trainer", ends_in_s=1.0)
        with pytest.MonkeyPatch.context() as patch:
            now = time.time()
            patch.setattr(token_review.time, "time", lambda: now)
            assert [await reviews.identify(token) for _ in range(2)] == [NAME, NAME]
            assert accepting.num_asked == 1
            await asyncio.sleep(1.1)
            await reviews.identify(token)
            assert accepting.num_asked == 2
        reviews.close()

    asyncio.run(run())


def test_the_audience_must_be_ours(server: BackgroundServer, reviewer: TokenReviewer) -> None:
    error = refusal(server, reviewer.token("rlhf:trainer", "another"))
    assert error.reason == "BAD_CREDENTIALS"
    assert "is for ['another'], not for 'kleash'" in str(error)
    assert reviewer.num_reviews == 0


def test_an_api_server_without_audiences_is_not_believed(
    server: BackgroundServer, reviewer: TokenReviewer
) -> None:
    """It says authenticated for every token of the cluster."""
    reviewer.knows_audiences = False
    error = refusal(server, reviewer.token("rlhf:trainer"))
    assert isinstance(error, Unauthenticated)
    assert "not for 'kleash'" in str(error)


def test_users_that_are_no_service_accounts_are_refused(
    server: BackgroundServer, reviewer: TokenReviewer
) -> None:
    error = refusal(server, reviewer.token(sub="jane@example.com"))
    assert isinstance(error, PermissionDenied)
    assert (error.reason, "jane@example.com" in str(error)) == ("CALLER_NOT_ALLOWED", True)


def test_an_api_server_that_is_away_lets_nobody_in(
    server: BackgroundServer,
    service: Named,
    away: TokenReviewer,
    pair: Pair,
    caplog: pytest.LogCaptureFixture,
) -> None:
    token = away.token("rlhf:trainer")
    error = refusal(server, token)
    assert isinstance(error, Unavailable)
    assert (error.reason, error.retry_after_s) == ("AUTH_UNAVAILABLE", 1.0)
    assert service.callers == []
    told = [r.getMessage() for r in caplog.records if r.name == token_review.__name__]
    assert len(told) == 1  # for five attempts of the client
    assert "Connection refused" in told[0]
    with listening(away, pair):
        ask(server, token)
    assert service.callers == [NAME]
    ask(server, token)  # what it said holds while it is away again


def test_the_client_waits_for_an_api_server_that_comes_back(
    server: BackgroundServer, service: Named, away: TokenReviewer, pair: Pair
) -> None:
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(ask, server, away.token("rlhf:trainer"))
        time.sleep(0.5)
        assert not call.done()
        with listening(away, pair):
            call.result()
    assert service.callers == [NAME]


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize(
    ("status", "sentence"),
    [(401, "system:auth-delegator"), (403, "system:auth-delegator"), (500, "HTTP 500")],
)
def test_an_api_server_that_refuses_us_is_the_operators_matter(
    server: BackgroundServer,
    reviewer: TokenReviewer,
    caplog: pytest.LogCaptureFixture,
    status: int,
    sentence: str,
) -> None:
    """The caller is told nothing of it."""
    reviewer.status = status
    error = refusal(server, reviewer.token("rlhf:trainer"))
    assert isinstance(error, Unavailable)
    assert "delegator" not in str(error)
    assert "500" not in str(error)
    assert sentence in caplog.text


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize(
    ("garbles", "sentence"),
    [
        (lambda text: text.replace("status", "state"), r"bytes of the answer are no TokenReview"),
        (lambda text: text[:-1], r"bytes of the answer are no TokenReview"),
        (lambda text: f"HTTP/1.1 OK {text}", "the answer is no HTTP: BadStatusLine"),
    ],
)
def test_no_answer_is_logged(
    server: BackgroundServer,
    reviewer: TokenReviewer,
    caplog: pytest.LogCaptureFixture,
    garbles: Callable[[str], str],
    sentence: str,
) -> None:
    """An API server repeats the request in it, and the token with that."""
    reviewer.garbles = garbles
    token = reviewer.token("rlhf:trainer")
    with caplog.at_level(logging.DEBUG, "kleash"):
        assert isinstance(refusal(server, token), Unavailable)
    assert sentence in caplog.text
    assert token[:20] not in caplog.text


@pytest.mark.usefixtures("_hasty")
def test_an_api_server_of_another_authority_is_not_asked(
    server: BackgroundServer, reviewer: TokenReviewer, tmp_path: Path
) -> None:
    (tmp_path / "ca.crt").write_bytes(Authority(tmp_path, "other").ca.read_bytes())
    assert isinstance(refusal(server, reviewer.token("rlhf:trainer")), Unavailable)
    assert reviewer.num_reviews == 0


def test_our_own_token_is_read_for_every_question(
    server: BackgroundServer, service: Named, reviewer: TokenReviewer, tmp_path: Path
) -> None:
    reviewer.own_token = "rotated"
    (tmp_path / "token").write_text("rotated\n")
    ask(server, reviewer.token("rlhf:trainer"))
    assert service.callers == [NAME]


def jwt(payload: str) -> str:
    middle = base64.urlsafe_b64encode(payload.encode()).decode().rstrip("=")
    return f"e30.{middle}.c2ln"


HOSTILE = [
    "x",
    "..",
    "a.b",
    "a.b.c.d",
    "a.!!.c",
    "kleash_abc",
    jwt("[]"),
    jwt("1"),
    jwt("null"),
    jwt('"text"'),
    jwt("{"),
    jwt('{"exp": "soon"}'),
    jwt('{"exp": null}'),
    jwt('{"exp": [1]}'),
    jwt('{"exp": 1' + "0" * 400 + "}"),
    jwt('{"aud": 5}'),
    jwt('{"aud": "kleash2"}'),
    jwt("[" * 3000),
]


@pytest.mark.parametrize("token", HOSTILE)
def test_what_is_no_token_is_refused_without_a_question(
    server: BackgroundServer, reviewer: TokenReviewer, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = refusal(server, token)
    assert isinstance(error, Unauthenticated)
    assert "failed, correlation id" not in caplog.text
    assert reviewer.num_reviews == 0


def test_a_flood_of_wrong_tokens_is_bounded_and_spares_the_right_ones(
    reviewer: TokenReviewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_review, "MAX_ANSWERS", 10)
    monkeypatch.setattr(token_review, "MAX_OPEN", 8)

    async def run() -> None:
        reviews = TokenReviews(ApiServer.of_this_pod(), "kleash")
        right = reviewer.token("rlhf:trainer")
        assert await reviews.identify(right) == NAME
        for number in range(15):
            with pytest.raises(Unauthenticated):
                await reviews.identify(reviewer.token("rlhf:trainer", n=number) + "A")
        assert len(reviews._refused._answers) == 10
        reviewer.may_answer.clear()
        tokens = [reviewer.token("rlhf:trainer", n=100 + number) for number in range(12)]
        calls = [asyncio.create_task(reviews.identify(token)) for token in tokens]
        done, waiting = await asyncio.wait(calls, timeout=0.5)
        assert {type(call.exception()) for call in done} == {Unavailable}
        assert (len(done), len(waiting)) == (4, 8)
        assert await reviews.identify(right) == NAME
        reviewer.may_answer.set()
        assert await asyncio.gather(*waiting) == [NAME] * 8
        assert reviews._open == {}
        reviews.close()

    asyncio.run(run())


@pytest.mark.parametrize("missing", ["host", "token", "ca.crt"])
def test_outside_of_a_pod_it_does_not_start(
    away: TokenReviewer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing == "host":
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    else:
        (tmp_path / missing).unlink()
    with (
        pytest.raises(ConfigError, match="needs a pod with a ServiceAccount") as caught,
        serving(auth={"mode": "service_account", "audience": "kleash"}),
    ):
        pass
    seen = (
        "KUBERNETES_SERVICE_HOST not set" if missing == "host" else f"{tmp_path / missing} missing"
    )
    assert seen in str(caught.value)
