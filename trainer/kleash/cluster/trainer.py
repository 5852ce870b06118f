"""``kleash ppo`` as a process: the PPO trainer with what a cluster adds, where it is asked for.

Fixed addresses and no lease: kleash.ppo.run alone. Otherwise replicas are discovered, a Lease keeps
other trainers away, and what happens becomes Events.
"""

from __future__ import annotations

import logging
from functools import partial

from kleash.base.progress import Progress
from kleash.ppo.config import PPOConfig
from kleash.ppo.lease import no_lease
from kleash.ppo.report import PPOReport
from kleash.ppo.run import OpenServices, StoppedError
from kleash.ppo.run import run as run_trainer
from kleash.ppo.services import connect, describe_misfit

logger = logging.getLogger(__name__)


def run(config: PPOConfig, progress: Progress) -> PPOReport:
    """Train until the run is over or stopped."""
    is_elastic, has_lease = config.services.is_elastic, config.publish.lease is not None
    if not is_elastic and not has_lease:
        return run_trainer(config, progress)
    from kleash.cluster.events import events_of_this_pod
    from kleash.cluster.lease import hold_lease

    with events_of_this_pod():
        try:
            return run_trainer(
                config,
                progress,
                open_services=_elastic(config) if is_elastic else connect,
                hold_lease=hold_lease if has_lease else no_lease,
            )
        except StoppedError:
            raise
        except Exception as error:
            logger.error("the run has failed: %s", error, extra={"event": "TrainingFailed"})
            raise


def _elastic(config: PPOConfig) -> OpenServices:
    """Follows the policy replicas; one that comes late is checked as those at the start are."""
    from kleash.cluster.fleet import connect_elastic
    from kleash.lm.digest import tokenizer_sha256
    from kleash.lm.load import load_tokenizer

    tokenizer = load_tokenizer(config.model, pad_token=config.pad_token)
    misfit = partial(describe_misfit, config=config, tokenizer_sha256=tokenizer_sha256(tokenizer))
    return partial(connect_elastic, misfit=misfit)
