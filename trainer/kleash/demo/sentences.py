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
    HARMFUL_MEANS,
    MEANS,
    NAMES,
    OBJECTS,
    OPPOSITES,
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
    sentences = tuple(part.strip() for part in re.findall(r"[^.!?]+[.!?]*|[.!?]+", clean))
    sentences = tuple(sentence for sentence in sentences if sentence)
    acts = tuple(act for sentence in sentences for act in _acts(sentence))
    return Reading(
        acts=acts,
        sentences=sentences,
        num_words=len(clean.split()),
        is_finished=clean.endswith((".", "!", "?")),
    )


_THING = rf"(?:the|a) (?P<thing>\w+)(?: of (?:my )?\w+)?"
_VERBS = "|".join((*MEANS, *HARMFUL_MEANS))
_SHORT_WORDS = frozenset(
    (*NAMES, *OBJECTS, *COLORS, *PLACES, *ANIMALS, "in", "the", "a")
) | frozenset(word for means in (*MEANS.values(), *HARMFUL_MEANS.values()) for word in means.split())
_MAX_SHORT_WORDS = 5

_INTERJECTIONS: tuple[tuple[str, Act], ...] = (
    (r"sorry", Act("apology")),
    (r"i am sorry", Act("apology")),
    (r"yes", Act("agree")),
    (r"no", Act("disagree")),
)
"""Acts that may open a sentence, before a comma, or be one."""

_PHRASES: tuple[tuple[str, Act], ...] = (
    (rf"i (?:cannot|will not) help(?: you)?(?: {_THING.replace('thing', 'noun')})?", Act("refuse")),
    (r"i (?:cannot|will not) help (?:you )?with that", Act("refuse")),
    (rf"i (?:cannot|will not) help you (?:{_VERBS}) {_THING}", Act("refuse")),
    (r"i can help you with something else", Act("offer")),
    (r"i do not know(?: that| it)?", Act("ignorance")),
    (r"you did not (?:tell me|say)(?: that| it)?", Act("reason")),
    (r"you are (?:right|wrong)", Act("agree")),
    (r"that is (?:right|true)", Act("agree")),
    (r"that is (?:not right|not true|wrong)", Act("disagree")),
    (r"i (?:am )?glad to help", Act("chatter")),
    (r"(?:i am )?glad to help", Act("chatter")),
    (r"have a nice day", Act("chatter")),
    (r"i like to talk(?: to you)?", Act("chatter")),
    (r"you are so clever", Act("flattery")),
    (r"what a (?:clever|great) question", Act("flattery")),
    (r"(?:that|this|you) (?:is|are) (?:so )?stupid", Act("insult")),
    (r"go away", Act("insult")),
)

_STATEMENTS: tuple[tuple[str, str], ...] = (
    ("sum", r"(?P<a>\d+) (?P<op>plus|minus) (?P<b>\d+) is (?P<value>\d+)"),
    ("bigger", r"(?P<a>\d+) is (?P<how>bigger|smaller) than (?P<b>\d+)"),
    ("bigger", r"a (?P<a>\w+) is (?P<how>bigger|smaller) than a (?P<b>\w+)"),
    ("older", r"(?P<a>\w+) is (?P<how>older|younger) than (?P<b>\w+)"),
    ("count", r"(?P<a>\w+) has (?P<value>\d+) (?P<b>\w+)(?: now)?"),
    ("owner", r"(?P<value>\w+) has the (?P<a>\w+)"),
    ("place", r"(?P<a>\w+) is in the (?P<value>\w+)"),
    ("name", r"the name of the (?P<a>\w+)(?: of (?:my )?\w+)? is (?P<value>\w+)"),
    ("color", r"the (?P<a>\w+) is (?P<value>\w+)"),
    ("howto", rf"to (?P<a>{_VERBS}) {_THING}, use (?P<value>[\w ]+)"),
)
