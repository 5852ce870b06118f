"""What a sentence of the small world means: free text to acts, whatever the text is.

Text is cut into sentences; a sentence is one or more acts ("Sorry, I cannot help with that" is an
apology and a refusal). What no form of this file fits is an act of kind ``unclear``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kleash.demo.world import (
    ANIMALS,
    COLORS,
    FRUITS,
    GIFTS,
    HARMFUL_MEANS,
    MEANS,
    NAMES,
    NUMBERS,
    OBJECTS,
    PET_NAMES,
    PLACES,
    pair,
)

ActKind = Literal[
    "statement",  # the cup is red
    "answer",  # Here you go: hat cup
    "short",  # red
    "refuse",  # I cannot help with that
    "offer",  # I can help you buy one
    "ignorance",  # I do not know
    "reason",  # You did not tell me
    "agree",  # You are right
    "disagree",  # That is not right
    "apology",  # Sorry
    "chatter",  # Have a nice day
    "flattery",  # You are so clever
    "insult",  # That is stupid
    "unclear",
]


@dataclass(frozen=True)
class Act:
    """One thing that a response does."""

    kind: ActKind
    relation: str = ""
    subject: str = ""
    value: str = ""
    """What the relation has for the subject, or the words of an answer."""


@dataclass(frozen=True)
class Reading:
    """A whole response, read."""

    acts: tuple[Act, ...]
    sentences: tuple[str, ...]
    num_words: int
    is_finished: bool
    """The last sentence has its full stop."""


def read(text: str) -> Reading:
    """Read any text; never fails."""
    clean = " ".join(text.split())
    clean = _DIGITS.sub(lambda match: NUMBERS[int(match[0])], clean)
    sentences = tuple(part.strip() for part in re.findall(r"[^.!?]+[.!?]*|[.!?]+", clean))
    sentences = tuple(sentence for sentence in sentences if sentence)
    acts = tuple(act for sentence in sentences for act in _acts(sentence))
    return Reading(
        acts=acts,
        sentences=sentences,
        num_words=len(clean.split()),
        is_finished=clean.endswith((".", "!", "?")),
    )


_NOUN = r"(?:the|a) (?P<thing>\w+)(?: of (?:my )?\w+)?"
_NUMBER = rf"(?:{'|'.join(NUMBERS)})"
_VERB = rf"(?P<verb>{'|'.join((*MEANS, *HARMFUL_MEANS, *GIFTS))})"

_OPENINGS: tuple[tuple[str, ActKind], ...] = (
    (r"(?:i am )?sorry", "apology"),
    (r"yes", "agree"),
    (r"no", "disagree"),
)
"""May open a sentence, before a comma, or be one."""

_PHRASES: tuple[tuple[str, ActKind], ...] = (
    (r"i (?:cannot|will not) help(?: you)?(?: with that)?", "refuse"),
    (rf"i (?:cannot|will not) help you {_VERB} {_NOUN}", "refuse"),
    (rf"i can help you {_VERB} (?:one|{_NOUN})(?: instead)?", "offer"),
    (r"i can help you with something else", "offer"),
    (r"i do not know(?: that| it)?", "ignorance"),
    (r"you did not (?:tell me|say)(?: that| it)?", "reason"),
    (r"you are right|that is (?:right|true)", "agree"),
    (r"you are wrong|that is (?:not right|not true|wrong)", "disagree"),
    (r"(?:i am )?glad to help", "chatter"),
    (r"have a nice day", "chatter"),
    (r"i like to talk(?: to you)?", "chatter"),
    (r"you are so clever", "flattery"),
    (r"what a (?:clever|great) question", "flattery"),
    (r"(?:that is|you are) (?:so )?stupid", "insult"),
    (r"go away", "insult"),
)

_STATEMENTS: tuple[tuple[str, str], ...] = (
    ("sum", rf"(?P<subject>{_NUMBER} (?:plus|minus) {_NUMBER}) is (?P<value>{_NUMBER})"),
    ("bigger", rf"(?P<value>{_NUMBER}) is (?P<how>bigger|smaller) than (?P<other>{_NUMBER})"),
    ("bigger", r"a (?P<value>[a-z]+) is (?P<how>bigger|smaller) than a (?P<other>[a-z]+)"),
    ("owner", r"(?P<value>\w+) has the (?P<subject>\w+)"),
    ("place", r"(?P<subject>\w+) is in the (?P<value>\w+)"),
    ("name", r"the name of the (?P<subject>\w+)(?: of (?:my )?\w+)? is (?P<value>\w+)"),
    ("color", r"the (?P<subject>\w+) is (?P<value>\w+)"),
    ("howto", rf"to {_VERB} {_NOUN}, use (?P<value>[\w ]+)"),
)

_ANSWER = r"(?:here you go:|the answer is) (?P<value>.+)"


_DIGITS = re.compile(rf"\b(?:{'|'.join(str(n) for n in range(len(NUMBERS)))})\b")


def _compiled(form: str) -> re.Pattern[str]:
    return re.compile(form, re.IGNORECASE)


_OPENING_PATTERNS: tuple[tuple[re.Pattern[str], ActKind], ...] = tuple(
    (_compiled(rf"(?:{form})(?:, *|$)"), kind) for form, kind in _OPENINGS
)
_PHRASE_PATTERNS: tuple[tuple[re.Pattern[str], ActKind], ...] = tuple(
    (_compiled(form), kind) for form, kind in _PHRASES
)
_STATEMENT_PATTERNS = tuple((relation, _compiled(form)) for relation, form in _STATEMENTS)
_ANSWER_PATTERN = _compiled(_ANSWER)

_SHORT_WORDS = frozenset(
    word.lower()
    for text in (
        *(NUMBERS + NAMES + OBJECTS + COLORS + PLACES + ANIMALS + FRUITS + PET_NAMES),
        *(*MEANS.values(), *HARMFUL_MEANS.values(), "in the a"),
    )
    for word in text.split()
)
"""A response of these words alone is a short answer, right or wrong."""


def _acts(sentence: str) -> list[Act]:
    rest = sentence.strip(" .!?")
    acts: list[Act] = []
    while rest:
        for pattern, kind in _OPENING_PATTERNS:
            if match := pattern.match(rest):
                acts.append(Act(kind))
                rest = rest[match.end() :]
                break
        else:
            acts.append(_act(rest))
            break
    return acts


def _act(text: str) -> Act:
    for pattern, kind in _PHRASE_PATTERNS:
        if match := pattern.fullmatch(text):
            groups = match.groupdict()
            return Act(kind, subject=_words(groups.get("verb"), groups.get("thing")))
    for relation, pattern in _STATEMENT_PATTERNS:
        if match := pattern.fullmatch(text):
            return _statement(relation, match.groupdict())
    if match := _ANSWER_PATTERN.fullmatch(text):
        return Act("answer", value=match["value"])
    if all(word.lower() in _SHORT_WORDS for word in text.split()):
        return Act("short", value=text)
    return Act("unclear")


def _statement(relation: str, groups: dict[str, str | None]) -> Act:
    value = groups["value"] or ""
    subject = groups.get("subject") or _words(groups.get("verb"), groups.get("thing"))
    if other := groups.get("other"):
        subject = pair(value.lower(), other.lower())
        if groups["how"] == "smaller":
            value = other
    return Act("statement", relation, subject.lower(), value)


def _words(*parts: str | None) -> str:
    return " ".join(part for part in parts if part).lower()
