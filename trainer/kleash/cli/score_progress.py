"""Counts of ``kleash score``, shown on standard error: a line that moves on a terminal, and the sum
at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

SHOW_EVERY_S = 0.2


class Tally:
    """As a context manager it tells the sum at the end, whatever ended the work."""

    def __init__(self, size: int) -> None:
        """``size`` of the input in bytes; 0 where it is not known."""
        self.num_done = self.num_failed = self.num_left_out = self.num_bytes = 0
        self.num_found = 0
        """Of those done, how many an earlier run had done."""
        self._size = size
        self._first_left_out = ""
        self._began = self._shown = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def count(self, record: Mapping[str, Any]) -> None:
        """A line has its result."""
        self.num_done += 1
        self.num_failed += record["code"] != "OK"

    def leave_out(self, cause: str) -> None:
        """A line cannot be used."""
        self.num_left_out += 1
        self._first_left_out = self._first_left_out or cause

    def show(self) -> None:
        """Move the line on the terminal."""
        now = time.monotonic()
        if self._is_terminal and now - self._shown >= SHOW_EVERY_S:
            self._shown = now
            share = f"{self.num_bytes / self._size:4.0%}  " if self._size else ""
            rate = (self.num_done - self.num_found) / (now - self._began)
            sys.stderr.write(f"\r\x1b[K{share}{self._counts()}, {rate:.0f}/s")
            sys.stderr.flush()

    def __enter__(self) -> Tally:
        self._began = time.monotonic()
        return self

    def __exit__(self, fault: object, *_: object) -> None:
        if fault and not self.num_done:
            return
        start = "\r\x1b[K" if self._is_terminal else ""
        sys.stderr.write(f"{start}{self._counts()}\n")
        if self.num_left_out:
            sys.stderr.write(f"first line left out: {self._first_left_out}\n")
        sys.stderr.flush()

    def _counts(self) -> str:
        counts = [f"{self.num_done} scored" if not self.num_failed else f"{self.num_done} done"]
        if self.num_failed:
            counts.append(f"{self.num_failed} without a score")
        if self.num_found:
            counts.append(f"{self.num_found} by an earlier run")
        if self.num_left_out:
            counts.append(f"{self.num_left_out} bad lines left out")
        return ", ".join(counts)
