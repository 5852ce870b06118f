"""A figure with all that is to be known about it. Which ones there are is in figures.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A number in a line of metrics.jsonl."""

    name: str
    """Its key."""
    unit: str
    formula: str
    """What it is: over what, by which function of kleash.ppo.loss, of what sign."""
    remedy: str
    """What to do when it looks wrong."""


@dataclass(frozen=True)
class Section:
    """Figures that are explained together."""

    title: str
    note: str
    """What all of them need to be understood; may be empty."""
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Key:
    """A key of a response that a run keeps."""

    name: str
    unit: str
    meaning: str


@dataclass(frozen=True)
class Keys:
    """All keys of the lines of a file."""

    title: str
    note: str
    keys: tuple[Key, ...]
