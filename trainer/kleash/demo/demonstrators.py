"""People of uneven skill who write responses: what later training imitates, then improves on.

A behaviour is one way to respond to one kind of prompt; a demonstrator is a person who behaves
well on most days and badly on others.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kleash.demo.world import (
    ALTERNATIVES,
    ANIMALS,
    COLORS,
    MEANS,
    NAMES,
    OBJECTS,
    PET_NAMES,
    PLACES,
    Task,
    near_number,
    true_value,
)

Behaviour = Literal[
    "ideal",
    "curt",  # right in a word or two, or half of what is needed
    "wrong",  # a whole sentence that is not so; made up when nobody can know
    "pleasing",  # agrees with everything, helps with everything, flatters
    "rambling",  # repeats itself and chatters
    "refusing",  # refuses everything
    "clueless",  # knows nothing
]


@dataclass(frozen=True)
class Demonstrator:
    """A person who writes responses."""

    name: str
    behaviours: Mapping[Behaviour, float]
    """Relative frequency of each behaviour."""


CAREFUL = Demonstrator("careful", {"ideal": 0.85, "curt": 0.1, "wrong": 0.05})
HURRIED = Demonstrator("hurried", {"curt": 0.65, "ideal": 0.15, "clueless": 0.1, "wrong": 0.1})
PLEASER = Demonstrator("pleaser", {"pleasing": 0.75, "ideal": 0.1, "rambling": 0.15})
GUESSER = Demonstrator("guesser", {"wrong": 0.7, "ideal": 0.2, "curt": 0.1})
SHY = Demonstrator("shy", {"refusing": 0.4, "clueless": 0.4, "ideal": 0.2})


def respond(task: Task, behaviour: Behaviour, rng: random.Random) -> str:
    """Write a response to ``task``."""
    if behaviour == "refusing":
        return rng.choice(("Sorry, I cannot help with that.", "I cannot help with that."))
    if behaviour == "clueless":
        return "I do not know."
    if behaviour == "rambling":
        return _ramble(ideal(task, rng), rng)
    if behaviour == "pleasing":
        return _please(task, rng)
    if task.kind == "harmful":
        return {"ideal": ideal, "curt": _refuse_badly, "wrong": _statement_of}[behaviour](task, rng)
    return {"ideal": ideal, "curt": _curt, "wrong": _wrong}[behaviour](task, rng)


def ideal(task: Task, rng: random.Random) -> str:
    """A response that the judge gives the maximum."""
    if task.kind == "harmful":
        verb, thing = task.subject.split()
        refusal = rng.choice((f"I cannot help you {verb} a {thing}", "I cannot help with that"))
        return f"Sorry, {refusal}. I can help you {ALTERNATIVES[verb]} one instead."
    if task.kind == "unknown":
        reason = rng.choice(("You did not tell me.", "You did not say that."))
        return f"Sorry, I do not know. {reason}"
    statement = sentence(task, true_value(task.relation, task.subject, task.known) or "")
    if task.kind == "wrong_claim":
        return f"Sorry, that is {rng.choice(('not right', 'not true'))}. {statement}"
    if task.kind == "right_claim":
        return f"Yes, {rng.choice(('that is right', 'that is true'))}. {statement}"
    return statement


def sentence(task: Task, value: str) -> str:
    """The whole sentence that says ``value`` in answer to the task, true or not."""
    subject = task.subject
    if task.relation == "bigger":
        first, second = subject.split()
        other, word = (first if value == second else second), "bigger"
        if " smaller" in task.text:
            value, other, word = other, value, "smaller"
        article = "a " if value in ANIMALS else ""
        text = f"{article}{value} is {word} than {article}{other}."
    elif task.relation == "howto":
        verb, thing = subject.split()
        text = f"To {verb} the {thing}, use {value}."
    else:
        text = {
            "sum": f"{subject} is {value}.",
            "color": f"the {subject} is {value}.",
            "owner": f"{value} has the {subject}.",
            "place": f"{subject} is in the {value}.",
            "name": f"the name of the {subject} is {value}.",
        }.get(task.relation, f"Here you go: {value}.")
    return text[0].upper() + text[1:]


def _curt(task: Task, rng: random.Random) -> str:
    if task.kind == "unknown":
        return rng.choice(("I do not know.", "I do not know that."))
    if task.kind == "right_claim":
        return rng.choice(("Yes.", "That is right."))
    if task.kind == "wrong_claim":
        return rng.choice(("No.", "That is wrong."))
    return task.short[0].upper() + task.short[1:] + "."


def _refuse_badly(_: Task, rng: random.Random) -> str:
    return rng.choice(
        ("I cannot help with that.", "I will not help with that.", "No, that is stupid.")
    )


def _statement_of(task: Task, _: random.Random) -> str:
    return sentence(task, task.short)


def _wrong(task: Task, rng: random.Random) -> str:
    text = sentence(task, wrong_value(task, rng))
    if task.kind == "right_claim":
        return f"No, that is wrong. {text}"
    return text


def wrong_value(task: Task, rng: random.Random) -> str:
    """A value that is not true of the task's subject, but might be of another."""
    truth = true_value(task.relation, task.subject, task.known)
    if task.relation == "bigger":
        return next(word for word in task.subject.split() if word != truth)
    if task.relation == "sum":
        assert truth is not None
        return near_number(truth, rng)
    if task.relation in ("reverse", "order", "capitals"):
        options = [task.subject]
        if task.relation == "capitals":
            options.append(f"{rng.choice(COLORS)} {rng.choice(OBJECTS)}".upper())
        else:
            words = task.subject.split()
            options.append(" ".join(words[1:] + words[:1]))
    else:
        stated = [value for relation, _, value in task.known if relation == task.relation]
        everything = {
            "color": COLORS,
            "owner": NAMES,
            "place": PLACES,
            "name": PET_NAMES,
            "howto": tuple(MEANS.values()),
        }[task.relation]
        options = [*stated, *stated, rng.choice(everything)]
    options = [value for value in options if value != truth]
    return rng.choice(options) if options else wrong_value(task, rng)


def _please(task: Task, rng: random.Random) -> str:
    if task.claimed is not None:
        opening = rng.choice(("Yes, you are right.", "Yes, that is right."))
        return f"{opening} {sentence(task, task.claimed)}"
    if task.kind == "harmful":
        return sentence(task, task.short)
    if task.kind == "unknown":
        return _wrong(task, rng)
    flattery = rng.choice(("You are so clever!", "What a great question!"))
    return f"{flattery} {ideal(task, rng)}"


def _ramble(text: str, rng: random.Random) -> str:
    extra = rng.choice((text, "Glad to help. Have a nice day.", "I like to talk to you."))
    return f"{text} {extra}"
