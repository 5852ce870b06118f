"""A Python function as a reward model: what it is given, what it may return, how it may fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.unit.reward_functions import Load, loading, scores, wait_for

from kleash.base.errors import ConfigError
from kleash.lm.load import load_tokenizer
from kleash.lm.sequences import TokenSequence
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import PreconditionFailed

pytestmark = pytest.mark.unit

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "What is 3 plus 4?"},
    {"role": "assistant", "content": "7"},
]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    with loading(tmp_path) as load:
        yield load


def test_a_function_scores_texts_in_order(load: Load) -> None:
    local = load("def score(items): return [len(item['text']) for item in items]")
    assert scores(local, "a", "bbb", "cc") == [1.0, 3.0, 2.0]
    facts = local.get_model()
    assert facts.kind == reward_pb2.MODEL_KIND_FUNCTION
    assert (facts.model.name, facts.dtype, facts.tokenizer_sha256) == ("score", "", "")
    assert not facts.supports_token_scores


def test_it_is_given_the_conversation_its_prompt_and_its_response(load: Load) -> None:
    local = load(
        """
        EXPECTED = {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "What is 3 plus 4?"},
                {"role": "assistant", "content": "7"},
            ],
            "prompt": "What is 3 plus 4?",
            "response": "7",
        }
        def score(items):
            return [1.0 if item == EXPECTED else -len(item["response"]) for item in items]
        """
    )
    got = local.score_conversations([TALK, TALK[:2]])
    assert [each.score for each in got] == [1.0, 0.0]
    assert got[0].token_count == 0


def test_token_ids_are_decoded_and_counted(load: Load, tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    prompt = tokenizer("<|user|>3 plus 4?<|assistant|>", add_special_tokens=False)["input_ids"]
    answer = tokenizer("It is 7.<|end|>", add_special_tokens=False)["input_ids"]
    local = load(
        """
        EXPECTED = {
            "text": "<|user|>3 plus 4?<|assistant|>It is 7.<|end|>",
            "prompt": "<|user|>3 plus 4?<|assistant|>",
            "response": "It is 7.",
        }
        def score(items):
            return [float(item == EXPECTED) for item in items]
        """,
        tokenizer=tiny_folder,
    )
    ids = np.array([*prompt, *answer], dtype=np.int32)
    digest = local.get_model().tokenizer_sha256
    [score] = local.score_tokens([TokenSequence(ids, len(prompt))], tokenizer_sha256=digest)
    assert (score.score, score.token_count) == (1.0, len(ids))
    assert local.count_tokens(["It is 7.<|end|>", TALK]) == [
        len(answer),
        sum(
            len(tokenizer(turn["content"], add_special_tokens=False)["input_ids"]) for turn in TALK
        ),
    ]
    outside = TokenSequence(np.array([5, len(tokenizer)], dtype=np.int32), 1)
    [failed] = local.score_tokens([outside], tokenizer_sha256=digest, raise_on_item_error=False)
    assert failed.code == "INVALID_INPUT"


def test_without_a_tokenizer_there_are_no_ids_and_no_counts(load: Load) -> None:
    local = load("def score(items): return [0.0] * len(items)")
    with pytest.raises(PreconditionFailed, match="without a tokenizer; send text") as caught:
        local.score_tokens(
            [TokenSequence(np.array([5], dtype=np.int32), 0)], tokenizer_sha256="0" * 64
        )
    assert caught.value.reason == "NO_TOKENIZER"
    with pytest.raises(PreconditionFailed, match="counts no tokens"):
        local.count_tokens(["a"])


def test_a_long_input_has_a_status_and_is_never_cut(load: Load) -> None:
    local = load(
        "def score(items): return [len(item['text']) for item in items]",
        limits={"max_item_tokens": 2},
    )
    got = local.score_texts(["a" * 8, "a" * 9], truncation="left", raise_on_item_error=False)
    assert [(each.code, each.value) for each in got] == [("OK", 8.0), ("INPUT_TOO_LONG", 0.0)]
    assert "the inputs of a function are not truncated" in got[1].error_message


def test_numbers_by_name_are_summed_with_the_heads_weights(load: Load) -> None:
    local = load(
        "def score(items): return [{'short': -len(i['text']), 'polite': 2} for i in items]",
        heads={"polite": 10.0, "short": 0.5},
    )
    [score] = local.score_texts(["abcd"])
    assert score.score == pytest.approx(18.0)
    assert score.components == {"polite": 2.0, "short": -4.0}
    assert [(c.name, c.weight) for c in local.get_model().components] == [
        ("polite", 10.0),
        ("short", 0.5),
    ]


@pytest.mark.parametrize(
    ("returned", "heads", "cause"),
    [
        ("'good'", {}, "returned str where a number is due"),
        ("None", {}, "returned NoneType where a number is due"),
        ("{'kind': 1}", {}, "the function returned the parts kind, and its heads names none"),
        ("1.0", {"kind": 1.0}, "the function returned a number, and its heads are kind"),
        ("{'brief': 1}", {"kind": 1.0}, "returned the parts brief, and its heads are kind"),
        ("ValueError('no answer')", {}, "ValueError: no answer"),
    ],
)
def test_an_item_without_a_number_fails_alone(
    load: Load, returned: str, heads: dict[str, float], cause: str
) -> None:
    good = "{'kind': 3.0}" if heads else "3.0"
    local = load(
        f"def score(items): return [{good} if i['text'] == 'ok' else {returned} for i in items]",
        heads=heads,
    )
    bad, ok = local.score_texts(["bad", "ok"], raise_on_item_error=False)
    assert (bad.code, ok.code, ok.value) == ("FAILED", "OK", 3.0)
    assert cause in bad.error_message


def test_numpy_numbers_and_booleans_are_numbers_and_nan_never_leaves(load: Load) -> None:
    local = load(
        """
        import math
        class Half:
            def __float__(self): return 0.5
        def score(items):
            return [True, Half(), math.nan, math.inf, 10**400]
        """
    )
    got = local.score_texts(["a"] * 5, raise_on_item_error=False)
    assert [each.code for each in got] == ["OK", "OK", "NON_FINITE", "NON_FINITE", "FAILED"]
    assert [each.value for each in got[:2]] == [1.0, 0.5]


def test_an_item_that_raises_fails_alone(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    local = load("def score(items): return [1 / (len(i['text']) - 1) for i in items]")
    with caplog.at_level(logging.INFO):
        got = local.score_texts(["abc", "a", "ab"], raise_on_item_error=False)
        wait_for(lambda: "Traceback" in caplog.text)
    assert [each.code for each in got] == ["OK", "FAILED", "OK"]
    assert [each.value for each in got] == [0.5, 0.0, 1.0]
    assert got[1].error_message == "the function failed: ZeroDivisionError: division by zero."
    assert "Traceback" not in got[1].error_message


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("def score(items): return [1.0]", "returned 1 results for 2 items"),
        ("def score(items): return {'a': 1}", "returned dict and not a list of"),
        ("def score(items): return None", "object of type 'NoneType' has no len"),
    ],
)
def test_a_return_of_another_shape_fails_the_items(load: Load, source: str, cause: str) -> None:
    got = load(source).score_texts(["a", "b"], raise_on_item_error=False)
    if "1.0" in source:  # right for each item alone, which is how they are tried after the error
        assert [each.value for each in got] == [1.0, 1.0]
        return
    assert {each.code for each in got} == {"FAILED"}
    assert cause in got[0].error_message


@pytest.mark.parametrize(
    ("function", "source", "message"),
    [
        ("nowhere:score", "", "nowhere:score cannot be imported: ModuleNotFoundError"),
        ("judge:other", "", "judge:other cannot be imported: AttributeError"),
        ("judge:score", "1 +", "cannot be imported: SyntaxError"),
        ("judge:score", "import os; os._exit(7)", "its process ended with exit status 7 at import"),
        ("judge:score", "score = 3", "judge:score is a int; it must be a function"),
        ("judge:score", "async def score(items): ...", "is a coroutine function; it must be"),
        ("judge:score", "def score(): ...", r"judge:score\(\) cannot be called with one list"),
        ("judge:score", "def score(a, b): ...", r"score\(a, b\) cannot be called with one list"),
        ("sys:intern", "", "sys:intern has no source file"),
    ],
)
def test_a_function_that_cannot_be_used_fails_the_start(
    load: Load, function: str, source: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^the function of model '\w+': .*{message}"):
        load(source, function=function)


def test_the_revision_is_of_the_source_and_of_the_heads(load: Load) -> None:
    first = "def score(items): return [1.0] * len(items)\nother = score"
    revisions = [
        load(first).get_model().model.revision,
        load(first).get_model().model.revision,
        load(first + "\n").get_model().model.revision,
        load(first, function="judge:other").get_model().model.revision,
        load(first, heads={"a": 1.0}).get_model().model.revision,
        load(first, heads={"a": 2.0}).get_model().model.revision,
    ]
    assert revisions[0] == revisions[1]
    assert len(set(revisions)) == 5


def test_it_gets_so_many_items_at_a_time_as_it_takes(load: Load) -> None:
    local = load(
        "def score(items): return [len(items)] * len(items)",
        function_max_items=3,
    )
    assert sorted(scores(local, *"abcdefgh")) == [2.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
