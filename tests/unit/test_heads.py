"""Scalar heads: facts/ppo.md checklist R1-R3, R8-R10 and section 4, rows 4-7, 10, 12 and 27."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kleash.base.errors import ModelError
from kleash.lm.heads import (
    Normalization,
    ValueModel,
    check_scalar_head,
    last_token_scores,
    position_scores,
    reward_model_from_causal_lm,
)
from kleash.lm.load import (
    load_causal_lm,
    load_sequence_classifier,
    load_tokenizer,
    save_checkpoint_folder,
)
from kleash.lm.sequences import TokenSequence, pack
from kleash.lm.tiny import Kind

pytestmark = pytest.mark.unit

KINDS: tuple[Kind, ...] = ("llama", "qwen2", "gpt2")
PAD = 0


@pytest.fixture(scope="module")
def reward_models(tiny_folders: dict[Kind, Path]) -> dict[Kind, Any]:
    models: dict[Kind, Any] = {
        kind: reward_model_from_causal_lm(tiny_folders[kind], seed=3) for kind in KINDS
    }
    for model in models.values():
        model.config.pad_token_id = PAD
    return models


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    random = np.random.default_rng(11)
    return [
        TokenSequence(random.integers(5, 300, length).astype(np.int32), start)
        for length, start in [(9, 3), (21, 12), (5, 4), (1, 1), (14, 1)]
    ]


def changed_config(folder: Path, target: Path, **values: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_score_equals_transformers_classifier(
    reward_models: dict[Kind, Any], sequences: list[TokenSequence], kind: Kind
) -> None:
    """R3: transformers' own sequence-classification output, row by row and right-padded."""
    model, batch = reward_models[kind], pack(sequences)
    mask = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    with torch.no_grad():
        scores = last_token_scores(model, batch)
        together = model(input_ids=batch.ids, attention_mask=mask.long()).logits.squeeze(-1)
        alone = [
            model(input_ids=torch.from_numpy(s.ids.astype(np.int64))[None]).logits.item()
            for s in sequences
        ]
    torch.testing.assert_close(scores, together, atol=1e-5, rtol=0)
    np.testing.assert_allclose(scores.numpy(), alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_score_does_not_depend_on_neighbours(
    reward_models: dict[Kind, Any], sequences: list[TokenSequence], kind: Kind
) -> None:
    """Rows 4, 5, 7: alone == in a padded batch; the last column would be wrong by far more."""
    model, batch = reward_models[kind], pack(sequences)
    with torch.no_grad():
        together = last_token_scores(model, batch).numpy()
        alone = np.array([last_token_scores(model, pack([s])).item() for s in sequences])
        last_column = position_scores(model, batch.ids)[:, -1].numpy()
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(last_column - alone).max() > 1e-2


def test_end_token_counts_whatever_the_pad_id_is(
    reward_models: dict[Kind, Any], sequences: list[TokenSequence]
) -> None:
    """Row 6: with pad == eos, transformers would skip the final eos; our score stays."""
    model = reward_models["llama"]
    ended = [TokenSequence(np.append(s.ids, 1).astype(np.int32), 1) for s in sequences]
    with torch.no_grad():
        before = last_token_scores(model, pack(ended))
        model.config.pad_token_id = 1
        after = last_token_scores(model, pack(ended))
        confused = model(input_ids=pack(ended).ids).logits.squeeze(-1)
        model.config.pad_token_id = PAD
    assert torch.equal(before, after)
    assert (before - confused).abs().max() > 1e-2


def test_position_scores_end_in_the_score(
    reward_models: dict[Kind, Any], sequences: list[TokenSequence]
) -> None:
    batch = pack(sequences)
    with torch.no_grad():
        positions = position_scores(reward_models["qwen2"], batch.ids)
        scores = last_token_scores(reward_models["qwen2"], batch)
    assert positions.shape == batch.ids.shape
    for row, sequence in enumerate(sequences):
        assert positions[row, len(sequence.ids) - 1] == scores[row]


def test_head_computes_in_float32(tiny_folder: Path, sequences: list[TokenSequence]) -> None:
    """R9: bfloat16 weights, float32 head: scores are not rounded to bfloat16."""
    model = reward_model_from_causal_lm(tiny_folder, seed=3, dtype="bfloat16")
    with torch.no_grad():
        scores = last_token_scores(model, pack(sequences))
        full = last_token_scores(reward_model_from_causal_lm(tiny_folder, seed=3), pack(sequences))
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()
    assert (scores - full).abs().max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_warm_start_keeps_the_backbone(tiny_folders: dict[Kind, Path], kind: Kind) -> None:
    """R1: every backbone weight is the causal model's; R2: the head is N(0, 1/sqrt(d + 1))."""
    causal = load_causal_lm(tiny_folders[kind])
    model = reward_model_from_causal_lm(tiny_folders[kind], seed=3)
    backbone = getattr(model, model.base_model_prefix).state_dict()
    for name, tensor in getattr(causal, causal.base_model_prefix).state_dict().items():
        assert torch.equal(backbone[name], tensor), name
    weight = model.score.weight
    again = reward_model_from_causal_lm(tiny_folders[kind], seed=3).score.weight
    other = reward_model_from_causal_lm(tiny_folders[kind], seed=4).score.weight
    assert torch.equal(weight, again)
    assert not torch.equal(weight, other)


def test_head_scale(tiny_folder: Path) -> None:
    """R2: over 10 seeds the standard deviation is 1/sqrt(33), far from 1/33."""
    weights = torch.cat(
        [reward_model_from_causal_lm(tiny_folder, seed=seed).score.weight for seed in range(10)]
    )
    assert weights.std().item() == pytest.approx(33**-0.5, rel=0.15)


def test_dropout_is_off(
    tiny_folders: dict[Kind, Path], sequences: list[TokenSequence], tmp_path: Path
) -> None:
    """Row 10: two forward passes in training mode are equal."""
    folder = changed_config(
        tiny_folders["gpt2"], tmp_path / "gpt2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2
    )
    model = reward_model_from_causal_lm(folder, seed=3).train()
    batch = pack(sequences)
    assert torch.equal(last_token_scores(model, batch), last_token_scores(model, batch))


def test_normalization_travels_with_the_folder(tiny_reward_folder: Path) -> None:
    """Row 27: what was stored is read back by a fresh load."""
    normalization = Normalization.of(load_sequence_classifier(tiny_reward_folder).config)
    assert normalization == Normalization(mean=0.25, std=2.0)
    assert Normalization.of(object()) == Normalization(mean=0.0, std=1.0)


@pytest.mark.parametrize("stored", [{"std": 0.0}, {"mean": float("nan")}, {"mean": "x"}, [1, 2]])
def test_unusable_normalization_is_refused(
    tiny_reward_folder: Path, tmp_path: Path, stored: Any
) -> None:
    folder = changed_config(tiny_reward_folder, tmp_path / "bad", kleash_normalization=stored)
    with pytest.raises(ModelError, match=r"kleash_normalization is .* cannot be used"):
        Normalization.of(load_sequence_classifier(folder).config)


@pytest.mark.parametrize("kind", KINDS)
def test_value_of_last_token_starts_as_normalized_score(
    reward_models: dict[Kind, Any],
    tiny_folders: dict[Kind, Path],
    sequences: list[TokenSequence],
    tmp_path: Path,
    kind: Kind,
) -> None:
    """P1 and N+ detail 22; P2: V_t is read one position before token t."""
    model = reward_models[kind]
    Normalization(-0.5, 3.0).store(model.config)
    save_checkpoint_folder(model, load_tokenizer(tiny_folders[kind]), tmp_path / "rm", {})
    value_model = ValueModel.from_reward_model(tmp_path / "rm")
    batch = pack(sequences)
    with torch.no_grad():
        values = value_model(batch)
        scores = (position_scores(model, batch.ids) + 0.5) / 3.0
    for row, sequence in enumerate(sequences):
        start, length = sequence.response_start, sequence.response_length
        np.testing.assert_allclose(
            values[row, :length], scores[row, start - 1 : start - 1 + length], atol=1e-5
        )
        assert not values[row, length:].any()


def test_model_without_scalar_head_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="no linear one-label head named 'score'"):
        check_scalar_head(load_causal_lm(tiny_folder), tiny_folder)


def test_reward_folder_loads_in_plain_transformers(
    tiny_reward_folder: Path, sequences: list[TokenSequence]
) -> None:
    """The folder is an ordinary AutoModelForSequenceClassification checkpoint with one label."""
    import transformers

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_reward_folder
    ).eval()
    assert theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == PAD
    with torch.no_grad():
        expected = theirs(input_ids=pack(sequences).ids).logits.squeeze(-1)
        scores = last_token_scores(load_sequence_classifier(tiny_reward_folder), pack(sequences))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
