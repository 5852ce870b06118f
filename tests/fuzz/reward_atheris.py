"""Inputs to the reward service's requests that are chosen by the code they reach.

python -m tests.fuzz.reward_atheris -max_total_time=600 [libFuzzer's other flags] [CORPUS_FOLDER]

Needs atheris (pip install atheris==3.0.0, on Python 3.11 to 3.13), which is no part of the
development environment. A failure prints the trace and writes the input to a file crash-*.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["kleash"]):
    from tests.fuzz.messages import Source, build
    from tests.fuzz.reward import METHODS, REAL, tiny_target


def main() -> None:
    """See the module's text; does not return."""
    with tempfile.TemporaryDirectory() as folder:
        target = tiny_target(Path(folder))

    def feed(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        source: Source = provider.ConsumeIntInRange
        method = list(METHODS)[source(0, len(METHODS) - 1)]
        if source(0, 1):
            raw = build(METHODS[method], source, target.hints).SerializeToString()
        else:
            raw = provider.ConsumeBytes(source(0, 4096))
        target.feed(method, raw, source, is_real=source(0, REAL) == 0)

    atheris.Setup(sys.argv, feed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
