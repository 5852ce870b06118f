"""Changing what is served, for callers who may. What it means is in replace.py."""

# gRPC names the methods and fixes their arguments.
# ruff: noqa: N802, ARG002

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import grpc

from kleash.reward.replace import ModelReplacer
from kleash.reward.shelf import ModelShelf
from kleash.reward.v1 import admin_pb2, admin_pb2_grpc
from kleash.rpc.auth import caller
from kleash.rpc.errors import PermissionDenied


class RewardAdminServicer(admin_pb2_grpc.RewardAdminServiceServicer):
    """Answers kleash.reward.v1.RewardAdminService."""

    def __init__(self, shelf: ModelShelf, replacer: ModelReplacer, admins: Sequence[str]) -> None:
        self._shelf = shelf
        self._replacer = replacer
        self._admins = admins

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.LoadModelResponse:
        """Load a revision beside the served one, and switch to it."""
        self._check_caller()
        return await self._replacer.load(request.model, request.folder, request.revision)

    async def UnloadRevision(
        self, request: admin_pb2.UnloadRevisionRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.UnloadRevisionResponse:
        """Stop to hold the revision before the newest."""
        self._check_caller()
        self._shelf.unload(request.model, request.revision)
        return admin_pb2.UnloadRevisionResponse()

    def _check_caller(self) -> None:
        if not any(fnmatchcase(caller(), pattern) for pattern in self._admins):
            raise PermissionDenied(
                f"'{caller()}' may not change what this server serves; its operator lets in who "
                "is in reward.admins.",
                reason="CALLER_NOT_ALLOWED",
            )
