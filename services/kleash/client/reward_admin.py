"""Client for the administrators of a reward service: load a new revision, give back an old one."""

from __future__ import annotations

from kleash.client.calls import remote_call
from kleash.reward.v1 import admin_pb2, admin_pb2_grpc
from kleash.rpc.channel import connect
from kleash.rpc.credentials import Credentials

SERVICE = "kleash.reward.v1.RewardAdminService"


class RewardAdminClient:
    """Talks to one replica of a reward service: each has models of its own."""

    def __init__(
        self, address: str, *, timeout_s: float = 600.0, credentials: Credentials | None = None
    ) -> None:
        """Args:
        address: "host:port" of the replica.
        timeout_s: deadline of a call; a load that takes longer goes on, and the same call again
            waits for it.
        credentials: TLS and token; None takes those of the environment, KLEASH_TLS_* and
            KLEASH_TOKEN*.
        """
        self._channel = connect(
            address, service=SERVICE, methods_to_retry=(), credentials=credentials
        )
        stub = admin_pb2_grpc.RewardAdminServiceStub(self._channel)
        self._call = remote_call(stub, service=SERVICE, address=address, timeout_s=timeout_s)

    def load_model(
        self, folder: str, *, model: str = "", revision: str = ""
    ) -> admin_pb2.LoadModelResponse:
        """Serve the model in ``folder``, a path on the server, as ``model``.

        Args:
            model: name under which it is served; empty means the default model.
            revision: digest that the folder must hold; empty accepts any.

        Raises PermissionDenied for a caller who is no administrator, InvalidRequest for a folder
        outside of those that the server allows, PreconditionFailed for a model that cannot be
        loaded; the model that was served is, still.
        """
        request = admin_pb2.LoadModelRequest(model=model, folder=folder, revision=revision)
        return self._call("LoadModel", request)

    def unload_revision(self, revision: str, *, model: str = "") -> None:
        """Give back the memory of a revision that is not the newest. Raises NotFound."""
        request = admin_pb2.UnloadRevisionRequest(model=model, revision=revision)
        self._call("UnloadRevision", request)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> RewardAdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
