"""A frozen model behind a gRPC service: the life cycle that reward and reference share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import ClassVar, Generic, Protocol, TypeVar

import grpc

from kleash.base import metrics
from kleash.rpc.batcher import Batcher
from kleash.rpc.requests import Limits

J = TypeVar("J")
R = TypeVar("R")

# Tokenizers and numpy release the interpreter lock; a second thread keeps a large text from
# holding up the requests behind it.
NUM_REQUEST_THREADS = 2


class ServedFacts(Protocol):
    """What identifies a loaded model."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def tokenizer_sha256(self) -> str: ...


class ScoringService(ABC, Generic[J, R]):
    """Implements kleash.rpc.service.Service over a model, a batcher and request threads."""

    name: ClassVar[str]
    """Short name, which labels the metrics."""
    full_names: ClassVar[tuple[str, ...]]
    """gRPC service names."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._batcher: Batcher[J, R] | None = None
        self._threads = ThreadPoolExecutor(NUM_REQUEST_THREADS, f"kleash-{self.name}-requests")
        self._facts: ServedFacts | None = None
        self._is_started = False

    @abstractmethod
    def load_model(self) -> ServedFacts:
        """Load, check and warm up the model. Raises UserError."""

    @abstractmethod
    def compute(self, jobs: list[J]) -> list[R]:
        """Answer one batch; runs in the model thread."""

    @abstractmethod
    def size(self, job: J) -> int:
        """Tokens of one job."""

    @abstractmethod
    def add_servicer(
        self, server: grpc.aio.Server, batcher: Batcher[J, R], threads: Executor
    ) -> None:
        """Register the servicer."""

    def load(self) -> None:
        """Load the model and warm it up. Blocks. Raises UserError."""
        facts = self._facts = self.load_model()
        metrics.MODEL_INFO.labels(
            self.name, facts.name, facts.revision, facts.dtype, facts.tokenizer_sha256
        ).set(1)

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer to ``server``; after load."""
        assert self._facts is not None, "register() before load()"
        self._batcher = Batcher(
            self.compute,
            size=self.size,
            max_batch_tokens=self._limits.max_batch_tokens,
            max_queued_tokens=self._limits.max_queued_tokens,
            service=self.name,
            model_name=self._facts.name,
        )
        self.add_servicer(server, self._batcher, self._threads)

    async def start(self) -> None:
        """Start the batcher; after register."""
        assert self._batcher is not None, "start() before register()"
        await self._batcher.start()
        self._is_started = True

    def is_ready(self, full_name: str) -> bool:  # noqa: ARG002
        """Whether the model is loaded and the batcher runs."""
        return self._is_started

    def heartbeat_age_s(self) -> float:
        """Age of the model thread's last sign of life; 0 when it is idle."""
        return self._batcher.heartbeat_age_s() if self._batcher is not None else 0.0

    async def stop(self) -> None:
        """Finish running work and refuse new work."""
        self._is_started = False
        if self._batcher is not None:
            await self._batcher.stop()
        self._threads.shutdown(wait=False)
