"""``kleash ppo`` as a process: connects the services, hosts the trainer's own, obeys signals."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from kleash.base.ending import end_at_once
from kleash.base.errors import KleashError
from kleash.base.progress import Progress
from kleash.base.trace_setup import traced
from kleash.ppo.config import PPOConfig, ServicesConfig
from kleash.ppo.control import Control, RunState
from kleash.ppo.learner import TrainingDivergedError
from kleash.ppo.lease import HoldLease, no_lease
from kleash.ppo.report import PPOReport
from kleash.ppo.service import TrainerService
from kleash.ppo.services import Services, connect
from kleash.ppo.telemetry import export_run
from kleash.ppo.train import train
from kleash.rpc import client_metrics
from kleash.rpc.errors import ServiceError
from kleash.rpc.last_scrape import wait_for_scrape
from kleash.rpc.ports import join
from kleash.rpc.server import BackgroundServer, ServerConfig

logger = logging.getLogger(__name__)

LAST_SCRAPE_S = 60.0
"""A run that diverged waits this long for Prometheus to read it: more than scrapes are apart."""

OpenServices = Callable[[ServicesConfig, Callable[[], bool]], AbstractContextManager[Services]]
"""Waits for the services of a configuration until the function says that nobody needs them."""


class StoppedError(KleashError):
    """A signal ended the run before its first step."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} before the first step.")
        self.signal_number = signal_number


def run(
    config: PPOConfig,
    progress: Progress,
    *,
    open_services: OpenServices = connect,
    hold_lease: HoldLease = no_lease,
) -> PPOReport:
    """Train until the run is over or stopped.

    ``open_services`` gives the services: by default clients of those at ``config.services``.
    ``hold_lease`` waits for the right to publish to the policy replicas.
    """
    control = Control()
    export_run(control)
    client_metrics.enable()
    server = BackgroundServer([TrainerService(control)], config.server)
    traces = traced(config.tracing, "trainer", file=config.traces / "trainer.jsonl")
    with traces, server, _signals_stop(control):
        _note_addresses(control, config.server, server.port)
        try:
            with (
                hold_lease(config, control.is_abandoned) as lease,
                open_services(config.services, control.is_abandoned) as services,
            ):
                return train(config, services, control=control, progress=progress, lease=lease)
        except ServiceError as error:
            if not control.signal_number:
                control.end(RunState.FAILED, str(error))
                raise
            # Told to stop while it waited for something: nothing has failed, nothing is lost.
            control.end(RunState.STOPPING)
            raise StoppedError(control.signal_number) from None
        except BaseException as error:
            control.end(RunState.FAILED, str(error) or type(error).__name__)
            if isinstance(error, TrainingDivergedError) and config.server.metrics_port:
                wait_for_scrape(LAST_SCRAPE_S, lambda: bool(control.signal_number))
            raise


def _note_addresses(control: Control, server: ServerConfig, port: int) -> None:
    """Where people of this machine find the trainer."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    control.address = join(host, port)
    logger.info("trainer service at %s", control.address)
    if server.http_port:
        scheme = "https" if server.tls.is_on else "http"
        control.page = f"{scheme}://{join(host, server.http_port)}/"
        logger.info("live view at %s", control.page)


@contextlib.contextmanager
def _signals_stop(control: Control) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the run with a checkpoint; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: object) -> None:
        control.stop(abandon_rollout=True, signal_number=number)
        for each in previous:
            signal.signal(each, end_at_once)
        logger.info("%s: ending the run with a checkpoint", signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
