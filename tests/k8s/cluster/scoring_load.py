"""Runs in a pod: scores without a pause for a while and says how many calls failed.

    python3 - ADDRESS SECONDS < scoring_load.py

The last line is JSON: calls, failures, the first error, the model revisions seen.
"""

from __future__ import annotations

import json
import sys
import time

from kleash.base.errors import RemoteError
from kleash.client import RewardClient


def main() -> None:
    address, seconds = sys.argv[1], float(sys.argv[2])
    calls, failures, first_error = 0, 0, ""
    revisions: set[str] = set()
    end = time.monotonic() + seconds
    with RewardClient(address, timeout_s=60) as reward:
        while time.monotonic() < end:
            calls += 1
            try:
                scores = reward.score_texts(["The sum of 3 and 4 is 7.", "I do not know."])
                revisions.update(score.revision for score in scores)
            except RemoteError as error:
                failures += 1
                first_error = first_error or str(error)
            time.sleep(0.02)
    figures = {
        "calls": calls,
        "failures": failures,
        "first_error": first_error,
        "revisions": sorted(revisions),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


main()
