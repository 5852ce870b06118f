"""The ``kleash`` command: finds the subcommand, turns errors into one sentence and a status.

Status: 0 done, 1 failed, 2 the user's input cannot be used, 3 a service failed; 130 and 143 when
Ctrl-C or SIGTERM ended it before the work was done.
Nothing heavy is imported before a subcommand needs it: ``kleash --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kleash.base.ending import end_at_once, end_with
from kleash.base.errors import KleashError, RemoteError, UserError
from kleash.cli.output import show


class Command(NamedTuple):
    """A subcommand: the function that runs it, the extra that it needs (empty for none), and a line
    of help."""

    function: str
    extra: str
    summary: str


COMMANDS = {
    "demo": Command(
        "kleash.cli.demo:run",
        "train",
        "all three stages on the built-in small world, from nothing, on the CPU",
    ),
    "sft": Command(
        "kleash.cli.stages:run_sft", "train", "stage 1: supervised fine-tuning on demonstrations"
    ),
    "candidates": Command(
        "kleash.cli.stages:run_candidates", "train", "several responses per prompt, to be compared"
    ),
    "reward-model": Command(
        "kleash.cli.stages:run_reward_model",
        "train",
        "stage 2: a Bradley-Terry reward model from comparisons",
    ),
    "up": Command(
        "kleash.cli.up:run",
        "train",
        "stage 3 on one machine: the three services and the PPO trainer, supervised",
    ),
    "ppo": Command(
        "kleash.cli.stages:run_ppo",
        "train",
        "stage 3: the PPO trainer alone, against services that run elsewhere",
    ),
    "watch": Command(
        "kleash.cli.watch:run",
        "train",
        "a PPO run as it goes, in the terminal; keys pause, resume, save and stop it",
    ),
    "trainer": Command(
        "kleash.cli.trainer:run",
        "",
        "status, pause, resume, checkpoint or stop: one question or order to a PPO trainer",
    ),
    "report": Command(
        "kleash.cli.report:run", "train", "one HTML page from the folders of one or more PPO runs"
    ),
    "replay": Command(
        "kleash.cli.replay:run",
        "train",
        "a recorded PPO step again: bit for bit, or with another reward model",
    ),
    "serve": Command(
        "kleash.cli.serve:run", "serve", "one or more of policy, reward, reference as a gRPC server"
    ),
    "trace": Command(
        "kleash.cli.trace:run",
        "train",
        "where the time of a PPO step went; a timeline for Perfetto",
    ),
    "weights": Command(
        "kleash.cli.weights:run",
        "serve",
        "inspect, history or verify: published versions and what a replica serves",
    ),
    "model": Command(
        "kleash.cli.models:run",
        "serve",
        "list, load or unload: what a reward service serves",
    ),
    "score": Command(
        "kleash.cli.score:run",
        "",
        "rewards of a file's lines from a reward service, as JSON Lines",
    ),
    "fetch": Command(
        "kleash.cli.fetch:run",
        "train",
        "a model folder from the Hub, an object store, a web server; or wait for one",
    ),
    "k8s": Command(
        "kleash.cli.k8s:run",
        "k8s",
        "check what is deployed; run, watch and steer a pipeline on a cluster",
    ),
    "token": Command("kleash.cli.tokens:run", "serve", "keys that callers of the services show"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``kleash`` with ``arguments`` (default: the process's own) and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        show(_help())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        from kleash.base.version import software_version

        show(f"kleash {software_version()}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"unknown command '{name}'; kleash --help lists the commands.", 2)
    return end_with(_run(name, rest))


def _run(name: str, arguments: Sequence[str]) -> int:
    # Threads that wait in a busy loop starve the other processes of the machine: with services and
    # trainer on two cores a PPO step takes minutes, not seconds (docs/decisions.md). OpenMP reads
    # this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = COMMANDS[name]
    module, _, function = command.function.partition(":")
    try:
        with _ended_by_signals():
            return getattr(importlib.import_module(module), function)(arguments)
    except _TerminatedError:
        return _fail("ended by SIGTERM.", 128 + signal.SIGTERM)
    except KleashError as error:
        if signal_number := getattr(error, "signal_number", 0):
            return _fail(str(error), 128 + signal_number)
        is_users, is_remote = isinstance(error, UserError), isinstance(error, RemoteError)
        return _fail(str(error), 2 if is_users else 3 if is_remote else 1)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "kleash":
            raise
        sentence = f"kleash {name} needs the package '{error.name}'"
        package = f"kleash[{command.extra}]" if command.extra else "kleash"
        return _fail(f"{sentence}; pip install '{package}'.", 2)


class _TerminatedError(BaseException):
    """Ends the main thread as Ctrl-C does."""


_ENDINGS: dict[signal.Signals, type[BaseException]] = {
    signal.SIGTERM: _TerminatedError,
    signal.SIGINT: KeyboardInterrupt,
}


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C clean up and end a command that does nothing else with them.

    As the first process of a container nothing would happen: the kernel drops a signal that process
    1 has no handler for. A second signal does not wait for the cleaning up. Servers and the trainer
    have handlers of their own, in place of these.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A shell's "kleash ... &" ignores Ctrl-C, and so does its child.
    ignored = {it for it in _ENDINGS if signal.getsignal(it) is signal.SIG_IGN}

    def end(number: int, _frame: object) -> None:
        for each in before:
            signal.signal(each, end_at_once)
        raise _ENDINGS[signal.Signals(number)]

    before = {number: signal.signal(number, end) for number in _ENDINGS.keys() - ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: kleash COMMAND [CONFIG.toml] [--key=value ...]\n\n"
        "RLHF as services: SFT, a Bradley-Terry reward model, PPO under a KL leash.\n\n"
        f"{rows}\n\nkleash COMMAND --help lists a command's configuration keys."
    )


def _fail(sentence: str, status: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main())
