"""Loading and saving folders: what is refused, and what a saved folder says about itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from kleash.base.errors import ModelError
from kleash.lm.load import (
    load_causal_lm,
    load_sequence_classifier,
    load_tokenizer,
    resize_embeddings,
    save_checkpoint_folder,
)
from kleash.lm.tiny import build_causal_lm

pytestmark = pytest.mark.unit


def _edit(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def _unlink(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def _drop_tensor(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "does not exist; give the path"),
    "no config": (lambda f: _unlink(f, "config.json"), "has no config.json"),
    "bad config": (lambda f: _edit(f, "config.json", "{"), "config.json is not valid JSON"),
    "unknown type": (
        lambda f: _edit(f, "config.json", '{"model_type": "elephant"}'),
        "cannot load the model .* model type `elephant` but Transformers does not recognize",
    ),
    "no weights": (lambda f: _unlink(f, "model.safetensors"), r"has no \*.safetensors weights"),
    "pickle": (_pickle, "pytorch_model.bin: pickled weights are not loaded"),
    "cut off": (_truncate, "cannot load the model"),
    "not whole": (_drop_tensor, "has no weights for model.layers.1.mlp.up_proj.weight; it is not"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_model_folder(tiny_folder: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    breaks, message = BROKEN[case]
    breaks(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_causal_lm(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) - len(str(folder)) < 250
    assert "\n" not in str(caught.value)


def test_a_causal_lm_is_no_reward_model(tiny_folder: Path, tiny_reward_folder: Path) -> None:
    """transformers would give it a random head."""
    with pytest.raises(ModelError, match=r"labels; a reward model has one|no weights for score"):
        load_sequence_classifier(tiny_folder)
    assert load_sequence_classifier(tiny_reward_folder).config.num_labels == 1


BROKEN_TOKENIZERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "does not exist; give the path"),
    "no files": (lambda f: _unlink(f, "tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
    "bad file": (lambda f: _edit(f, "tokenizer.json", "{}"), "cannot load the tokenizer"),
    "no end": (lambda f: _drop_token(f, "eos_token"), "no end-of-sequence token; set eos_token"),
    "no pad": (lambda f: _drop_token(f, "pad_token"), "no pad token; name one with --pad_token="),
    "pad is end": (
        lambda f: _edit_token(f, "pad_token", "<|end|>"),
        r"pads with its end-of-sequence token '<\|end\|>'; name another with --pad_token=",
    ),
}


def _edit_token(folder: Path, name: str, text: str | None) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config[name] = text
    _edit(folder, "tokenizer_config.json", json.dumps({k: v for k, v in config.items() if v}))


def _drop_token(folder: Path, name: str) -> None:
    _edit_token(folder, name, None)


@pytest.mark.parametrize("case", BROKEN_TOKENIZERS)
def test_broken_tokenizer(tiny_folder: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    breaks, message = BROKEN_TOKENIZERS[case]
    breaks(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_pad_token_in_the_vocabulary_adds_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_folder, folder)
    _drop_token(folder, "pad_token")
    tokenizer = load_tokenizer(folder, pad_token="<|pad|>")
    assert (tokenizer.pad_token_id, len(tokenizer)) == (0, 320)
    with pytest.raises(ModelError, match="pads with its end-of-sequence token"):
        load_tokenizer(folder, pad_token="<|end|>")


def test_new_rows_are_the_mean_of_the_old_ones_tied_or_not(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.add_tokens(["<a>", "<b>"])
    for is_tied in (True, False):
        config = build_causal_lm("llama", vocab_size=320).config
        config.tie_word_embeddings = is_tied
        model = transformers.AutoModelForCausalLM.from_config(config)
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
        means = [layer.weight.mean(0).clone() for layer in layers]
        random_state = torch.random.get_rng_state()
        resize_embeddings(model, tokenizer)
        assert torch.equal(torch.random.get_rng_state(), random_state)
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
        for layer, mean in zip(layers, means, strict=True):
            assert layer.weight.shape == (322, 32)
            torch.testing.assert_close(layer.weight[320:], mean.expand(2, -1))


def test_saved_folder_stops_at_the_tokenizers_end_token(tiny_folder: Path, tmp_path: Path) -> None:
    """Even when the published generation settings contradict themselves or name another token."""
    model, tokenizer = load_causal_lm(tiny_folder), load_tokenizer(tiny_folder)
    model.generation_config.eos_token_id = 9
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.5
    save_checkpoint_folder(model, tokenizer, tmp_path / "a", {})
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "a")
    assert (saved.eos_token_id, saved.pad_token_id) == (1, 0)

    model.generation_config.eos_token_id = [1, 9]
    save_checkpoint_folder(model, tokenizer, tmp_path / "b", {})
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == [1, 9]
