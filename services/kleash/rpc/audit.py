"""A line in the log for every call: logger ``kleash.audit``, level INFO.

    caller=trainer peer=ipv4:10.0.0.7:40312 method=kleash.reward.v1.RewardService/Score status=OK
    reason=- model=rm revision=sha256:... items=64 tokens=18230 ms=412.7

Names, counts, times and status; the peer of a call over HTTP begins with "http:". What a request
holds is never there, unless ``server.audit`` is "text": then a line with ``request=`` comes before
it. Values that come from outside and are more than one plain word are JSON strings in ASCII, so
that nobody writes a line of somebody else's.
"""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

AuditMode = Literal["auto", "off", "calls", "text"]

logger = logging.getLogger("kleash.audit")

# Of one value, after which it is cut.
MAX_NAME, MAX_TEXT = 256, 1_000_000
_PLAIN = re.compile(r"""[!#-<>-\[\]-~]+""")  # no space, quote, equals sign, backslash


@dataclass(frozen=True)
class Audits:
    """What is written."""

    calls: bool
    """A line for each call."""
    text: bool
    """And what its request holds."""

    @classmethod
    def of(cls, mode: AuditMode, *, knows_callers: bool) -> Audits:
        """As ``server.audit`` says; ``knows_callers``: the server asks who calls."""
        return cls(mode in ("calls", "text") or (mode == "auto" and knows_callers), mode == "text")


@dataclass
class Facts:
    """What the handler of a call tells about it."""

    model: str = ""
    revision: str = ""
    num_items: int | None = None
    """In the request, good and bad ones; None where a call has none."""
    num_tokens: int | None = None
    """As the model computes them, of Generate those generated; None before there are any."""


_facts: ContextVar[Facts | None] = ContextVar("kleash_audit", default=None)


def expect() -> Facts:
    """Collect the facts of the call that begins in this task."""
    facts = Facts()
    _facts.set(facts)
    return facts


def note(
    *, model: str = "", revision: str = "", num_items: int | None = None, num_tokens: int = 0
) -> None:
    """Tell a fact of the call being handled. Items and tokens add up, for streams."""
    facts = _facts.get()
    if facts is None:
        return
    facts.model, facts.revision = model or facts.model, revision or facts.revision
    if num_items is not None:
        facts.num_items = (facts.num_items or 0) + num_items
    if num_tokens:
        facts.num_tokens = (facts.num_tokens or 0) + num_tokens


def record(
    *,
    caller: str,
    peer: str,
    method: str,
    code: grpc.StatusCode,
    reason: str,
    seconds: float,
    facts: Facts | None = None,
) -> None:
    """Write the line of a call that has ended; ``reason`` is that of its error, if any."""
    facts = facts or Facts()
    logger.info(
        "caller=%s peer=%s method=%s status=%s reason=%s model=%s revision=%s items=%s tokens=%s "
        "ms=%.1f",
        word(caller),
        word(peer),
        word(method),
        code.name,
        word(reason),
        word(facts.model),
        word(facts.revision),
        _count(facts.num_items),
        _count(facts.num_tokens),
        1e3 * seconds,
    )


def record_text(*, caller: str, method: str, request: Message) -> None:
    """Write what a request holds, as JSON on one line."""
    text = json_format.MessageToJson(request, indent=None, ensure_ascii=True)
    cut = "" if len(text) <= MAX_TEXT else f"... ({len(text)} letters)"
    logger.info("caller=%s method=%s request=%s%s", word(caller), method, text[:MAX_TEXT], cut)


def word(value: str) -> str:
    """``value`` as one word of a line: as it is, as a JSON string, or "-" when empty."""
    if not value:
        return "-"
    value = value if len(value) <= MAX_NAME else value[:MAX_NAME] + "..."
    return value if value != "-" and _PLAIN.fullmatch(value) else json.dumps(value)


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)
