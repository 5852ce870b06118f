"""``kleash model list|load|unload``: what a reward service serves, and changing it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kleash.cli.flags import Action, Parser, run_action
from kleash.cli.output import show
from kleash.client.reward import RewardClient
from kleash.client.reward_admin import RewardAdminClient


def run(arguments: Sequence[str]) -> int:
    """Do what the first argument names."""
    return run_action("kleash model", ACTIONS, arguments, parser_of=_parser, help_text=_help)


def _list(flags: argparse.Namespace) -> None:
    with RewardClient(flags.address, timeout_s=flags.timeout_s) as client:
        for index, served in enumerate(client.list_models()):
            show(f"{served.name}  {served.revision}{'  (default)' if index == 0 else ''}")


def _load(flags: argparse.Namespace) -> None:
    with RewardAdminClient(flags.address, timeout_s=flags.timeout_s) as client:
        answer = client.load_model(flags.folder, model=flags.model, revision=flags.revision)
    if not answer.HasField("previous"):
        show(f"{answer.model.name} was {answer.model.revision} already")
        return
    show(f"{answer.model.name} is {answer.model.revision} and was {answer.previous.revision}")


def _unload(flags: argparse.Namespace) -> None:
    with RewardAdminClient(flags.address, timeout_s=flags.timeout_s) as client:
        client.unload_revision(flags.revision, model=flags.model)


ACTIONS = {
    "list": Action(_list, "names and revisions of the served models, the default one first"),
    "load": Action(_load, "a folder on the server beside what it serves, and switch to it"),
    "unload": Action(_unload, "give back the memory of the revision before the newest"),
}


def _parser(name: str) -> argparse.ArgumentParser:
    description = ACTIONS[name].summary
    parser = Parser(f"kleash model {name}", description=description, allow_abbrev=False)
    parser.add_argument("address", metavar="HOST:PORT", help="of one replica of a reward service")
    if name == "load":
        help_ = "model folder, a path on the server inside of its reward.model_folders"
        parser.add_argument("folder", metavar="FOLDER", help=help_)
        help_ = "digest of the weights that the folder must hold"
        parser.add_argument("--revision", metavar="SHA256", default="", help=help_)
    if name == "unload":
        parser.add_argument("revision", metavar="SHA256", help="digest of its weights")
    if name != "list":
        help_ = "name under which it is served; the default model without it"
        parser.add_argument("--model", metavar="NAME", default="", help=help_)
    help_ = "seconds to wait; a load that takes longer goes on"
    parser.add_argument("--timeout_s", metavar="N", type=float, default=600.0, help=help_)
    return parser


def _help() -> str:
    width = max(map(len, ACTIONS))
    rows = "\n".join(f"  {name:<{width}}  {each.summary}" for name, each in ACTIONS.items())
    return (
        "usage: kleash model ACTION HOST:PORT ...\n\n"
        "What a reward service serves. Loading and unloading is for callers in its reward.admins.\n"
        f"\n{rows}\n\nkleash model ACTION --help lists an action's flags."
    )
