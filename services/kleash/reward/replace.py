"""Loading a model beside the one that is served, and switching to it: one at a time.

Asked for by an administrator, or because a model says that it is outdated.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from kleash.base.errors import KleashError
from kleash.reward.config import RewardConfig
from kleash.reward.load import load_model
from kleash.reward.model import RewardModel
from kleash.reward.shelf import ModelShelf
from kleash.reward.v1 import admin_pb2
from kleash.rpc.errors import InvalidRequest, PreconditionFailed

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""Between two looks for outdated models."""


class ModelReplacer:
    """Replaces the models of a shelf."""

    def __init__(self, shelf: ModelShelf, config: RewardConfig) -> None:
        self._shelf = shelf
        self._config = config
        self._entries = config.entries()
        self._one_at_a_time = asyncio.Lock()
        self._loads: set[asyncio.Task[admin_pb2.LoadModelResponse]] = set()
        self._watch: asyncio.Task[None] | None = None

    async def load(self, name: str, folder: str, revision: str) -> admin_pb2.LoadModelResponse:
        """Load ``name`` from ``folder``, empty for what has none, and switch to it.

        A load goes on when its caller is gone, and the same call again waits for it and finds the
        model served. Raises ServiceError or UserError, with nothing changed.
        """
        name = name or self._shelf.default_name
        self._shelf.slot(name)
        path = self._folder(name, folder)
        load = asyncio.ensure_future(self._load(name, path, revision))
        self._loads.add(load)
        load.add_done_callback(self._forget)
        return await asyncio.shield(load)

    def start(self) -> None:
        """Begin to look for outdated models."""
        self._watch = asyncio.create_task(self._reload_outdated(), name="outdated models")

    def stop(self) -> None:
        """Look no more. A load that is under way ends by itself; the shelf refuses its model."""
        if self._watch is not None:
            self._watch.cancel()

    async def _reload_outdated(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for name in self._entries:
                if not self._shelf.find(name, "").model.is_outdated:
                    continue
                try:
                    await self._load(name, None, "")
                except KleashError as error:
                    logger.warning("model '%s' is outdated and cannot be loaded: %s", name, error)

    async def _load(
        self, name: str, folder: Path | None, revision: str
    ) -> admin_pb2.LoadModelResponse:
        async with self._one_at_a_time:
            model = await asyncio.to_thread(self._read, name, folder)
            try:
                return await self._switch(name, model, revision)
            except BaseException:
                model.close()
                raise

    async def _switch(
        self, name: str, model: RewardModel, revision: str
    ) -> admin_pb2.LoadModelResponse:
        if revision and model.facts.revision != revision:
            raise PreconditionFailed(
                f"what was loaded is revision {model.facts.revision} and the call asks for "
                f"{revision}; nothing was changed.",
                reason="REVISION_MISMATCH",
                field="revision",
                metadata={"requested": revision, "found": model.facts.revision},
            )
        shelved = self._shelf.find(name, "")
        if shelved.model.facts.revision == model.facts.revision and not shelved.model.is_outdated:
            model.close()
            return admin_pb2.LoadModelResponse(model=shelved.requests.served)
        previous = await self._shelf.switch(name, model)
        return admin_pb2.LoadModelResponse(model=model.served, previous=previous)

    def _read(self, name: str, folder: Path | None) -> RewardModel:
        config = self._entries[name]
        if folder is not None:
            config = config.model_copy(update={"model": folder})
        return load_model(name, config, self._config.limits)

    def _folder(self, name: str, text: str) -> Path | None:
        """Where the model is read from; raises InvalidRequest when it may not be."""
        kind = self._entries[name].kind
        if kind == "ensemble":
            members = ", ".join(self._entries[name].ensemble)
            raise InvalidRequest(
                f"'{name}' is an ensemble: load one of its members ({members}), and it follows.",
                field="model",
            )
        if kind != "model":
            if text:
                raise InvalidRequest(
                    f"'{name}' is a {kind} and has no folder; leave folder empty to load it anew.",
                    field="folder",
                )
            return None
        folder = Path(text).resolve() if "\0" not in text else None
        allowed = [Path(each).resolve() for each in self._config.model_folders]
        if not text or not folder or not any(folder.is_relative_to(each) for each in allowed):
            raise InvalidRequest(
                f"folder '{text}' is not inside of this server's reward.model_folders "
                f"({', '.join(map(str, allowed)) or 'there are none'}).",
                field="folder",
            )
        return folder

    def _forget(self, load: asyncio.Task[admin_pb2.LoadModelResponse]) -> None:
        self._loads.discard(load)
        if not load.cancelled() and (error := load.exception()) is not None:
            logger.warning("a model was not loaded: %s", error)
