"""Stage 1: the loss, the loop, what it writes and what it refuses. Checklist S1-S8 of the facts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from kleash.base.config import load_config
from kleash.base.errors import ConfigError, DataError, ModelError, UserError
from kleash.base.progress import NullProgress, Progress
from kleash.data.chat import render_response
from kleash.data.shuffle import shuffled
from kleash.lm.digest import model_digest
from kleash.lm.lineage import read_lineage
from kleash.lm.load import load_causal_lm, load_tokenizer
from kleash.lm.sequences import TokenSequence
from kleash.lm.tiny import Kind
from kleash.sft.config import SFTConfig
from kleash.sft.train import SFTReport, train

pytestmark = pytest.mark.unit

PAIRS = [
    ("the quick", " brown fox"),
    ("What is 3 plus 4?", " 3 plus 4 is 7."),
    ("the", " dog"),
    ("Which is bigger, 9 or 12?", " 12 is bigger than 9, and 9 is smaller than 12."),
    ("hello", " world"),
    ("over the lazy", " dog and says hello"),
]


NULL_PROGRESS = NullProgress()
FAST = {"learning_rate": 1e-2, "max_grad_norm": None}


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Demonstrations of quite different lengths."""
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(
    model: Path, data: str, out: Path, progress: Progress = NULL_PROGRESS, **settings: Any
) -> SFTReport:
    settings = {"learning_rate": 1e-3, "batch_size": len(PAIRS), **settings}
    return train(SFTConfig(model=model, data=data, out=out, **settings), progress)


def steps(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sequences(folder: Path) -> list[TokenSequence]:
    tokenizer = load_tokenizer(folder)
    return [render_response(tokenizer, prompt, completion) for prompt, completion in PAIRS]


def reference_losses(folder: Path, rows: list[TokenSequence]) -> list[list[float]]:
    """-log p of each response token, each row alone, in float64: S1 the slow way."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor(row.ids[None].astype("int64"))).logits[0]
        log_probs = logits.log_softmax(-1)
        losses.append(
            [-log_probs[t - 1, row.ids[t]].item() for t in range(row.response_start, len(row.ids))]
        )
    return losses


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- the loss -------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_the_response_tokens_of_the_batch(
    tiny_folders: dict[Kind, Path], data: str, tmp_path: Path
) -> None:
    """S1 and S2: response and end token, mean over the tokens of the whole optimizer batch."""
    for kind, original in tiny_folders.items():
        # A Qwen2 tokenizer has a token more than this model: a first run gives it an embedding.
        folder = tmp_path / f"{kind}-fitted"
        run(original, data, folder, learning_rate=1e-15)
        rows = sequences(folder)
        eos = load_tokenizer(folder).eos_token_id
        assert all(row.ids[-1] == eos for row in rows)
        expected = reference_losses(folder, rows)
        report = run(folder, data, tmp_path / kind)
        assert report.loss_first == pytest.approx(mean(flat(expected)), abs=5e-6)
        assert report.tokens == len(flat(expected))
        # What would be wrong is far enough away to be seen.
        for wrong in ([mean(row) for row in expected], flat([row[:-1] for row in expected])):
            assert abs(mean(wrong) - report.loss_first) > 5e-5


def test_loss_on_prompt(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    rows = [TokenSequence(row.ids, 1) for row in sequences(tiny_folder)]
    expected = flat(reference_losses(tiny_folder, rows))
    report = run(tiny_folder, data, tmp_path / "out", loss_on_prompt=True)
    assert report.loss_first == pytest.approx(mean(expected), abs=1e-5)
    assert report.tokens == len(expected)


def test_micro_batches_change_nothing(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    """Facts section 4, row 19: one sequence at a time, two, and all of them at once."""
    rows = sequences(tiny_folder)
    two = 2 * max(len(row.ids) for row in rows)
    found = []
    for tokens in (1, two, 10_000):
        out = tmp_path / str(tokens)
        report = run(tiny_folder, data, out, micro_batch_tokens=tokens, evaluation_data=data)
        weights = safetensors.torch.load_file(out / "model.safetensors")
        found.append((steps(out)[0], report.evaluation_loss, weights))
    for step, evaluation_loss, weights in found[:-1]:
        assert step["loss"] == pytest.approx(found[-1][0]["loss"], abs=1e-6)
        assert step["grad_norm"] == pytest.approx(found[-1][0]["grad_norm"], rel=1e-5)
        assert evaluation_loss == pytest.approx(found[-1][1], abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, found[-1][2][name], atol=2e-5, rtol=0)


def test_dropout_is_off(tiny_folders: dict[Kind, Path], data: str, tmp_path: Path) -> None:
    """S5: a folder that asks for dropout is trained without, and says so afterwards."""
    folder = tmp_path / "dropout"
    shutil.copytree(tiny_folders["gpt2"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    report = run(folder, data, tmp_path / "a", epochs=2)
    assert run(tiny_folders["gpt2"], data, tmp_path / "b", epochs=2).digest == report.digest
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert [written[name] for name in ("resid_pdrop", "attn_pdrop", "embd_pdrop")] == [0, 0, 0]


# --- the loop -------------------------------------------------------------------------------------


class Recorder(NullProgress):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, total: int, description: str) -> None:
        self.calls.append(total)

    def advance(self, count: int = 1, **figures: float) -> None:
        self.calls.append((count, figures["loss"]))

    def finish(self) -> None:
        self.calls.append("finish")


def test_batches_schedule_and_progress(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    """Every epoch goes through all demonstrations in its own order; the last batch may be small."""
    recorder, out = Recorder(), tmp_path / "out"
    report = run(
        tiny_folder, data, out, recorder, learning_rate=0.1, batch_size=4, epochs=3,
        schedule="linear", warmup_fraction=1 / 3, max_grad_norm=1e-9, seed=5,
    )  # fmt: skip
    rows = steps(out)
    rates = [0.05, 0.1, 0.1, 0.075, 0.05, 0.025]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    losses = reference_losses(tiny_folder, sequences(tiny_folder))
    order = shuffled(6, seed=5, epoch=0)
    expected = mean(flat([losses[index] for index in order[:4]]))
    assert rows[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert (report.steps, report.samples, report.tokens) == (6, 6, 3 * len(flat(losses)))
    assert recorder.calls == [6, *[(1, row["loss"]) for row in rows], "finish"]
    assert rows[0]["grad_norm"] > 0.1  # the norm before it is clipped


def test_gradient_clipping(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    """AdamW's step is lr g / (|g| + 1e-5): a gradient clipped to 1e-9 moves almost nothing."""
    before = safetensors.torch.load_file(tiny_folder / "model.safetensors")
    for norm, low, high in ((1e-9, 0, 1e-6), (None, 1e-4, 1)):
        out = tmp_path / str(norm)
        run(tiny_folder, data, out, max_grad_norm=norm, schedule="constant", warmup_fraction=0)
        after = safetensors.torch.load_file(out / "model.safetensors")
        moved = max((after[name] - before[name]).abs().max().item() for name in before)
        assert low <= moved <= high


def test_same_seed_same_digest(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    settings = {"batch_size": 2, "epochs": 2, "evaluation_fraction": 0.2}
    first = run(tiny_folder, data, tmp_path / "a", seed=3, **settings)
    torch.manual_seed(99)
    again = run(tiny_folder, data, tmp_path / "b", seed=3, **settings)
    other = run(tiny_folder, data, tmp_path / "c", seed=4, **settings)
    assert first.digest == again.digest != other.digest
    assert steps(tmp_path / "a") == steps(tmp_path / "b")


def test_held_out_loss(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(tiny_folder, data, out, evaluation_fraction=0.3, epochs=20, seed=1, **FAST)
    rows = sequences(tiny_folder)
    held_out = [rows[index] for index in shuffled(6, seed=1, purpose="held out")[:2]]
    assert (report.samples, report.samples_held_out) == (4, 2)
    losses = (report.evaluation_loss_first, report.evaluation_loss)
    for folder, loss in zip((tiny_folder, out), losses, strict=True):
        assert loss == pytest.approx(mean(flat(reference_losses(folder, held_out))), abs=1e-4)
    assert report.loss_last < report.loss_first - 1


def test_no_held_out_data_no_held_out_loss(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    report = run(tiny_folder, data, tmp_path / "out")
    assert (report.evaluation_loss, report.samples_held_out) == (None, 0)


def test_bfloat16(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(tiny_folder, data, out, dtype="bfloat16", epochs=30, **FAST)
    model = load_causal_lm(out, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model_digest(model) == report.digest
    exact = run(tiny_folder, data, tmp_path / "exact", epochs=30, **FAST)
    assert report.loss_last == pytest.approx(exact.loss_last, rel=0.05)
    assert report.loss_last < report.loss_first - 1
    # The next stage starts from the very weights that were written.
    again = run(out, data, tmp_path / "again", learning_rate=1e-12)
    assert read_lineage(tmp_path / "again")["parent_digest"] == report.digest
    assert again.loss_first < report.loss_first


# --- what it writes -------------------------------------------------------------------------------


def test_output_folder(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    report = run(tiny_folder, data, out, epochs=2, seed=9)
    assert json.loads((out / "report.json").read_text()) == report.__dict__
    lineage = read_lineage(out)
    parent = model_digest(load_causal_lm(tiny_folder))
    assert lineage["stage"] == "sft"
    assert lineage["parent_digest"] == parent != lineage["digest"]
    assert lineage["digest"] == report.digest == model_digest(load_causal_lm(out))
    assert lineage["lineage_id"] == parent.removeprefix("sha256:")[:16]
    settings = {"learning_rate": 1e-3, "batch_size": 6, "epochs": 2, "seed": 9}
    config = SFTConfig(model=tiny_folder, data=data, out=out, **settings)
    assert SFTConfig(**lineage["config"]) == config
    assert len(lineage["data_sha256"]) == 64
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    second = run(out, data, tmp_path / "second")
    child = read_lineage(tmp_path / "second")
    assert child["parent_digest"] == report.digest != second.digest
    assert child["lineage_id"] == lineage["lineage_id"]


def test_the_run_that_a_stage_belongs_to_is_recorded(
    tiny_folder: Path, data: str, tmp_path: Path
) -> None:
    run(tiny_folder, data, tmp_path / "out", run_id="nightly-7")
    assert read_lineage(tmp_path / "out")["run_id"] == "nightly-7"
    run(tmp_path / "out", data, tmp_path / "second")
    assert read_lineage(tmp_path / "second")["run_id"] is None


def test_skipped_lines_are_counted(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    with Path(data).open("a") as file:
        file.write("not JSON\n" + json.dumps({"prompt": "x", "completion": "1" * 999}) + "\n")
    report = run(tiny_folder, data, tmp_path / "out", skip_bad=True)
    assert (report.samples, report.samples_skipped) == (6, 2)


def test_a_new_pad_token_gets_an_embedding(
    tiny_folders: dict[Kind, Path], data: str, tmp_path: Path
) -> None:
    """Its row is the mean of the others, not random: the digest is the same in every run."""
    kinds: tuple[Kind, ...] = ("llama", "gpt2")  # transformers gives a Qwen2 tokenizer one
    for kind in kinds:
        bare = without_pad(tiny_folders[kind], tmp_path / f"{kind}-bare")
        with pytest.raises(ModelError, match=r"no pad token; name one with --pad_token="):
            run(bare, data, tmp_path / "none")
        outs = [tmp_path / f"{kind}-{index}" for index in range(2)]
        digests = {run(bare, data, out, pad_token="<|new|>").digest for out in outs}
        assert len(digests) == 1
        tokenizer, model = load_tokenizer(outs[0]), load_causal_lm(outs[0])
        assert tokenizer.pad_token == "<|new|>"
        assert tokenizer.pad_token_id == model.config.pad_token_id == model.config.vocab_size - 1
        weight = model.get_input_embeddings().weight
        assert len(weight) == len(tokenizer)
        untouched = load_causal_lm(bare).get_input_embeddings().weight.mean(0)
        assert (weight[-1] - untouched).abs().max() < 0.02


def without_pad(folder: Path, target: Path) -> Path:
    """A copy whose tokenizer, like GPT-2's, has no pad token."""
    shutil.copytree(folder, target)
    tokenizer = json.loads((target / "tokenizer_config.json").read_text())
    del tokenizer["pad_token"]
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return target


# --- what it refuses, without writing anything ----------------------------------------------------


def assert_nothing_written(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir() if out.name in path.name] == []


def test_divergence_stops_and_writes_nothing(tiny_folder: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "diverged"
    with pytest.raises(UserError, match=r"diverged at step 1 of 3 .*lower learning_rate.*1e\+30"):
        run(tiny_folder, data, out, learning_rate=1e30, epochs=3, schedule="constant")
    assert_nothing_written(out)


def test_broken_weights_stop_at_the_first_step(
    tiny_folder: Path, data: str, tmp_path: Path
) -> None:
    folder, out = tmp_path / "nan", tmp_path / "out"
    model = load_causal_lm(tiny_folder)
    model.get_input_embeddings().weight.data[7] = math.nan
    model.save_pretrained(folder)
    load_tokenizer(tiny_folder).save_pretrained(folder)
    with pytest.raises(UserError, match=r"diverged at step 0 of 1 \(loss nan.*check the weights"):
        run(folder, data, out)
    assert_nothing_written(out)


def test_a_failed_save_leaves_nothing(
    tiny_folder: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        run(tiny_folder, data, tmp_path / "out")
    assert_nothing_written(tmp_path / "out")


def test_existing_output_is_refused_before_any_work(data: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="out exists already; choose another output or remove it"):
        run(tmp_path / "no model here either", data, tmp_path / "out")


def test_output_below_a_file_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot write .*data.jsonl is not a writable folder"):
        run(tmp_path / "none", data, Path(data) / "out")


REFUSED: list[tuple[dict[str, Any], type[UserError], str]] = [
    ({"max_tokens": 999}, ConfigError, r"max_tokens is 999, but the model in .* takes 256 tokens"),
    ({"max_tokens": 12}, DataError, r"data.jsonl:2: field 'completion'.* more than the 12"),
    ({"device": "cuda:7"}, ConfigError, r"device is cuda:7, but torch finds no CUDA device"),
    ({"device": "gpu"}, ConfigError, r"device 'gpu' is unknown; use cpu, cuda or cuda:N"),
    ({"evaluation_fraction": 0.99}, ConfigError, "leaves none to train on"),
    ({"evaluation_data": "no.jsonl"}, DataError, r"^no.jsonl: there is no such file"),
    ({"model": Path("no-model")}, ModelError, "no-model does not exist"),
]


@pytest.mark.parametrize(
    ("settings", "error", "message"), REFUSED, ids=lambda value: str(value)[:30]
)
def test_refused(
    tiny_folder: Path, data: str, tmp_path: Path,
    settings: dict[str, Any], error: type[UserError], message: str,
) -> None:  # fmt: skip
    if "cuda:7" in settings.values() and torch.cuda.is_available():
        pytest.skip("this machine has CUDA devices")
    out = tmp_path / "refused"
    with pytest.raises(error, match=message) as caught:
        run(settings.pop("model", tiny_folder), data, out, **settings)
    assert "\n" not in str(caught.value)
    assert_nothing_written(out)


def test_configuration_mistakes() -> None:
    needed = ["--model=m", "--data=d", "--out=o"]
    for argument, message in {
        "--learning_rate=0": "'learning_rate'",
        "--epochs=0": "'epochs'",
        "--schedule=steps": "'schedule'",
        "--lerning_rate=1": "unknown key 'lerning_rate'; did you mean 'learning_rate'",
        "--evaluation_fraction=1": "'evaluation_fraction'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config(SFTConfig, [*needed, argument])
    with pytest.raises(ConfigError, match="exclude each other"):
        load_config(SFTConfig, [*needed, "--evaluation_data=e", "--evaluation_fraction=0.1"])
    with pytest.raises(ConfigError, match="'out' is required"):
        load_config(SFTConfig, needed[:2])
