"""Callers by their Kubernetes ServiceAccount tokens, which the API server reviews.

call ─► refused here?  ─► asked before?   ─► asked right now? ─► POST TokenReview in a thread
        no JWT, ended,    yes 60 s, no 5 s   one question a      accepted | refused | no answer:
        other audience                       token               UNAVAILABLE, never a pass
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import json
import logging
import os
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleash.base import metrics
from kleash.base.api_server_tls import api_server_context
from kleash.base.errors import ConfigError
from kleash.rpc.errors import PermissionDenied, ServiceError, Unauthenticated, Unavailable

logger = logging.getLogger(__name__)

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts a pod's own token and the API server's authority."""
PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
NAME_PREFIX = "system:serviceaccount:"

ACCEPTED_S, REFUSED_S = 60.0, 5.0
"""How long an answer holds; an accepted one never past the token's end."""
MAX_ANSWERS = 1024
"""Of either kind; a flood of wrong tokens does not push out the right ones."""
ANSWER_LIMIT_S = 5.0
"""Time for the API server to answer."""
NUM_THREADS, MAX_OPEN = 4, 64
"""Questions to the API server at a time, and those under way or waiting in all."""
RETRY_S = 1.0


class _NoAnswerError(Exception):
    """The API server did not say yes or no; the log is told why, the caller is not."""


@dataclass(frozen=True)
class ApiServer:
    """How a pod reaches the API server with its own ServiceAccount."""

    host: str
    port: int
    token_file: Path
    ca_file: Path

    @classmethod
    def of_this_pod(cls) -> ApiServer:
        """Raises ConfigError outside of a cluster."""
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        token_file, ca_file = SERVICE_ACCOUNT / "token", SERVICE_ACCOUNT / "ca.crt"
        missing = [str(path) for path in (token_file, ca_file) if not path.is_file()]
        if not host or missing:
            seen = f"{' and '.join(missing)} missing" if host else "KUBERNETES_SERVICE_HOST not set"
            raise ConfigError(
                f"server.auth.mode=service_account needs a pod with a ServiceAccount ({seen}); "
                "set automountServiceAccountToken: true on it, or choose another mode."
            )
        return cls(host, int(port), token_file, ca_file)

    def review(self, token: str, audience: str) -> dict[str, Any]:
        """The status of a TokenReview. Blocks. Raises _NoAnswerError."""
        spec = {"token": token, "audiences": [audience]}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        try:
            # Both files rotate: they are read for every question.
            own_token = self.token_file.read_text(encoding="ascii").strip()
            context = api_server_context(self.ca_file)
            connection = http.client.HTTPSConnection(
                self.host, self.port, timeout=ANSWER_LIMIT_S, context=context
            )
            try:
                headers = {
                    "Authorization": f"Bearer {own_token}",
                    "Content-Type": "application/json",
                    "Accept": "application/json",
                }
                connection.request("POST", PATH, json.dumps(body), headers)
                answer = connection.getresponse()
                text = answer.read()
            finally:
                connection.close()
        except OSError as error:
            raise _NoAnswerError(f"{type(error).__name__}: {error}") from None
        except http.client.HTTPException as error:  # its text may quote the answer
            raise _NoAnswerError(f"the answer is no HTTP: {type(error).__name__}") from None
        return _status_of(answer.status, text)


def _status_of(code: int, text: bytes) -> dict[str, Any]:
    """Raises _NoAnswerError, without a word of the answer, which may repeat the token."""
    if code in (401, 403):
        raise _NoAnswerError(
            f"HTTP {code}: this pod's ServiceAccount may not create tokenreviews; bind it to the "
            "ClusterRole system:auth-delegator"
        )
    if code not in (200, 201):
        raise _NoAnswerError(f"HTTP {code} with {len(text)} bytes")
    try:
        status = json.loads(text)["status"]
    except (ValueError, KeyError, TypeError):
        status = None
    if not isinstance(status, dict):
        raise _NoAnswerError(f"the {len(text)} bytes of the answer are no TokenReview")
    return status


class TokenReviews:
    """Knows callers as the API server does: "system:serviceaccount:NAMESPACE:NAME"."""

    def __init__(self, server: ApiServer, audience: str) -> None:
        self._server = server
        self._audience = audience
        self._accepted = _Answers()
        self._refused = _Answers()
        self._open: dict[bytes, asyncio.Task[str]] = {}
        self._threads = ThreadPoolExecutor(NUM_THREADS, "kleash-token-review")
        self._complaint = ""

    async def identify(self, token: str) -> str:
        """Name of the holder. Raises Unauthenticated, PermissionDenied, Unavailable."""
        ends_in_s = self._look(token)
        digest = hashlib.sha256(token.encode()).digest()
        if (known := self._accepted.get(digest)) is not None:
            return known
        if (refusal := self._refused.get(digest)) is not None:
            raise refusal.with_traceback(None)  # or it would grow with every call
        question = self._open.get(digest)
        if question is None:
            if len(self._open) >= MAX_OPEN:
                raise _unavailable()
            question = asyncio.create_task(self._ask(digest, token, ends_in_s))
            self._open[digest] = question
            question.add_done_callback(lambda done: self._forget(digest, done))
        # A caller that leaves does not end the question of those who ask the same.
        return await asyncio.shield(question)

    def close(self) -> None:
        """Answer nobody any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _look(self, token: str) -> float:
        """Seconds until the token ends, by itself. Raises Unauthenticated; accepts nothing."""
        claims = _claims(token)
        ends_in_s = claims.end - time.time()
        if ends_in_s <= 0:
            raise Unauthenticated(
                f"the ServiceAccount token ended {-ends_in_s:.0f} s ago; read it anew from its "
                "projected file, as KLEASH_TOKEN_FILE does.",
                reason="EXPIRED",
            )
        if claims.audiences is not None and self._audience not in claims.audiences:
            raise self._wrong_audience(claims.audiences)
        return ends_in_s

    async def _ask(self, digest: bytes, token: str, ends_in_s: float) -> str:
        loop = asyncio.get_running_loop()
        asked_at = time.monotonic()
        try:
            status = await loop.run_in_executor(
                self._threads, self._server.review, token, self._audience
            )
        except _NoAnswerError as error:
            metrics.TOKEN_REVIEWS.labels("failed").inc()
            if str(error) != self._complaint:  # an API server that is away is told once
                logger.error("the API server does not review tokens: %s", error)
            self._complaint = str(error)
            raise _unavailable() from None
        self._complaint = ""
        try:
            name = self._name(status)
        except ServiceError as refusal:
            metrics.TOKEN_REVIEWS.labels("refused").inc()
            self._refused.put(digest, refusal, time.monotonic() + REFUSED_S)
            raise
        metrics.TOKEN_REVIEWS.labels("accepted").inc()
        self._accepted.put(digest, name, asked_at + min(ACCEPTED_S, ends_in_s))
        return name

    def _name(self, status: dict[str, Any]) -> str:
        """Who the API server says it is. Raises Unauthenticated, PermissionDenied."""
        if status.get("authenticated") is not True:
            raise Unauthenticated(
                "the API server does not accept the token; send the one of a projected volume "
                f"with audience '{self._audience}', whose pod and ServiceAccount still exist.",
                reason="BAD_CREDENTIALS",
            )
        # Without this an API server that knows no audiences would let every token of it pass.
        if self._audience not in (status.get("audiences") or ()):
            raise self._wrong_audience(status.get("audiences") or [])
        name = str((status.get("user") or {}).get("username", ""))
        if not name.startswith(NAME_PREFIX):
            raise PermissionDenied(
                f"'{name}' is not a ServiceAccount; call with the token of one.",
                reason="CALLER_NOT_ALLOWED",
            )
        return name

    def _wrong_audience(self, seen: object) -> Unauthenticated:
        return Unauthenticated(
            f"the token is for {seen}, not for '{self._audience}'; project one with that audience "
            "into the caller's pod.",
            reason="BAD_CREDENTIALS",
        )

    def _forget(self, digest: bytes, question: asyncio.Task[str]) -> None:
        del self._open[digest]
        if not question.cancelled():
            question.exception()  # seen, when nobody waits for it any more


class _Answers:
    """At most MAX_ANSWERS by digest, each until its time; the oldest go first."""

    def __init__(self) -> None:
        self._answers: OrderedDict[bytes, tuple[Any, float]] = OrderedDict()

    def get(self, digest: bytes) -> Any:
        answer, end = self._answers.get(digest, (None, 0.0))
        if answer is None or end > time.monotonic():
            return answer
        del self._answers[digest]
        return None

    def put(self, digest: bytes, answer: object, end: float) -> None:
        self._answers[digest] = (answer, end)
        self._answers.move_to_end(digest)
        while len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)


@dataclass(frozen=True)
class _Claims:
    """What a JWT says about itself, unverified."""

    end: float
    """Unix time; infinite when it names none."""
    audiences: list[Any] | None


def _claims(token: str) -> _Claims:
    """Raises Unauthenticated for what is no JWT."""
    try:
        _, payload, _ = token.split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        audiences = claims.get("aud")
        return _Claims(
            end=float(claims.get("exp", "inf")),
            audiences=[audiences] if isinstance(audiences, str) else audiences and [*audiences],
        )
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise Unauthenticated(
            "the token is not one of a Kubernetes ServiceAccount; send the one that is projected "
            "into the caller's pod (KLEASH_TOKEN_FILE).",
            reason="BAD_CREDENTIALS",
        ) from None


def _unavailable() -> Unavailable:
    return Unavailable(
        "this server cannot check tokens now, as the Kubernetes API server does not answer it; "
        "try again.",
        reason="AUTH_UNAVAILABLE",
        retry_after_s=RETRY_S,
    )
