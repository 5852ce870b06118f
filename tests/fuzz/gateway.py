"""A million requests to the HTTP port of a reward service, in this process.

python -m tests.fuzz.gateway [--count=1000000] [--seed=1] [--folder=MODEL_FOLDER]

Bodies are messages as messages.py makes them, in JSON: whole, with values put in that do not belong
there, or with spoiled bytes; some headers and addresses are odd, too. Every answer must be JSON, of
a status that the OpenAPI document names, finite and without a trace. A failure prints the request
and ends with status 1. gateway_wire.py sends them without sockets, many times faster, and spoils
HTTP itself, too; test_reward_gateway.py lets schemathesis choose requests by the document.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import json_format
from tests.fuzz import reward
from tests.fuzz.messages import Source, build, numbers_of, spoiled
from tests.fuzz.verdict import check_error, check_response, check_sentence
from tests.services.doubler import free_port

from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.server import BackgroundServer, ServerConfig

TIMEOUT_S = 60.0
ALLOWED = frozenset((200, 400, 404, 413, 415, 429, 504))
PATHS: dict[str, tuple[Any, Any]] = {
    "/v1/score": (reward_pb2.ScoreRequest, reward_pb2.ScoreResponse),
    "/v1/score_stream": (reward_pb2.ScoreStreamRequest, reward_pb2.ScoreStreamResponse),
    "/v1/compare": (reward_pb2.CompareRequest, reward_pb2.CompareResponse),
    "/v1/count_tokens": (reward_pb2.CountTokensRequest, reward_pb2.CountTokensResponse),
    "/get_reward": (None, None),
}
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**32,
    2**70,
    0.5,
    float("nan"),
    float("-inf"),
    "",
    "\ud800",
    "\0{{ x }}",
    "NaN",
    [],
    [[[]]],
    {},
    {"text": {"text": 1}},
    {"__proto__": 1},
)
ODD_HEADERS = (
    ("Content-Type", "text/plain"),
    ("Content-Type", "application/json; charset=utf-16"),
    ("Content-Encoding", "gzip"),
    ("X-Request-Timeout-S", "1e9"),
    ("X-Request-Timeout-S", "30"),
    ("Grpc-Timeout", "99999999H"),
    ("Grpc-Timeout", "x"),
    ("Authorization", "Bearer \xff"),
    ("Origin", "null"),
    ("Expect", "100-continue"),
    ("Accept", "text/html"),
)
ODD_QUERIES = (
    "?model=",
    "?model=x&model=y",
    "?%ff=%00",
    "?truncation=left",
    "?a[]=1#b",
    "?normalize",
)


class Input(NamedTuple):
    """One request."""

    path: str
    body: bytes
    headers: dict[str, str]


def one_input(source: Source, hints: Any) -> Input:
    """A request: one in three whole."""
    path = list(PATHS)[source(0, len(PATHS) - 1)]
    value = _body(path, source, hints)
    kind = source(0, 2)
    if kind == 1:
        for _ in range(source(1, 3)):
            value = _with_odd_value(value, source)
    raw = json.dumps(value, ensure_ascii=bool(source(0, 1))).encode("utf-8", "surrogatepass")
    if kind == 2:
        raw = spoiled(raw, source)
    lines = path == "/v1/score_stream"
    headers = {"Content-Type": "application/x-ndjson" if lines else "application/json"}
    if source(0, 15) == 0:
        name, given = ODD_HEADERS[source(0, len(ODD_HEADERS) - 1)]
        headers[name] = given
    if source(0, 15) == 0:
        path += ODD_QUERIES[source(0, len(ODD_QUERIES) - 1)]
    return Input(path, raw * source(1, 3) if lines and source(0, 1) else raw, headers)


def _body(path: str, source: Source, hints: Any) -> Any:
    if path == "/get_reward":
        items = build(reward_pb2.ScoreRequest, source, hints).items
        texts = [item.text for item in items]
        return {"query": texts, "prompts": texts, "labels": [None] * len(texts)}
    message = build(PATHS[path][0], source, hints)
    return json_format.MessageToDict(message, preserving_proto_field_name=bool(source(0, 1)))


def _with_odd_value(value: Any, source: Source) -> Any:
    """``value`` with something else somewhere in it."""
    if source(0, 3) == 0 or not isinstance(value, (dict, list)) or not value:
        odd = ODD_VALUES[source(0, len(ODD_VALUES) - 1)]
        if isinstance(value, dict) and source(0, 1):
            return {**value, ("x", "itemId", "\ud800", "options")[source(0, 3)]: odd}
        return odd
    if isinstance(value, list):
        place = source(0, len(value) - 1)
        return [
            _with_odd_value(its, source) if index == place else its
            for index, its in enumerate(value)
        ]
    chosen = list(value)[source(0, len(value) - 1)]
    return {
        name: _with_odd_value(its, source) if name == chosen else its for name, its in value.items()
    }


def hints_of(name: str, revision: str, tokenizer_sha256: str) -> dict[str, list[Any]]:
    """Good values of fields, for a model."""
    return {
        "tokenizer_sha256": [tokenizer_sha256],
        "model": [name, ""],
        "revision": ["", revision],
        "role": ["user", "assistant", "system"],
        "response_start": [0, 1, 5],
        "truncation": [0, 1, 2, 3],
    }


class Target:
    """A port, and good values of fields."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        described = json.loads(self._ask("GET", "/v1/model", None, {})[1])
        model = described["model"]
        self.hints = hints_of(model["name"], model["revision"], described["tokenizer_sha256"])

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def feed(self, its: Input) -> str:
        """What came of a request: path and status. Raises AssertionError for a fault."""
        status, body = self._ask("POST", its.path, its.body, its.headers)
        path = its.path.partition("?")[0]
        assert status in ALLOWED, f"{status} {body!r}"
        if status == 200:
            check_answer(path, body)
        else:
            check_failure(json.loads(body, parse_constant=refuse))
        return f"{path} {status}"

    def _ask(
        self, verb: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        try:
            self._connection.request(verb, path, body, headers)
            response = self._connection.getresponse()
            return response.status, response.read()
        except (http.client.HTTPException, OSError):
            self._connection.close()
            raise


def check_failure(body: dict[str, Any]) -> None:
    """An error is a clear one, and nobody's but the caller's."""
    told = body["error"]
    assert told.keys() >= {"code", "message", "field", "reason"}
    assert told["code"] not in ("INTERNAL", "UNKNOWN")
    check_error(InvalidRequest(told["message"]))


def check_answer(path: str, body: bytes) -> None:
    """An answer is of its type, finite, and has scores where it says so."""
    make = PATHS[path][1]
    if path == "/get_reward":
        value = json.loads(body, parse_constant=refuse)
        assert len(value["rewards"]) == len(value["scores"])
        assert all(isinstance(reward, float) for reward in value["rewards"])
        return
    for line in body.split(b"\n") if path == "/v1/score_stream" else [body]:
        if not line:
            continue
        value = json.loads(line, parse_constant=refuse)
        if "error" in value:
            check_sentence(value["error"]["message"])
            assert path == "/v1/score_stream"
        else:
            check_response(json_format.ParseDict(value, make()))


def refuse(name: str) -> None:
    """Of a constant that is not JSON."""
    raise AssertionError(f"the body holds {name}")


def run(target: Target, count: int, seed: int) -> Counter[str]:
    """Send ``count`` requests; each is a function of ``seed`` and its number."""
    outcomes: Counter[str] = Counter()
    began = time.monotonic()
    for number in range(count):
        its = one_input(numbers_of(random.Random((seed << 40) + number)), target.hints)
        try:
            outcomes[target.feed(its)] += 1
        except BaseException:
            print(f"request {number} of seed {seed}: {its}", file=sys.stderr)
            raise
        if (number + 1) % 50_000 == 0:
            rate = (number + 1) / (time.monotonic() - began)
            print(f"{number + 1} requests, {rate:.0f}/s", file=sys.stderr, flush=True)
    return outcomes


def main(arguments: list[str]) -> None:
    """Run as the module's docstring says."""
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    count, seed = int(options.pop("count", 1_000_000)), int(options.pop("seed", 1))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.pop("folder", "")
        assert not options, f"no option {', '.join(options)}"
        if not folder:
            reward.tiny_target(Path(scratch))
            folder = f"{scratch}/reward"
        config = RewardConfig(model=Path(folder), limits=reward.LIMITS)
        port = free_port()
        with (
            BackgroundServer([RewardService(config)], ServerConfig(http_port=port)),
            contextlib.closing(Target(port)) as target,
        ):
            outcomes = run(target, count, seed)
    for outcome, times in sorted(outcomes.items()):
        print(f"{times:9d}  {outcome}")


if __name__ == "__main__":
    main(sys.argv[1:])
