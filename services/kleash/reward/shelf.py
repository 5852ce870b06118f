"""The models that a service holds, by name: the newest revision of each, and the one before it.

       switch(): new revision ─► newest ─► previous ─► stopped when its queue is empty
                                 takes calls  takes the calls
                                 of any kind  that name it

Everything but ``compute`` runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from kleash.base import metrics
from kleash.common.v1 import common_pb2
from kleash.reward.model import RawScore, RewardModel, ScoreJob
from kleash.reward.requests import RewardRequests
from kleash.rpc.batcher import Batcher
from kleash.rpc.errors import NotFound
from kleash.rpc.model_thread import ModelThread
from kleash.rpc.requests import Limits

logger = logging.getLogger(__name__)

SERVICE = "reward"
"""Label of the metrics."""


@dataclass(frozen=True, eq=False)
class ShelvedModel:
    """One revision of a model, with its queue."""

    model: RewardModel
    requests: RewardRequests
    batcher: Batcher[ScoreJob, RawScore]


@dataclass(eq=False)
class _Slot:
    """The revisions of one name."""

    newest: ShelvedModel
    previous: ShelvedModel | None = None
    expiry: asyncio.TimerHandle | None = None


class ModelShelf:
    """Finds the model of a call, and replaces models while calls go on."""

    def __init__(
        self,
        models: Mapping[str, RewardModel],
        limits: Limits,
        *,
        default_name: str,
        keep_previous_s: float,
    ) -> None:
        self.default_name = default_name
        self._limits = limits
        self._keep_previous_s = keep_previous_s
        self._thread = ModelThread(SERVICE)
        self._slots = {name: _Slot(self._shelve(model)) for name, model in models.items()}
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to compute."""
        self._thread.start()
        for slot in self._slots.values():
            await slot.newest.batcher.start()

    async def stop(self) -> None:
        """Finish what is queued, refuse the rest, close the models."""
        for slot in self._slots.values():
            for shelved in (slot.newest, slot.previous):
                if shelved is not None:
                    await self._close(shelved)
            if slot.expiry is not None:
                slot.expiry.cancel()
        if self._closing:
            await asyncio.wait(self._closing)
        self._thread.stop()

    def heartbeat_age_s(self) -> float:
        """Seconds since the last sign of life of the slowest model; 0 when all are idle."""
        return max(
            shelved.batcher.heartbeat_age_s()
            for slot in self._slots.values()
            for shelved in (slot.newest, slot.previous)
            if shelved is not None
        )

    @property
    def served(self) -> list[common_pb2.ServedModel]:
        """The newest revision of each model, the default one first."""
        names = sorted(self._slots, key=lambda name: (name != self.default_name, name))
        return [self._slots[name].newest.requests.served for name in names]

    def find(self, name: str, revision: str) -> ShelvedModel:
        """The model for a call; empty means the default one, and its newest revision.

        Raises NotFound.
        """
        slot = self.slot(name)
        held = [each for each in (slot.newest, slot.previous) if each is not None]
        if not revision:
            return slot.newest
        for shelved in held:
            if shelved.model.facts.revision == revision:
                return shelved
        have = ", ".join(shelved.model.facts.revision for shelved in held)
        raise NotFound(
            f"revision '{revision}' is not served here; this server has {have} of "
            f"'{name or self.default_name}'.",
            reason="REVISION_NOT_SERVED",
            field="revision",
            metadata={"requested": revision, "served": slot.newest.model.facts.revision},
        )

    def slot(self, name: str) -> _Slot:
        """The revisions of one name. Raises NotFound."""
        slot = self._slots.get(name or self.default_name)
        if slot is None:
            have = ", ".join(f"'{served.name}'" for served in self.served)
            raise NotFound(
                f"model '{name}' is not served here; this server has {have}.",
                reason="MODEL_NOT_SERVED",
                field="model",
                metadata={"requested": name, "served": self.default_name},
            )
        return slot

    async def switch(self, name: str, model: RewardModel) -> common_pb2.ServedModel:
        """Serve ``model``, loaded and warm, as ``name`` from now on; returns what it follows.

        Calls that are under way end on the model that they began with.
        """
        slot = self.slot(name)
        shelved = self._shelve(model)
        await shelved.batcher.start()
        old, older = slot.newest, slot.previous
        slot.newest, slot.previous = shelved, old
        if older is not None:
            self._close_soon(older)
        if slot.expiry is not None:
            slot.expiry.cancel()
        slot.expiry = asyncio.get_running_loop().call_later(
            self._keep_previous_s, self._expire, slot, old
        )
        logger.info(
            "model '%s' is now %s and was %s",
            name or self.default_name,
            model.facts.revision,
            old.model.facts.revision,
        )
        return old.requests.served

    def unload(self, name: str, revision: str) -> None:
        """Stop to hold a revision that is not the newest. Raises NotFound."""
        slot = self.slot(name)
        if slot.previous is None or slot.previous.model.facts.revision != revision:
            raise NotFound(
                f"revision '{revision}' of '{name or self.default_name}' is not held beside the "
                "newest one.",
                reason="REVISION_NOT_SERVED",
                field="revision",
            )
        self._expire(slot, slot.previous)

    def _expire(self, slot: _Slot, shelved: ShelvedModel) -> None:
        if slot.previous is shelved:
            slot.previous = None
            self._close_soon(shelved)

    def _close_soon(self, shelved: ShelvedModel) -> None:
        task = asyncio.ensure_future(self._close(shelved))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, shelved: ShelvedModel) -> None:
        await shelved.batcher.stop()
        shelved.model.close()
        facts = shelved.model.facts
        metrics.MODEL_INFO.remove(
            SERVICE, facts.name, facts.revision, facts.dtype, facts.tokenizer_sha256
        )

    def _shelve(self, model: RewardModel) -> ShelvedModel:
        facts = model.facts
        metrics.MODEL_INFO.labels(
            SERVICE, facts.name, facts.revision, facts.dtype, facts.tokenizer_sha256
        ).set(1)
        batcher: Batcher[ScoreJob, RawScore] = Batcher(
            model.compute,
            size=lambda job: job.num_tokens,
            max_batch_tokens=self._limits.max_batch_tokens,
            max_queued_tokens=self._limits.max_queued_tokens,
            service=SERVICE,
            model_name=facts.name,
            thread=self._thread if model.uses_model_thread else None,
        )
        return ShelvedModel(model, RewardRequests(model, self._limits), batcher)
