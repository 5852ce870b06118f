"""``kleash fetch SOURCE [--out=FOLDER]``: a model folder from anywhere, or waiting for one."""

from __future__ import annotations

from collections.abc import Sequence

from kleash.cli.output import show


def run(arguments: Sequence[str]) -> int:
    """Fetch, and print where the model is, how large it is, and its hash."""
    from kleash.cli.options import parse
    from kleash.sources.fetch import FetchConfig, fetch

    usage = "kleash fetch SOURCE [--out=FOLDER] [--wait_s=SECONDS] [--key=value ...]"
    config = parse(FetchConfig, _with_source(arguments), usage=usage)
    if config is None:
        return 0
    from kleash.base.logging import configure_logging

    configure_logging()
    fetched = fetch(config)
    verb = "fetched" if fetched.is_new else "complete"
    size = f"{fetched.num_files} files, {fetched.num_bytes / 1e6:.1f} MB"
    hashed = f", sha256 {fetched.sha256}" if fetched.sha256 else ""
    show(f"{verb}: {fetched.folder} ({size}{hashed})")
    return 0


def _with_source(arguments: Sequence[str]) -> list[str]:
    """The first argument needs no key: it is the source, and never a configuration file."""
    first, *rest = arguments or [""]
    return [f"--source={first}", *rest] if first and not first.startswith("-") else [*arguments]
