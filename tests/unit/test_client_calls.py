"""What the scoring clients do with a list that takes several calls."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kleash.client.reference import ReferenceCalls
from kleash.lm.sequences import TokenSequence
from kleash.lm.tiny import build_causal_lm
from kleash.reference.config import ReferenceConfig
from kleash.reference.local import LocalReference
from kleash.rpc.errors import PreconditionFailed

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit


def test_replicas_with_different_models_never_answer_one_list(world: World, tmp_path: Path) -> None:
    """In the middle of a roll-out a balanced address reaches the old model and the new one."""
    other = tmp_path / "other"
    facts = world.reference.get_model()
    build_causal_lm("llama", vocab_size=facts.vocab_size, seed=5).save_pretrained(other)
    world.reference._scorer.frozen.tokenizer.save_pretrained(other)
    replicas = [world.reference, LocalReference.load(ReferenceConfig(model=other))]
    turns = itertools.cycle(replicas)

    def balanced(method: str, request: Any) -> Any:
        if method == "GetModel":
            facts.limits.max_items = 1  # one sequence a call
            return facts
        return next(turns)._answer(method, request)

    sequences = [TokenSequence(np.array([5, 6, 7], np.int32), 1)] * 2
    asked: dict[str, Any] = {"temperature": 1.0, "tokenizer_sha256": facts.tokenizer_sha256}
    balanced_reference = ReferenceCalls(balanced)
    with pytest.raises(PreconditionFailed, match="replicas with different models") as caught:
        balanced_reference.log_probs(sequences, **asked)
    assert caught.value.reason == "REVISION_CHANGED"
    assert len(balanced_reference.log_probs(sequences[:1], **asked)) == 1
