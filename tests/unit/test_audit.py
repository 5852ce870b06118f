"""Lines of the audit log: what they say, and that nobody writes one of somebody else's."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kleash.reward.v1 import reward_pb2
from kleash.rpc import audit

pytestmark = pytest.mark.unit


def test_a_line_says_who_what_and_how_long(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="kleash.audit")
    facts = audit.expect()
    audit.note(model="rm", num_items=2)
    audit.note(revision="sha256:ab", num_items=1, num_tokens=40)
    audit.record(
        caller="trainer",
        peer="ipv4:10.0.0.1:5",
        method="S/M",
        code=grpc.StatusCode.OK,
        reason="",
        seconds=0.0125,
        facts=facts,
    )
    assert caplog.messages == [
        "caller=trainer peer=ipv4:10.0.0.1:5 method=S/M status=OK reason=- model=rm "
        "revision=sha256:ab items=3 tokens=40 ms=12.5"
    ]


@given(st.text())
def test_a_value_is_one_word(value: str) -> None:
    word = audit.word(value)
    assert word.isascii()
    assert word.isprintable()
    assert word
    if not word.startswith('"'):
        assert word == (value or "-")
        assert not set(word) & set(' ="\\')


def test_a_name_cannot_forge_a_line() -> None:
    assert audit.word("a\ncaller=root status=OK") == '"a\\ncaller=root status=OK"'
    assert audit.word("-") == '"-"'
    assert len(audit.word("x" * 10**6)) < 300


def test_the_text_of_a_request_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="kleash.audit")
    request = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(text="a\nb\u2028c")])
    audit.record_text(caller="x", method="S/M", request=request)
    assert caplog.messages == ['caller=x method=S/M request={"items": [{"text": "a\\nb\\u2028c"}]}']


def test_what_is_written_when() -> None:
    of = audit.Audits.of
    assert of("auto", knows_callers=True) == audit.Audits(calls=True, text=False)
    assert of("auto", knows_callers=False) == audit.Audits(calls=False, text=False)
    assert of("calls", knows_callers=False) == audit.Audits(calls=True, text=False)
    assert of("text", knows_callers=False) == audit.Audits(calls=True, text=True)
    assert of("off", knows_callers=True) == audit.Audits(calls=False, text=False)
