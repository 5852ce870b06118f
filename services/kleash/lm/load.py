"""Loading and saving Hugging Face folders: safetensors only, dropout off, clear errors.

A folder is a plain checkpoint: policy as ``AutoModelForCausalLM``, reward model as
``AutoModelForSequenceClassification`` with one label, tokenizer and chat template beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from kleash.base.durable import flush_folder, flush_tree
from kleash.base.errors import ConfigError, ModelError
from kleash.lm.config import Dtype
from kleash.lm.gpu_memory import export_gpu_memory


def check_model_folder(folder: Path | str) -> Path:
    """Return the folder when it holds a configuration and safetensors weights, else raise."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(
            f"model folder {folder} does not exist; give the path of a Hugging Face checkpoint."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model folder {folder} has no config.json; it is not a Hugging Face checkpoint."
        )
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not valid JSON: {error}.") from None
    if not any(folder.glob("*.safetensors")):
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt")
        )
        found = f" (it has {', '.join(others)}: pickled weights are not loaded)" if others else ""
        raise ModelError(
            f"model folder {folder} has no *.safetensors weights{found}; "
            "save the model with save_pretrained()."
        )
    return folder


def load_tokenizer(
    folder: Path | str,
    *,
    pad_token: str | None = None,
    chat_template: Path | str | None = None,
    needs_eos: bool = True,
) -> Any:
    """Load the tokenizer of a checkpoint folder.

    Args:
        pad_token: text of a token to pad with, for tokenizers without one; it is added to the
            vocabulary when it is not in it (the caller then calls ``resize_embeddings``).
        chat_template: file with a Jinja chat template to use instead of the tokenizer's own.
        needs_eos: refuse a tokenizer without an end-of-sequence token, as an encoder's may be.

    Raises ModelError when there is no tokenizer, no end-of-sequence token, no pad token, or when
    pad and end-of-sequence are the same token: whatever masks pads would then never stop.
    """
    import transformers

    if not Path(folder).is_dir():
        raise ModelError(
            f"model folder {folder} does not exist; give the path of a Hugging Face checkpoint."
        )
    if not any(
        (Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        raise ModelError(
            f"{folder} has no tokenizer (no tokenizer.json); save it there with save_pretrained()."
        )
    _quiet_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers reports a damaged file as a bare Exception
        raise ModelError(f"cannot load the tokenizer in {folder}: {_reason(error)}") from None
    if chat_template is not None:
        tokenizer.chat_template = _read_chat_template(Path(chat_template))
    if pad_token is not None and tokenizer.pad_token != pad_token:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    if needs_eos and tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer in {folder} has no end-of-sequence token; "
            "set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer in {folder} has no pad token; name one with --pad_token='<|pad|>'."
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"the tokenizer in {folder} pads with its end-of-sequence token "
            f"{tokenizer.eos_token!r}; name another with --pad_token='<|pad|>'."
        )
    return tokenizer


def load_causal_lm(
    folder: Path | str, *, dtype: Dtype | Literal["auto"] = "float32", device: str = "cpu"
) -> Any:
    """Load a causal language model in evaluation mode with dropout off.

    ``auto`` keeps the data type that the weights are stored in, as their digest needs.
    """
    return _load("AutoModelForCausalLM", folder, dtype, device)


def load_sequence_classifier(
    folder: Path | str, *, dtype: Dtype | Literal["auto"] = "float32", device: str = "cpu"
) -> Any:
    """Load a one-label sequence classifier (a reward model) in evaluation mode with dropout off."""
    model = load_classifier(folder, dtype=dtype, device=device)
    if model.config.num_labels != 1:
        raise ModelError(f"{folder} has {model.config.num_labels} labels; a reward model has one.")
    return model


def load_classifier(
    folder: Path | str, *, dtype: Dtype | Literal["auto"] = "float32", device: str = "cpu"
) -> Any:
    """As load_sequence_classifier, with any number of labels."""
    return _load("AutoModelForSequenceClassification", folder, dtype, device)


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to 0 (N+ detail 7: dropout alone makes the PPO ratio wrong)."""
    config = getattr(model, "config", None)
    for name in (
        "attention_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "hidden_dropout",
        "summary_first_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "dropout",
    ):
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    module: Any
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def resize_embeddings(model: Any, tokenizer: Any) -> None:
    """Make room for token ids that the tokenizer has and the model lacks (an added pad token).

    New rows are the mean of the old ones: the same in every run, and no more probable than an
    average token (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    num_old = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= num_old:
        return
    with torch.random.fork_rng():
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is None:
                continue
            layer.weight[num_old:] = layer.weight[:num_old].float().mean(0).to(layer.weight)
            if getattr(layer, "bias", None) is not None:
                layer.bias[num_old:] = layer.bias[:num_old].mean()


def check_output(path: Path) -> None:
    """Raise when ``path`` cannot become an output, before work is spent on it."""
    if path.exists():
        raise ModelError(f"{path} exists already; choose another output or remove it.")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ModelError(f"cannot write {path}: {parent} is not a writable folder.")


def check_device(device: str) -> torch.device:
    """The device; raises ConfigError when torch does not know it or this machine lacks it."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is unknown; use cpu, cuda or cuda:N.") from None
    num_cuda = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= num_cuda:
        raise ConfigError(
            f"device is {device}, but torch finds {num_cuda or 'no'} CUDA devices here; "
            "use --device=cpu."
        )
    return found


def save_checkpoint_folder(
    model: Any,
    tokenizer: Any,
    folder: Path,
    lineage: dict[str, Any],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a Hugging Face folder with ``kleash.json`` (what made it) all at once.

    The folder appears under its name only when it is complete; an existing one is an error.
    ``files`` are further text files by name (``report.json``). ``kleash.json`` is written last and
    names the files of model and tokenizer under ``files``: where a folder cannot be renamed at
    once, or somebody copies it, it tells a complete one (kleash.sources.checkpoint).
    """
    _quiet_transformers()
    check_output(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    _set_generation_tokens(model, tokenizer)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        described = lineage | {"files": _file_names(partial)}
        texts = {**(files or {}), "kleash.json": json.dumps(described, indent=2) + "\n"}
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        # safetensors makes its files readable to their owner alone; a service that mounts the
        # folder may run as another user. Not every volume knows modes.
        for path in partial.glob("*.safetensors"):
            with contextlib.suppress(PermissionError):
                path.chmod(0o644)
        flush_tree(partial)
        partial.rename(folder)
        flush_folder(folder.absolute().parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def read_lineage(folder: Path | str) -> dict[str, Any]:
    """The ``kleash.json`` of a folder; empty for a checkpoint that Kleash did not write."""
    path = Path(folder) / "kleash.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def max_positions(model: Any) -> int:
    """Longest sequence that the model accepts, in tokens."""
    config = model.config.get_text_config()
    positions = int(
        getattr(config, "max_position_embeddings", None)
        or getattr(config, "n_positions", None)
        or 2**31 - 1
    )
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the one after the pad's.
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return positions - int(module.padding_idx) - 1
    return positions


def _quiet_transformers() -> None:
    """Progress bars and advice about padding masks are noise: rows are right-padded on purpose."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _reason(error: Exception) -> str:
    """Libraries go on with advice that does not apply here (upgrade, install, go online)."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".") + "."


def _read_chat_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read the chat template {path}: {_reason(error)}") from None


def _set_generation_tokens(model: Any, tokenizer: Any) -> None:
    """``generate()`` of the saved model stops at the token that training ends responses with."""
    import transformers

    config = getattr(model, "generation_config", None)
    if config is None:
        return
    config.pad_token_id = tokenizer.pad_token_id
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        config.eos_token_id = tokenizer.eos_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        # A published configuration may contradict itself; save_pretrained refuses it once changed.
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )


def _load(auto_class: str, folder: Path | str, dtype: Dtype | Literal["auto"], device: str) -> Any:
    import safetensors
    import transformers

    folder = check_model_folder(folder)
    export_gpu_memory(check_device(device))
    _quiet_transformers()
    try:
        model, loading = getattr(transformers, auto_class).from_pretrained(
            str(folder),
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"cannot load the model in {folder} as {auto_class}: {_reason(error)}"
        ) from None
    # transformers fills weights that the folder lacks with random numbers and carries on.
    if missing := sorted(loading["missing_keys"]):
        shown = ", ".join(missing[:3]) + (
            f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        )
        raise ModelError(
            f"model folder {folder} has no weights for {shown}; "
            f"it is not a whole {auto_class} checkpoint."
        )
    disable_dropout(model)
    return model.to(device).eval()
