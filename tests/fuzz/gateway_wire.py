"""A million requests to the HTTP port, without a socket: bytes into its connections, and from them.

python -m tests.fuzz.gateway_wire [--count=1000000] [--seed=1] [--folder=MODEL_FOLDER]

Everything of the port runs but the kernel: aiohttp's parser, the gateway, the checks, the tokenizer
and the queue; several connections at a time, with one to three requests behind one another, in
pieces. Requests are those of gateway.py. One connection in three ends with a request whose own
HTTP is spoiled: lengths, chunks, verbs, headers, single bytes. One in four asks a port that wants
tokens. One batch in ``REAL`` is computed by the model; the others get scores from a stand-in,
which may be NaN or infinite.

Besides what gateway.py checks: whatever was sent, nothing is written to the log as an error, and
at the end no connection and no call is left. A failure prints the connection and ends with status
1.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import io
import json
import logging
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from tests.fuzz import gateway, reward
from tests.fuzz.gateway_bytes import TOKEN, Sent, one_connection
from tests.fuzz.messages import Source, numbers_of

from kleash.reward.classifier import ClassifierModel
from kleash.reward.config import RewardConfig
from kleash.reward.model import RawScore, ScoreJob
from kleash.reward.service import RewardService
from kleash.rpc.audit import Audits
from kleash.rpc.auth import AuthConfig, Gate
from kleash.rpc.gateway import Gateway
from kleash.rpc.guard import Guards
from kleash.rpc.http_connection import Connection
from kleash.rpc.late_handlers import LateHandlers
from kleash.rpc.quota import Quotas
from kleash.rpc.server import ServerConfig

NUM_CONNECTIONS = 32
"""At a time."""
REAL = 50
SILENT_S = 0.2
"""After which a caller whose request may never have been whole leaves."""
ANSWER_S = 120.0
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"
HEAD = re.compile(rb"HTTP/1\.[01] [2-5]\d\d ")
SPOILED_ALLOWED = gateway.ALLOWED | {204, 403, 405}
"""A changed byte may be that of a verb."""


class Wire(asyncio.Transport):
    """The server's end of a connection, with nothing behind it."""

    def __init__(self, connection: Connection) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self._connection = connection
        self.received = bytearray()
        """By the caller."""
        self.ended = asyncio.Event()
        """By either side."""

    @property
    def num_answers(self) -> int:
        """Their heads are there."""
        return len(HEAD.findall(self.received))

    def write(self, data: Any) -> None:
        self.received += data

    def is_closing(self) -> bool:
        return self.ended.is_set()

    def close(self) -> None:
        if not self.ended.is_set():
            self.ended.set()
            asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


class Target:
    """Two ports of one service, the second of which wants tokens."""

    def __init__(self, ports: Mapping[bool, Gateway]) -> None:
        self._ports = ports
        self.hints: dict[str, list[Any]] = {}

    async def look(self) -> None:
        """Ask for good values of fields."""
        raw = b"GET /v1/model HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        sent = Sent([], raw, is_spoiled=False, knows_callers=False)
        received, _ = await self._exchanged(sent, lambda low, _: low)
        _, body = _read(_Received(received), "GET")
        described = json.loads(body)
        model = described["model"]
        self.hints = gateway.hints_of(
            model["name"], model["revision"], described["tokenizer_sha256"]
        )

    async def feed(self, sent: Sent, source: Source) -> list[str]:
        """What came of each request. Raises AssertionError for a fault."""
        received, is_cut = await self._exchanged(sent, source)
        found: list[str] = []
        try:
            for outcome in _outcomes(sent, received):
                found.append(outcome)
        except http.client.IncompleteRead:
            if not is_cut:
                raise
            found.append("spoiled, and left within an answer")
        return found

    async def _exchanged(self, sent: Sent, source: Source) -> tuple[bytes, bool]:
        """What came back, and whether the caller left before the server ended the connection."""
        connection = self._ports[sent.knows_callers]._server()
        assert isinstance(connection, Connection)
        wire = Wire(connection)
        connection.connection_made(wire)
        await self._send(connection, wire, sent.raw, source)
        began = time.monotonic()
        while not wire.ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SILENT_S):
                    await wire.ended.wait()
            if sent.is_spoiled and wire.num_answers >= len(sent.paths):
                break
            assert time.monotonic() < began + ANSWER_S, f"no answer within {ANSWER_S:g} s"
        is_cut = not wire.ended.is_set()
        wire.close()
        return bytes(wire.received), is_cut

    async def _send(self, connection: Connection, wire: Wire, raw: bytes, source: Source) -> None:
        cuts = sorted(source(0, len(raw)) for _ in range(source(0, 3)))
        for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            if wire.ended.is_set():
                return
            connection.data_received(raw[start:end])
            await asyncio.sleep(0)

    async def settle(self) -> None:
        """Wait for every connection and call to end. Raises TimeoutError for one that does not."""
        for port in self._ports.values():
            async with asyncio.timeout(ANSWER_S):
                while port._server.connections or port._running:  # noqa: ASYNC110
                    await asyncio.sleep(SILENT_S)


def _outcomes(sent: Sent, received: bytes) -> Iterator[str]:
    """Of the requests that are whole, and of what follows them."""
    stream = _Received(received.replace(GO_ON, b""))
    for path in sent.paths:
        status, body = _read(stream, "POST")
        if sent.is_spoiled and b"BAD_HTTP" in body:
            # aiohttp forgets whole requests that came in one piece with what is none.
            assert not stream.has_more
            break
        _check(path, status, body, gateway.ALLOWED | {401})
        yield f"{path} {status}"
    if not sent.is_spoiled:
        assert not stream.read(), "more answers than requests"
        return
    status = 0
    while stream.has_more:
        # An answer to HEAD or CONNECT may have no body: the reader must not wait for one.
        verb = "HEAD" if b"HEAD " in sent.raw else "POST"
        status, body = _read(stream, verb)
        if status != 200 and body:
            _check("", status, body, SPOILED_ALLOWED | {401})
        assert status in SPOILED_ALLOWED | {401}, status
    yield f"spoiled {status or 'no answer'}"


def _check(path: str, status: int, body: bytes, allowed: frozenset[int]) -> None:
    assert status in allowed, f"{status} {body!r}"
    if status == 200:
        gateway.check_answer(path, body)
    else:
        gateway.check_failure(json.loads(body, parse_constant=gateway.refuse))


class _Received(io.BytesIO):
    """Bytes as http.client reads them from a socket; stays open between responses."""

    def makefile(self, _mode: str) -> _Received:
        return self

    def close(self) -> None: ...

    @property
    def has_more(self) -> bool:
        return self.tell() < len(self.getbuffer())


def _read(stream: Any, verb: str) -> tuple[int, bytes]:
    response = http.client.HTTPResponse(stream, method=verb)
    response.begin()
    return response.status, response.read()


class _NoErrors(logging.Handler):
    """Remembers what should not have happened."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(logging.Formatter().format(record))

    def check(self) -> None:
        assert not self.records, "\n".join(self.records)


@contextlib.asynccontextmanager
async def target_of(folder: Path, scratch: Path) -> AsyncIterator[Target]:
    """The reward service of a model in a folder."""
    service = RewardService(RewardConfig(model=folder, limits=reward.LIMITS))
    service.load()
    handlers = LateHandlers()
    service.register(handlers.as_server())
    keys = scratch / "keys"
    keys.write_text(f"fuzzer sha256:{hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    modes = {False: AuthConfig(), True: AuthConfig(mode="token", tokens_file=keys)}
    with mock.patch.object(ClassifierModel, "compute", _stand_in(ClassifierModel.compute)):
        await service.start()
        ports = {}
        for knows_callers, auth in modes.items():
            ports[knows_callers] = _port(service, handlers, auth)
            await ports[knows_callers].start()
        target = Target(ports)
        try:
            await target.look()
            yield target
        finally:
            await service.stop()


def _port(service: RewardService, handlers: LateHandlers, auth: AuthConfig) -> Gateway:
    config = ServerConfig(auth=auth, http_port=1, http_allowed_origins=("*",))
    gate = Gate(auth)
    guards = Guards(
        service.full_names,
        gate,
        quotas=Quotas(config.quotas, trusts_claims=not gate.is_on),
        audits=Audits.of("text", knows_callers=gate.is_on),
        max_request_s=config.max_request_s,
    )
    guards.mark_loaded(service.full_names)
    return Gateway(
        [service.http_api],
        config,
        guards,
        handlers,
        is_serving=lambda name: True,
        sockets=(),
        tls=None,
    )


def _stand_in(compute: Any) -> Any:
    count = 0

    def stand_in(self: ClassifierModel, jobs: list[ScoreJob]) -> list[RawScore]:
        nonlocal count
        count += 1
        if count % REAL == 0:
            return compute(self, jobs)
        return [_score(job) for job in jobs]

    return stand_in


def _score(job: ScoreJob) -> RawScore:
    """Of the tokens alone, so that a job has one score in whatever batch."""
    source = numbers_of(random.Random(job.content.tobytes()))
    values = None
    if job.wants_token_scores:
        values = np.zeros(job.num_tokens, dtype=np.float32)
        values[source(0, job.num_tokens - 1)] = reward.odd_score(source)
    return RawScore(reward.odd_score(source), values)


async def run(target: Target, count: int, seed: int) -> Counter[str]:
    """Send ``count`` requests or a few more; each connection is a function of ``seed`` and its
    number, and what is beside it on its way is not."""
    outcomes: Counter[str] = Counter()
    errors = _NoErrors()
    root = logging.getLogger()
    root.addHandler(errors)
    began, numbers, told = time.monotonic(), iter(range(1 << 40)), 0

    async def feed_on() -> None:
        nonlocal told
        while outcomes.total() < count:
            number = next(numbers)
            source = numbers_of(random.Random((seed << 40) + number))
            sent = one_connection(source, target.hints)
            try:
                outcomes.update(await target.feed(sent, source))
                errors.check()
            except Exception as error:
                print(f"{error!r}: connection {number} of seed {seed}: {sent}", file=sys.stderr)
                raise
            if outcomes.total() // 50_000 > told:
                told = outcomes.total() // 50_000
                rate = outcomes.total() / (time.monotonic() - began)
                print(f"{outcomes.total()} requests, {rate:.0f}/s", file=sys.stderr, flush=True)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_CONNECTIONS):
                group.create_task(feed_on())
        await target.settle()
        errors.check()
    finally:
        root.removeHandler(errors)
    return outcomes


async def fuzz(folder: Path, count: int, seed: int, scratch: Path) -> Counter[str]:
    """Load, and run."""
    asyncio.get_running_loop().set_exception_handler(
        lambda _loop, context: logging.getLogger("asyncio").error("%s", context)
    )
    audit = logging.getLogger("kleash.audit")
    audit.setLevel(logging.INFO)  # its lines are written, too
    try:
        async with target_of(folder, scratch) as target:
            return await run(target, count, seed)
    finally:
        audit.setLevel(logging.NOTSET)


def main(arguments: list[str]) -> None:
    """See the module's text."""
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    count, seed = int(options.pop("count", 1_000_000)), int(options.pop("seed", 1))
    folder = options.pop("folder", "")
    assert not options, f"no option {', '.join(options)}"
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if not folder:
            reward.tiny_target(scratch)
            folder = f"{scratch}/reward"
        outcomes = asyncio.run(fuzz(Path(folder), count, seed, scratch))
    for outcome, times in sorted(outcomes.items()):
        print(f"{times:9d}  {outcome}")
    print(f"{outcomes.total():9d}  requests, no fault")


if __name__ == "__main__":
    main(sys.argv[1:])
