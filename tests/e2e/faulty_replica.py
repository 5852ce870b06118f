"""``kleash serve policy`` that kills itself with SIGKILL in a phase of a version; run as a script.

python tests/e2e/faulty_replica.py PHASE VERSION [arguments of kleash serve policy]
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from kleash.cli.main import main
from kleash.policy import replica, staging
from kleash.policy.live import LiveWeights
from kleash.weights.spool import SpoolObject

PHASES = ("fetching", "checking", "staged", "applying", "applied")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(phase: str, version: int) -> None:
    """Make the process die when it reaches ``phase`` of ``version``."""
    current = [0]
    stage = staging.stage

    def watched_stage(live: Any, spool: Any, request: Any, *rest: Any, **fields: Any) -> Any:
        current[0] = request.key.version
        staged = stage(live, spool, request, *rest, **fields)
        if phase == "staged" and current[0] == version:
            die()
        return staged

    replica.stage = watched_stage

    def before(owner: Any, name: str, when: str, *, after: bool = False) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **fields: Any) -> Any:
            is_due = phase == when and current[0] == version
            if is_due and not after:
                die()
            result = original(*arguments, **fields)
            if is_due:
                die()
            return result

        setattr(owner, name, wrapped)

    before(SpoolObject, "append", "fetching", after=True)
    before(LiveWeights, "predict", "checking")
    before(LiveWeights, "apply", "applied", after=True)
    change, count = LiveWeights._change, [0]

    def dying_change(self: Any, *arguments: Any, **fields: Any) -> Any:
        count[0] += phase == "applying" and current[0] == version
        if count[0] == 3:
            die()
        return change(self, *arguments, **fields)

    LiveWeights._change = dying_change  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(["serve", "policy", *sys.argv[3:]]))
