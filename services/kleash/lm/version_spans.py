"""Which weights drew which tokens of one response, as runs of tokens without gaps."""

from __future__ import annotations


class VersionSpans:
    """Grows with the response: versions may rise, fall and return."""

    def __init__(self, version: int) -> None:
        self._starts = [(0, version)]

    def change(self, num_drawn: int, version: int) -> None:
        """Tokens from index ``num_drawn`` on are drawn by ``version``."""
        if self._starts[-1][0] == num_drawn:
            self._starts.pop()  # it drew nothing
        if not self._starts or self._starts[-1][1] != version:
            self._starts.append((num_drawn, version))

    def runs(self, num_drawn: int) -> list[tuple[int, int, int]]:
        """(start, end, version) of the first ``num_drawn`` tokens, in order."""
        ends = [start for start, _ in self._starts[1:]] + [num_drawn]
        return [
            (start, end, version)
            for (start, version), end in zip(self._starts, ends, strict=True)
            if start < end
        ]
