"""Which model a service serves and where it computes: configuration alone, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from kleash.base.config import Config

Dtype = Literal["float32", "bfloat16", "float16"]
"""Data types of weights that the services compute in."""
DtypeChoice = Literal[Dtype, "auto"]


class PlacedModelConfig(Config):
    """How a model is read and where it computes."""

    name: str = ""
    """Name under which the model is served; empty means the folder's name."""
    dtype: DtypeChoice = "float32"
    """Data type of the weights; auto means bfloat16 on a GPU that computes in it and on a CPU that
    is found faster in it when the model is loaded, else float32. Replicas on different machines
    may find different ones: then name one."""
    device: str = "auto"
    """Torch device ("cpu", "cuda", "cuda:1"); auto means cuda when there is one, else cpu."""
    pad_token: str | None = None
    """Pad token for a tokenizer without one; its id is part of the tokenizer's digest."""
    chat_template: Path | None = None
    """File with a Jinja chat template to use in place of the tokenizer's."""
    num_threads: int = pydantic.Field(default=0, ge=0)
    """CPU threads of torch in this process; 0 keeps torch's own choice."""


class FrozenModelConfig(PlacedModelConfig):
    """Which model a scoring service serves, and where it computes."""

    model: Path
    """Model folder in Hugging Face form, with safetensors weights."""
