"""The served policy: the model, the thread that decodes with it, and the weights that reach it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kleash.base import metrics
from kleash.base.errors import ModelError
from kleash.lm.decode import Decoder, DecodeRequest
from kleash.lm.frozen import FrozenModel, load_frozen
from kleash.lm.generate import check_decodable
from kleash.lm.load import load_causal_lm
from kleash.policy.config import DEFAULT_SEQUENCE_TOKENS, PolicyConfig
from kleash.policy.decode_loop import DecodeLoop
from kleash.policy.replica import WeightsReplica
from kleash.policy.requests import PolicyRequests
from kleash.weights.spool import Spool


@dataclass(frozen=True, eq=False)
class Engine:
    """What the service and its in-process twin share."""

    frozen: FrozenModel
    """The model as it was loaded; its weights change with every publish, in place."""
    loop: DecodeLoop
    weights: WeightsReplica
    requests: PolicyRequests

    @staticmethod
    def load(config: PolicyConfig) -> Engine:
        """Load the model, check that it can be decoded and start the decoding thread.

        Raises ModelError with the place and the remedy.
        """
        frozen = load_frozen(
            config,
            load_causal_lm,
            max_item_tokens=config.limits.max_item_tokens,
            max_batch_tokens=config.limits.max_batch_tokens,
        )
        max_length = frozen.max_item_tokens
        if not config.limits.max_item_tokens:
            max_length = min(max_length, DEFAULT_SEQUENCE_TOKENS)
        check_decodable(frozen.model)

        def make_decoder() -> Decoder:
            decoder = Decoder(
                frozen.model,
                max_slots=config.max_running_sequences,
                max_length=max_length,
                max_batch_tokens=config.limits.max_batch_tokens,
            )
            _warm_up(decoder)
            return decoder

        try:
            loop = DecodeLoop(
                make_decoder,
                max_queued_tokens=config.limits.max_queued_tokens,
                model_name=frozen.name,
            )
        except torch.OutOfMemoryError:
            raise ModelError(
                f"keys and values of {config.max_running_sequences} sequences of {max_length} "
                f"tokens do not fit into the memory of {frozen.device} beside the model; lower "
                "max_running_sequences or limits.max_item_tokens."
            ) from None
        try:
            spool = Spool(config.weights.spool)
        except OSError as error:
            raise ModelError(
                f"cannot use the folder {config.weights.spool} for weights: {error.strerror}; set "
                "weights.spool to a writable one."
            ) from None
        weights = WeightsReplica(
            frozen.model,
            loop,
            spool,
            on_served=lambda old, new: _show_model(frozen, old, new),
            awaits_publisher=config.weights.publisher is not None,
        )
        _show_model(frozen, None, frozen.revision)
        requests = PolicyRequests(
            config, frozen, max_sequence_tokens=max_length, served=weights.get_weights
        )
        loop.start()
        return Engine(frozen, loop, weights, requests)

    def close(self) -> None:
        """Finish what runs, end the decoding thread and remove what was spooled."""
        self.loop.stop()
        self.weights.spool.close()


def _show_model(frozen: FrozenModel, old: str | None, new: str) -> None:
    """Export which weights are served; ``old`` are no longer."""
    facts = (frozen.dtype, frozen.tokenizer_sha256)
    if old is not None:
        metrics.MODEL_INFO.remove("policy", frozen.name, old, *facts)
    metrics.MODEL_INFO.labels("policy", frozen.name, new, *facts).set(1)


def _warm_up(decoder: Decoder) -> None:
    """One short response: allocates the keys and values of all slots, so that it fails here."""
    prompt = np.zeros(min(2, decoder.max_length - 1), dtype=np.int32)
    decoder.add([DecodeRequest(prompt, "warm-up", sample_index=0, seed=0, max_new_tokens=1)])
    while decoder.num_active:
        decoder.step()
