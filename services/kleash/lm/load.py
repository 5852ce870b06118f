"""Loading and saving Hugging Face folders: safetensors only, dropout off, clear errors.

A folder is a plain checkpoint: policy as ``AutoModelForCausalLM``, reward model as
``AutoModelForSequenceClassification`` with one label, tokenizer and chat template beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from kleash.base.errors import ModelError

Dtype = Literal["float32", "bfloat16", "float16"]


def check_model_folder(folder: Path | str) -> Path:
    """Return the folder when it holds a configuration and safetensors weights, else raise ModelError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist; give the path of a Hugging Face checkpoint folder.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json; it is not a Hugging Face checkpoint.")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not valid JSON: {error}.") from None
    if not any(folder.glob("*.safetensors")):
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt"))
        found = f" (it has {', '.join(others)}: pickled weights are not loaded)" if others else ""
        raise ModelError(
            f"model folder {folder} has no *.safetensors weights{found}; save the model with save_pretrained()."
        )
    return folder


def load_tokenizer(folder: Path | str, *, pad_token: str | None = None) -> Any:
    """Load the tokenizer of a checkpoint folder.

    Args:
        pad_token: text of a token to pad with, for tokenizers without one; it is added to the
            vocabulary when it is not in it (the caller then resizes the embeddings).

    Raises ModelError when there is no tokenizer, no end-of-sequence token, no pad token, or when pad
    and end-of-sequence are the same token (labels that mask pads would never teach the model to stop).
    """
    import transformers

    if not Path(folder).is_dir():
        raise ModelError(f"tokenizer folder {folder} does not exist; give the path of a Hugging Face checkpoint folder.")
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"{folder} has no tokenizer (no tokenizer.json); save it there with save_pretrained().")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the tokenizer in {folder}: {error}") from None
    if pad_token is not None and tokenizer.pad_token != pad_token:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {folder} has no end-of-sequence token; set eos_token in its configuration.")
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer in {folder} has no pad token; name one with --pad_token='<|pad|>'.")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"the tokenizer in {folder} pads with its end-of-sequence token {tokenizer.eos_token!r}; "
            "name another with --pad_token='<|pad|>'."
        )
    return tokenizer


def load_causal_lm(folder: Path | str, *, dtype: Dtype = "float32", device: str = "cpu") -> Any:
    """Load a causal language model in evaluation mode with dropout off."""
    return _load("AutoModelForCausalLM", folder, dtype, device)


def load_sequence_classifier(folder: Path | str, *, dtype: Dtype = "float32", device: str = "cpu") -> Any:
    """Load a one-label sequence classifier (a reward model) in evaluation mode with dropout off."""
    model = _load("AutoModelForSequenceClassification", folder, dtype, device)
    if model.config.num_labels != 1:
        raise ModelError(f"{folder} has {model.config.num_labels} labels; a reward model has one.")
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to 0 (N+ detail 7: dropout alone makes the PPO ratio wrong)."""
    config = getattr(model, "config", None)
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "summary_first_dropout",
                 "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout"):
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def resize_embeddings(model: Any, tokenizer: Any) -> None:
    """Make room for token ids that the tokenizer has and the model lacks (an added pad token)."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def save_checkpoint_folder(model: Any, tokenizer: Any, folder: Path, lineage: dict[str, Any]) -> None:
    """Write a Hugging Face folder with ``kleash.json`` (what made it) all at once.

    The folder appears under its name only when it is complete; an existing one is an error.
    """
    import shutil

    _quiet_transformers()
    if folder.exists():
        raise ModelError(f"{folder} exists already; choose another output folder or remove it.")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "kleash.json").write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)


def read_lineage(folder: Path | str) -> dict[str, Any]:
    """The ``kleash.json`` of a folder; empty for a checkpoint that Kleash did not write."""
    path = Path(folder) / "kleash.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def max_positions(model: Any) -> int:
    """Longest sequence that the model accepts, in tokens."""
    config = model.config
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31 - 1)


def _quiet_transformers() -> None:
    """Progress bars and advice about padding masks are noise here: rows are right-padded on purpose."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _load(auto_class: str, folder: Path | str, dtype: Dtype, device: str) -> Any:
    import transformers

    folder = check_model_folder(folder)
    _quiet_transformers()
    try:
        model = getattr(transformers, auto_class).from_pretrained(
            str(folder), dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load the model in {folder} as {auto_class}: {error}") from None
    disable_dropout(model)
    return model.to(device).eval()
