"""Loading new revisions of the served models, for callers who may."""

# gRPC names the methods and fixes their arguments.
# ruff: noqa: N802, ARG002

from __future__ import annotations

import asyncio
import logging
from fnmatch import fnmatchcase
from pathlib import Path

import grpc

from kleash.reward.config import RewardConfig
from kleash.reward.load import load_model
from kleash.reward.model import RewardModel
from kleash.reward.shelf import ModelShelf
from kleash.reward.v1 import admin_pb2, admin_pb2_grpc
from kleash.rpc.auth import caller
from kleash.rpc.errors import InvalidRequest, PermissionDenied, PreconditionFailed

logger = logging.getLogger(__name__)


class RewardAdminServicer(admin_pb2_grpc.RewardAdminServiceServicer):
    """Answers kleash.reward.v1.RewardAdminService."""

    def __init__(self, shelf: ModelShelf, config: RewardConfig) -> None:
        self._shelf = shelf
        self._config = config
        self._one_at_a_time = asyncio.Lock()
        self._loads: set[asyncio.Task[admin_pb2.LoadModelResponse]] = set()

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.LoadModelResponse:
        """Load a revision beside the served one, and switch to it.

        A load goes on when its caller is gone, and the same call again waits for it and finds the
        model served.
        """
        self._check_caller()
        folder = self._folder(request.folder)
        name = request.model or self._shelf.default_name
        self._shelf.slot(name)
        load = asyncio.ensure_future(self._load(name, folder, request.revision))
        self._loads.add(load)
        load.add_done_callback(self._forget)
        return await asyncio.shield(load)

    async def UnloadRevision(
        self, request: admin_pb2.UnloadRevisionRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.UnloadRevisionResponse:
        """Stop to hold the revision before the newest."""
        self._check_caller()
        self._shelf.unload(request.model, request.revision)
        return admin_pb2.UnloadRevisionResponse()

    async def _load(self, name: str, folder: Path, revision: str) -> admin_pb2.LoadModelResponse:
        async with self._one_at_a_time:
            model = await asyncio.to_thread(self._read, name, folder)
            try:
                return await self._switch(name, model, folder, revision)
            except BaseException:
                model.close()
                raise

    async def _switch(
        self, name: str, model: RewardModel, folder: Path, revision: str
    ) -> admin_pb2.LoadModelResponse:
        if revision and model.facts.revision != revision:
            raise PreconditionFailed(
                f"{folder} holds revision {model.facts.revision} and the call asks for "
                f"{revision}; nothing was changed.",
                reason="REVISION_MISMATCH",
                field="revision",
                metadata={"requested": revision, "found": model.facts.revision},
            )
        served = self._shelf.find(name, "").requests.served
        if served.revision == model.facts.revision:
            model.close()
            return admin_pb2.LoadModelResponse(model=served)
        previous = await self._shelf.switch(name, model)
        return admin_pb2.LoadModelResponse(model=model.served, previous=previous)

    def _read(self, name: str, folder: Path) -> RewardModel:
        config = self._config.entries()[name].model_copy(update={"model": folder})
        return load_model(name, config, self._config.limits)

    def _forget(self, load: asyncio.Task[admin_pb2.LoadModelResponse]) -> None:
        self._loads.discard(load)
        if not load.cancelled() and (error := load.exception()) is not None:
            logger.warning("a model was not loaded: %s", error)

    def _check_caller(self) -> None:
        if not any(fnmatchcase(caller(), pattern) for pattern in self._config.admins):
            raise PermissionDenied(
                f"'{caller()}' may not change what this server serves; its operator lets in who "
                "is in reward.admins.",
                reason="CALLER_NOT_ALLOWED",
            )

    def _folder(self, text: str) -> Path:
        folder = Path(text).resolve()
        allowed = [Path(each).resolve() for each in self._config.model_folders]
        if not text or not any(folder.is_relative_to(each) for each in allowed):
            raise InvalidRequest(
                f"folder '{text}' is not inside of this server's reward.model_folders "
                f"({', '.join(map(str, allowed))}).",
                field="folder",
            )
        return folder
