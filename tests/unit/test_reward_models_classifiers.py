"""Sequence classifiers of every kind: our scores are transformers' own, in any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.classifier_folders import CAUSAL, ENCODERS, FRAME, TEXTS, WINDOW, write_classifier

from kleash.base.errors import ConfigError, ModelError
from kleash.lm.classifiers import examine
from kleash.lm.heads import Normalization
from kleash.lm.load import load_classifier, max_positions
from kleash.lm.sequences import TokenSequence
from kleash.reward.classifier import ClassifierModel
from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward
from kleash.reward.model import RawScore, ScoreJob

pytestmark = pytest.mark.unit

LENGTHS = (3, 31, 12, 1, 31, 20)
ATOL = 1e-5


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of each kind, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("classifiers"), {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_classifier(root / kind, kind)
        return made[kind]

    return folder


def load(folder: Path, **settings: Any) -> ClassifierModel:
    config = RewardConfig.model_validate({"model": folder} | settings)
    return ClassifierModel.load(config.frozen(), config.limits, config.heads)


def rows(vocab_size: int) -> list[np.ndarray]:
    """Ids of several lengths, without special tokens: transformers finds pads by their id."""
    generator = np.random.default_rng(7)
    return [generator.integers(5, vocab_size - 2, n).astype(np.int32) for n in LENGTHS]


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.inference_mode()
def padded_logits(model: Any, ids: list[np.ndarray], side: str) -> np.ndarray:
    """transformers' own logits of a padded batch with a mask, (B, labels)."""
    longest = max(map(len, ids))
    pad = model.config.pad_token_id
    table = torch.full((len(ids), longest), pad)
    mask = torch.zeros_like(table)
    for row, each in enumerate(ids):
        at = slice(0, len(each)) if side == "right" else slice(longest - len(each), longest)
        table[row, at] = torch.from_numpy(each).long()
        mask[row, at] = 1
    options = {}
    if side == "left":
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=table, attention_mask=mask, **options).logits.numpy()


def jobs(ids: list[np.ndarray], **options: Any) -> list[ScoreJob]:
    return [ScoreJob(each, len(each), **options) for each in ids]


def values(scores: list[RawScore]) -> np.ndarray:
    return np.array([each.score for each in scores])


@pytest.mark.parametrize("kind", [*CAUSAL, *ENCODERS])
def test_scores_are_those_of_transformers(kind: str, folder_of: Callable[[str], Path]) -> None:
    """Alone and batched with longer rows, beyond the sliding window."""
    ours, reference = load(folder_of(kind)), theirs(folder_of(kind))
    ids = rows(ours.frozen.vocab_size)
    assert max(map(len, ids)) > 2 * WINDOW
    with torch.inference_mode():
        alone = [reference(torch.from_numpy(each).long()[None]).logits.item() for each in ids]
    assert np.ptp(alone) > 0.05
    batched = values(ours.compute(jobs(ids)))
    np.testing.assert_allclose(batched, alone, rtol=0, atol=ATOL)
    ours_alone = np.concatenate([values(ours.compute(jobs([each]))) for each in ids])
    np.testing.assert_allclose(ours_alone, alone, rtol=0, atol=ATOL)
    right = padded_logits(reference, ids, "right")[:, 0]
    np.testing.assert_allclose(batched, right, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", CAUSAL)
def test_scores_are_those_of_transformers_with_padding_on_the_left(
    kind: str, folder_of: Callable[[str], Path]
) -> None:
    ours, reference = load(folder_of(kind)), theirs(folder_of(kind))
    ids = rows(ours.frozen.vocab_size)
    left = padded_logits(reference, ids, "left")[:, 0]
    np.testing.assert_allclose(values(ours.compute(jobs(ids))), left, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", CAUSAL)
def test_each_token_of_a_causal_model_scores_its_prefix(
    kind: str, folder_of: Callable[[str], Path]
) -> None:
    ours = load(folder_of(kind))
    assert ours.facts.supports_token_scores
    ids = rows(ours.frozen.vocab_size)[1]
    [score] = ours.compute(jobs([ids], wants_token_scores=True))
    prefixes = values(ours.compute(jobs([ids[: n + 1] for n in range(len(ids))])))
    assert score.token_scores is not None
    np.testing.assert_allclose(score.token_scores, prefixes, rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [*CAUSAL, *ENCODERS])
def test_what_a_model_is_is_found_out_in_every_data_type(
    kind: str, dtype: str, folder_of: Callable[[str], Path]
) -> None:
    ours = load(folder_of(kind), dtype=dtype)
    assert ours.facts.supports_token_scores == (kind in CAUSAL)
    exact = load(folder_of(kind))
    ids = rows(exact.frozen.vocab_size)
    near = {"float32": ATOL, "float16": 0.05, "bfloat16": 0.3}[dtype]
    expected = values(exact.compute(jobs(ids)))
    np.testing.assert_allclose(values(ours.compute(jobs(ids))), expected, rtol=near, atol=near)


@pytest.mark.parametrize("kind", [*CAUSAL, *ENCODERS])
def test_a_service_gives_the_same_scores_however_items_arrive(
    kind: str, folder_of: Callable[[str], Path]
) -> None:
    """Through requests: token ids, with and without isolation."""
    local, reference = (
        LocalReward.load(RewardConfig(model=folder_of(kind))),
        theirs(folder_of(kind)),
    )
    model = local.model
    assert isinstance(model, ClassifierModel)
    ids = rows(model.frozen.vocab_size)
    expected = padded_logits(reference, ids, "right")[:, 0]
    for isolate in (False, True):
        scores = local.score_tokens(
            [TokenSequence(each, 0) for each in ids],
            tokenizer_sha256=model.facts.tokenizer_sha256,
            isolate=isolate,
        )
        np.testing.assert_allclose([s.score for s in scores], expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_model_without_a_pad_id_is_scored_in_batches(kind: str, tmp_path: Path) -> None:
    """transformers itself refuses a second row."""
    folder = write_classifier(tmp_path / kind, kind, has_pad_id=False)
    ours, reference = load(folder), theirs(folder)
    ids = rows(ours.frozen.vocab_size)
    with torch.inference_mode():
        alone = [reference(torch.from_numpy(each).long()[None]).logits.item() for each in ids]
    np.testing.assert_allclose(values(ours.compute(jobs(ids))), alone, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_reads_text_as_its_tokenizer_frames_it(
    kind: str, folder_of: Callable[[str], Path]
) -> None:
    local, reference = (
        LocalReward.load(RewardConfig(model=folder_of(kind))),
        theirs(folder_of(kind)),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of(kind))
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        expected = reference(**batch).logits[:, 0].numpy()
    scores = [each.score for each in local.score_texts(TEXTS)]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=ATOL)
    framed = [f"{FRAME[0]}{text}{FRAME[1]}" for text in TEXTS]
    assert [each.score for each in local.score_texts(framed)] == scores


def test_two_texts_for_an_encoder_are_joined_by_its_separator(
    folder_of: Callable[[str], Path],
) -> None:
    """As published encoders that take a question and an answer were trained."""
    local, reference = (
        LocalReward.load(RewardConfig(model=folder_of("deberta-v2"))),
        theirs(folder_of("deberta-v2")),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of("deberta-v2"))
    pair = tokenizer(TEXTS[0], TEXTS[1], return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        expected = reference(**pair).logits.item()
    [score] = local.score_texts([f"{TEXTS[0]}{FRAME[1]}{TEXTS[1]}"])
    assert score.score == pytest.approx(expected, abs=ATOL)


def test_a_conversation_for_an_encoder_is_framed(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0]['content'] }}[SEP]{{ messages[1]['content'] }}")
    local = LocalReward.load(RewardConfig(model=folder_of("deberta-v2"), chat_template=template))
    talk = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}]
    assert local.score_conversations([talk])[0].score == (
        local.score_texts([f"{TEXTS[0]}[SEP]{TEXTS[1]}"])[0].score
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_an_encoders_frame(side: Any, folder_of: Callable[[str], Path]) -> None:
    limited = RewardConfig.model_validate(
        {"model": folder_of("bert"), "limits": {"max_item_tokens": 6}}
    )
    local = LocalReward.load(limited)
    model = local.model
    assert isinstance(model, ClassifierModel)
    [score] = local.score_texts([TEXTS[2]], truncation=side)
    assert (score.is_truncated, score.token_count) == (True, 6)
    first, last = (model.frozen.tokenizer.convert_tokens_to_ids(each) for each in FRAME)
    plain = model.frozen.tokenizer(TEXTS[2], add_special_tokens=False)["input_ids"]
    kept = plain[-4:] if side == "left" else plain[:4]
    [expected] = model.compute(jobs([np.array([first, *kept, last], dtype=np.int32)]))
    assert score.score == pytest.approx((expected.score), abs=ATOL)


def test_positions_of_roberta_end_before_those_of_its_table(
    folder_of: Callable[[str], Path],
) -> None:
    """Its first position is the one after the pad's."""
    model = load_classifier(folder_of("roberta"))
    longest = max_positions(model)
    assert longest == 128 - model.config.pad_token_id - 1
    ours = load(folder_of("roberta"))
    assert ours.facts.max_item_tokens == longest
    [score] = ours.compute(jobs([np.full(longest, 7, dtype=np.int32)]))
    assert np.isfinite(score.score)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_the_problem_type_changes_no_score(problem_type: str, tmp_path: Path) -> None:
    """Raw logits: neither sigmoid nor softmax."""
    plain = load(write_classifier(tmp_path / "plain", "bert"))
    typed = load(write_classifier(tmp_path / "typed", "bert", problem_type=problem_type))
    ids = rows(plain.frozen.vocab_size)
    assert values(plain.compute(jobs(ids))).tolist() == values(typed.compute(jobs(ids))).tolist()


LABELS = ("helpful", "harmless", "honest")
HEADS = {"honest": 0.25, "helpful": -2.0}


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_the_score_of_several_labels_is_their_weighted_sum(kind: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / kind, kind, labels=LABELS)
    ours, reference = load(folder, heads=HEADS), theirs(folder)
    assert [(c.name, c.weight) for c in ours.facts.components] == [
        ("helpful", -2.0),
        ("honest", 0.25),
    ]
    ids = rows(ours.frozen.vocab_size)
    logits = padded_logits(reference, ids, "right")
    scores = ours.compute(jobs(ids))
    np.testing.assert_allclose([s.components for s in scores], logits[:, [0, 2]], atol=ATOL)
    expected = -2.0 * logits[:, 0] + 0.25 * logits[:, 2]
    np.testing.assert_allclose(values(scores), expected, rtol=0, atol=ATOL)


def test_token_scores_and_normalization_are_of_the_sum(tmp_path: Path) -> None:
    folder = write_classifier(
        tmp_path / "llama",
        "llama",
        labels=LABELS,
        kleash_normalization={"mean": 0.5, "std": 4.0},
    )
    local = LocalReward.load(RewardConfig.model_validate({"model": folder, "heads": HEADS}))
    raw = local.score_texts(TEXTS, normalize=False, return_token_scores=True)
    normalized = local.score_texts(TEXTS)
    for before, after in zip(raw, normalized, strict=True):
        assert before.token_scores is not None
        assert before.token_scores[-1] == pytest.approx(before.score, abs=1e-6)
        assert before.score == pytest.approx(
            -2.0 * before.components["helpful"] + 0.25 * before.components["honest"], abs=1e-5
        )
        assert after.score == pytest.approx((before.score - 0.5) / 4.0, abs=1e-6)
        assert after.components == before.components
    assert Normalization.of(load_classifier(folder).config) == Normalization(0.5, 4.0)


def test_weights_are_part_of_the_revision(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "llama", "llama", labels=LABELS)
    choices = [HEADS, HEADS | {"honest": 0.5}, {"honest": 0.25}, dict(reversed(HEADS.items()))]
    revisions = [load(folder, heads=heads).facts.revision for heads in choices]
    assert len(set(revisions)) == 3
    assert revisions[0] == revisions[3]
    assert all(len(each) == len("sha256:") + 64 for each in revisions)


def test_labels_without_names_take_those_of_the_heads(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "m", "llama", labels=("LABEL_0", "LABEL_1"))
    named = load(folder, heads={"kind": 1.0, "brief": 3.0})
    assert [c.name for c in named.facts.components] == ["kind", "brief"]
    by_label = load(folder, heads={"LABEL_0": 1.0, "LABEL_1": 3.0})
    ids = rows(named.frozen.vocab_size)
    assert values(named.compute(jobs(ids))).tolist() == values(by_label.compute(jobs(ids))).tolist()
    with pytest.raises(ConfigError, match=r"heads names kind, and .* has LABEL_0, LABEL_1; use"):
        load(folder, heads={"kind": 1.0})


@pytest.mark.parametrize(
    ("labels", "heads", "message"),
    [
        (LABELS, {}, r"has 3 labels \(helpful, harmless, honest\); set heads to the weight"),
        (LABELS, {"kind": 1.0}, r"heads names kind, and .* has helpful, harmless, honest; use"),
        (("score",), {"score": 1.0}, "has one label, so heads has no effect"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    tmp_path: Path, labels: tuple[str, ...], heads: dict[str, float], message: str
) -> None:
    folder = write_classifier(tmp_path / "m", "llama", labels=labels)
    with pytest.raises(ConfigError, match=message):
        load(folder, heads=heads)


def test_a_causal_looking_model_that_sees_later_tokens_is_an_encoder(tmp_path: Path) -> None:
    """Gemma 3 can be configured so; its name does not tell."""
    folder = write_classifier(tmp_path / "gemma", "gemma3_text", use_bidirectional_attention=True)
    ours, reference = load(folder), theirs(folder)
    assert not ours.facts.supports_token_scores
    ids = rows(ours.frozen.vocab_size)
    with torch.inference_mode():
        alone = [reference(torch.from_numpy(each).long()[None]).logits.item() for each in ids]
    np.testing.assert_allclose(values(ours.compute(jobs(ids))), alone, rtol=0, atol=ATOL)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    config.num_labels = 1
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ModelError, match="an encoder with a decoder, which is not served"):
        examine(model, tmp_path, pad_id=0)
