"""Digests that identify weights, tokenizers and chat templates, and the canonical tensor list.

A model's digest covers name, data type, shape and bits of every tensor under its checkpoint name;
tied tensors count once. The same digest names a frozen reference, a checkpoint and a published
version; kleash.weights.digest says how it follows a change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kleash.weights.digest import combine_digests, digest_bytes, tensor_sum

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Data types as safetensors names them."""


def canonical_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by checkpoint name, sorted, tied once. Live, not copies."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    persistent = model.state_dict().keys()
    tensors.update((name, buffer) for name, buffer in model.named_buffers() if name in persistent)
    return {name: tensors[name].detach() for name in sorted(tensors)}


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's little-endian bytes, flat uint8; a view when it is contiguous on the CPU."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()


def tensor_words(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bits as flat unsigned words of at most four bytes; a view as in tensor_bytes."""
    return tensor_bytes(tensor).view(f"u{min(tensor.element_size(), 4)}")


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """Digest sum of the tensor's bits (kleash.weights.digest), 8 bytes."""
    return digest_bytes(tensor_sum(tensor_words(tensor)))


def model_digest(model: torch.nn.Module) -> str:
    """Digest of a model's weights: ``sha256:`` and 64 hexadecimal digits."""
    return combine_digests(
        (name, DTYPE_NAMES[t.dtype], tuple(t.shape), tensor_digest(t))
        for name, t in canonical_tensors(model).items()
    )


def schema_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of names, data types and shapes alone: equal for two versions of one model."""
    return combine_digests(
        (name, DTYPE_NAMES[t.dtype], tuple(t.shape), b"") for name, t in tensors.items()
    )


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of what turns text into ids and back, in hexadecimal; not the chat template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()


def chat_template_sha256(tokenizer: Any) -> str:
    """SHA-256 of the chat template, in hexadecimal; empty without one."""
    template = tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if template else ""
