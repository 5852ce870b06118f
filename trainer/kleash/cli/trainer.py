"""``kleash trainer status|pause|resume|checkpoint|stop``: one question or order to a trainer.

``kleash k8s pause`` and ``resume`` are another thing: they end the pods of a run, and start others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager

from google.protobuf import json_format

from kleash.cli.flags import Action, Parser, run_action
from kleash.cli.output import show
from kleash.cli.trainer_target import HELP, connected, find_trainer
from kleash.cli.watch_state import describe_state
from kleash.client.trainer import TrainerClient


def run(arguments: Sequence[str]) -> int:
    """Do what the first argument names."""
    return run_action("kleash trainer", ACTIONS, arguments, parser_of=_parser, help_text=_help)


def _status(flags: argparse.Namespace) -> None:
    with _client(flags) as client:
        run = client.get_run()
        if flags.json:
            found = json_format.MessageToDict(run, preserving_proto_field_name=True)
            found.pop("config_json", None)
            show(json.dumps(found))
            return
        show(f"{run.run_id or 'a run that is loading'}: {describe_state(run)}")
        if run.checkpoint_step:
            show(f"newest checkpoint: step {run.checkpoint_step}")


def _pause(flags: argparse.Namespace) -> None:
    with _client(flags) as client:
        client.pause()
        show(describe_state(client.get_run()))


def _resume(flags: argparse.Namespace) -> None:
    with _client(flags) as client:
        client.resume()
        show(describe_state(client.get_run()))


def _checkpoint(flags: argparse.Namespace) -> None:
    with _client(flags) as client:
        saved = client.save_checkpoint()
    show(f"checkpoint of step {saved.step}: {saved.path}")


def _stop(flags: argparse.Namespace) -> None:
    with _client(flags) as client:
        client.stop()
        show(describe_state(client.get_run()))


ACTIONS = {
    "status": Action(_status, "where the run is"),
    "pause": Action(_pause, "let the step in progress end, and begin no other"),
    "resume": Action(_resume, "go on after pause"),
    "checkpoint": Action(_checkpoint, "write one after the step in progress, and say where it is"),
    "stop": Action(_stop, "end the run after the step in progress, with a checkpoint"),
}


def _client(flags: argparse.Namespace) -> AbstractContextManager[TrainerClient]:
    return connected(find_trainer(flags.target), timeout_s=flags.timeout_s)


def _parser(name: str) -> argparse.ArgumentParser:
    description = ACTIONS[name].summary
    parser = Parser(f"kleash trainer {name}", description=description, allow_abbrev=False)
    parser.add_argument("target", metavar="TARGET", nargs="?", help=HELP)
    if name == "status":
        help_ = "one JSON object, with the figures of the last step"
        parser.add_argument("--json", action="store_true", help=help_)
    help_ = "seconds to wait for an answer"
    parser.add_argument("--timeout_s", metavar="N", type=float, default=600.0, help=help_)
    return parser


def _help() -> str:
    width = max(map(len, ACTIONS))
    rows = "\n".join(f"  {name:<{width}}  {each.summary}" for name, each in ACTIONS.items())
    return (
        "usage: kleash trainer ACTION [TARGET]\n\n"
        f"Ask or steer a PPO trainer. TARGET: {HELP}.\n"
        f"\n{rows}\n\nkleash watch shows a run as it goes; kleash trainer ACTION --help lists an "
        "action's flags."
    )
