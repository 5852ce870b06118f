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
from kleash.reward.config import RewardModelConfig
from kleash.reward.ensemble import Ensemble
from kleash.reward.model import RawScore, RewardModel, ScoreJob
from kleash.reward.requests import RewardRequests
from kleash.rpc.batcher import Batcher
from kleash.rpc.errors import NotFound, Unavailable
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
    """Ends the holding of the previous one."""

    @property
    def held(self) -> list[ShelvedModel]:
        """The newest revision, and the one before it when there is one."""
        return [self.newest] if self.previous is None else [self.newest, self.previous]

    def forget_expiry(self) -> None:
        """Stop the clock of the previous revision."""
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None


class ModelShelf:
    """Finds the model of a call, and replaces models while calls go on."""

    def __init__(
        self,
        models: Mapping[str, RewardModel],
        limits: Limits,
        *,
        default_name: str,
        keep_previous_s: float,
        ensembles: Mapping[str, RewardModelConfig] | None = None,
    ) -> None:
        """Args:
        ensembles: those among the models, members before ensembles of ensembles; they are made
            anew when a member is switched.
        """
        self.default_name = default_name
        self._limits = limits
        self._keep_previous_s = keep_previous_s
        self._ensembles = dict(ensembles or {})
        self._thread = ModelThread(SERVICE)
        self._slots = {name: _Slot(self._shelve(model)) for name, model in models.items()}
        self._closing: set[asyncio.Task[None]] = set()
        self._is_stopped = False
        self._infos: set[tuple[str, ...]] = set()
        self._show_infos()

    async def start(self) -> None:
        """Begin to compute."""
        self._thread.start()
        for slot in self._slots.values():
            await slot.newest.batcher.start()

    async def stop(self) -> None:
        """Finish what is queued, refuse the rest, close the models."""
        self._is_stopped = True
        for slot in self._slots.values():
            slot.forget_expiry()
        for shelved in self._held:
            await self._close(shelved)
        if self._closing:
            await asyncio.wait(self._closing)
        self._show_infos()
        self._thread.stop()

    def heartbeat_age_s(self) -> float:
        """Seconds since the last sign of life of the slowest model; 0 when all are idle.

        A model that waits for others has a time limit of its own, however long.
        """
        busy = [shelved for shelved in self._held if shelved.model.uses_model_thread]
        return max((shelved.batcher.heartbeat_age_s() for shelved in busy), default=0.0)

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
        if not revision:
            return slot.newest
        for shelved in slot.held:
            if shelved.model.facts.revision == revision:
                return shelved
        have = ", ".join(shelved.model.facts.revision for shelved in slot.held)
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

        Ensembles of it are switched at the same time. Calls that are under way end on the model
        that they began with. Raises Unavailable when the service stops.
        """
        old = self.slot(name).newest
        if self._is_stopped:
            raise Unavailable("the reward service is stopping; try another.", reason="DRAINING")
        changed = self._with_ensembles(name or self.default_name, model)
        for shelved in changed.values():
            await shelved.batcher.start()
        for each, shelved in changed.items():
            self._put(each, shelved)
        self._show_infos()
        return old.requests.served

    def unload(self, name: str, revision: str) -> None:
        """Stop to hold a revision that is not the newest, and ensembles of it. Raises NotFound."""
        slot = self.slot(name)
        if slot.previous is None or slot.previous.model.facts.revision != revision:
            raise NotFound(
                f"revision '{revision}' of '{name or self.default_name}' is not held beside the "
                "newest one.",
                reason="REVISION_NOT_SERVED",
                field="revision",
            )
        self._drop_previous(name or self.default_name)
        self._show_infos()

    def _with_ensembles(self, name: str, model: RewardModel) -> dict[str, ShelvedModel]:
        """What takes the places of a model and of the ensembles that it is in, by name."""
        models = {each: slot.newest.model for each, slot in self._slots.items()}
        models[name] = model
        changed = {name: self._shelve(model)}
        for each, config in self._ensembles.items():
            if not changed.keys().isdisjoint(config.ensemble):
                models[each] = Ensemble.of(each, config, models)
                changed[each] = self._shelve(models[each])
        return changed

    def _put(self, name: str, shelved: ShelvedModel) -> None:
        slot = self._slots[name]
        older, old = slot.previous, slot.newest
        slot.newest, slot.previous = shelved, old
        slot.forget_expiry()
        slot.expiry = asyncio.get_running_loop().call_later(
            self._keep_previous_s, self._expire, name
        )
        if older is not None:
            self._close_soon(older)
        logger.info(
            "model '%s' is now %s and was %s",
            name,
            shelved.model.facts.revision,
            old.model.facts.revision,
        )

    def _ensembles_of(self, name: str) -> list[str]:
        return [each for each, config in self._ensembles.items() if name in config.ensemble]

    @property
    def _held(self) -> list[ShelvedModel]:
        return [shelved for slot in self._slots.values() for shelved in slot.held]

    def _expire(self, name: str) -> None:
        self._drop_previous(name)
        self._show_infos()

    def _drop_previous(self, name: str) -> None:
        """Also of the ensembles of it, which would ask a model that is closed."""
        slot = self._slots[name]
        shelved, slot.previous = slot.previous, None
        slot.forget_expiry()
        if shelved is None:
            return
        for ensemble in self._ensembles_of(name):
            self._drop_previous(ensemble)
        self._close_soon(shelved)

    def _close_soon(self, shelved: ShelvedModel) -> None:
        task = asyncio.ensure_future(self._close(shelved))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, shelved: ShelvedModel) -> None:
        await shelved.batcher.stop()
        shelved.model.close()

    def _show_infos(self) -> None:
        """One line of the metric for each revision that is held; none once stopped."""
        facts = [] if self._is_stopped else [shelved.model.facts for shelved in self._held]
        infos = {
            (SERVICE, each.name, each.revision, each.dtype, each.tokenizer_sha256) for each in facts
        }
        for labels in self._infos - infos:
            metrics.MODEL_INFO.remove(*labels)
        for labels in infos:
            metrics.MODEL_INFO.labels(*labels).set(1)
        self._infos = infos

    def _shelve(self, model: RewardModel) -> ShelvedModel:
        facts = model.facts
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
