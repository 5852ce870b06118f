"""What a connection to the HTTP port carries: requests of gateway.py, and at times spoiled HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.fuzz import gateway
from tests.fuzz.messages import Source, spoiled

TOKEN = "of-the-fuzzer"
VERBS = (
    b"GET",
    b"HEAD",
    b"OPTIONS",
    b"PUT",
    b"DELETE",
    b"CONNECT",
    b"TRACE",
    b"post",
    b"P\xc3",
    b"",
)
LINES = (
    b"Content-Length: 0",
    b"Content-Length: +5",
    b"Content-Length: 99999999999999999999",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding: identity",
    b"Connection: upgrade\r\nUpgrade: h2c",
    b"Connection: upgrade\r\nUpgrade: websocket",
    b"Connection: close",
    b"Expect: 100-continue",
    b"Expect: 200-maybe",
    b"Host: a\r\nHost: b",
    b"Origin: \xff\xfe",
    b"Access-Control-Request-Method: POST",
    b"User-Agent: \xff/1 \x80",
    b"Content-Type: \xe2\x80\xa8",
    b"Content-Encoding: identity\r\nContent-Encoding: gzip",
    b"X: " + b"y" * 9000,
    b" folded",
    b"no colon",
    b": no name",
    b"X\0: y",
    b"Authorization: Bearer \xff",
    b"Authorization: Basic x\r\nAuthorization: Bearer y",
    b"Authorization: Bearer " + TOKEN.encode(),
)
TARGETS = (
    b"/v1/%73core",
    b"/v1/score?\xff",
    b"/v1/score?model=%ed%a0%80",
    b"http://[::1/v1/score",
    b"http://x:99999/v1/model",
    b"//v1/models",
    b"*",
    b"x",
    b"/docs#\r",
    b"/" + b"a" * 9000,
)


class Sent(NamedTuple):
    """What one connection carries."""

    paths: list[str]
    """Of the requests that are whole."""
    raw: bytes
    is_spoiled: bool
    """Whether another request follows these, which may be none."""
    knows_callers: bool


def one_connection(source: Source, hints: Any) -> Sent:
    """One to three requests."""
    knows_callers = source(0, 3) == 0
    inputs = [gateway.one_input(source, hints) for _ in range(source(1, 3))]
    is_spoiled = source(0, 2) == 0
    parts, last = [], len(inputs) - 1
    for place, its in enumerate(inputs):
        headers = dict(its.headers)
        if knows_callers and source(0, 7):
            headers.setdefault("Authorization", f"Bearer {TOKEN}")
        if place == last:
            headers["Connection"] = "close"
        raw = _request(its.path.partition("#")[0], its.body, headers, chunks=source(0, 3) == 0)
        parts.append(_with_bad_http(raw, source) if is_spoiled and place == last else raw)
    paths = [its.path.partition("?")[0] for its in inputs[: last + 1 - is_spoiled]]
    return Sent(paths, b"".join(parts), is_spoiled, knows_callers)


def _request(target: str, body: bytes, headers: Mapping[str, str], *, chunks: bool) -> bytes:
    lines = [f"POST {target} HTTP/1.1".encode(), b"Host: localhost"]
    lines += [f"{name}: {value}".encode("latin-1") for name, value in headers.items()]
    if chunks:
        lines.append(b"Transfer-Encoding: chunked")
        half = len(body) // 2
        parts = [part for part in (body[:half], body[half:]) if part]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    else:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _with_bad_http(raw: bytes, source: Source) -> bytes:
    head, _, body = raw.partition(b"\r\n\r\n")
    match source(0, 6):
        case 0:
            verb = VERBS[source(0, len(VERBS) - 1)]
            return verb + raw[len(b"POST") :]
        case 1:
            lines = head.split(b"\r\n")
            lines.insert(source(1, len(lines)), LINES[source(0, len(LINES) - 1)])
            return b"\r\n".join(lines) + b"\r\n\r\n" + body
        case 2:
            target = TARGETS[source(0, len(TARGETS) - 1)]
            return b"POST " + target + head[head.index(b" HTTP/") :] + b"\r\n\r\n" + body
        case 3:
            return spoiled(head, source) + b"\r\n\r\n" + body
        case 4:
            return head + b"\r\n\r\n" + spoiled(body, source)
        case 5:
            return raw.replace(
                b"HTTP/1.1", (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9")[source(0, 2)], 1
            )
        case _:
            return raw[: source(0, len(raw))]
