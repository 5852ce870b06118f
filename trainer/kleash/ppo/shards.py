"""Which elements of a sharded parameter this rank holds, as publication counts them."""

from __future__ import annotations

import math

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardedDimension
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kleash.lm.digest import tensor_words
from kleash.weights.encoder import Shard


def local_shard(tensor: torch.Tensor) -> Shard:
    """The bits that this rank holds of a tensor, and their place in its flat order.

    A plain tensor is whole, and so is a replicated one, which one rank alone may encode. A rank
    that holds nothing gets no words. Raises ValueError when the rank's share is not one flat range.
    """
    if not isinstance(tensor, DTensor):
        return Shard(tensor_words(tensor))
    for placement in tensor.placements:
        # By type: a strided shard, of FSDP over tensor parallelism, interleaves its rows.
        is_rows = type(placement) is ShardedDimension and placement.dim == 0
        if not (is_rows or placement.is_replicate()):
            raise ValueError(
                f"a tensor of shape {list(tensor.shape)} is placed as {placement}, and a rank's "
                "share of it is not one flat range; shard its first dimension, or gather it first."
            )
    words = tensor_words(tensor.to_local())
    if all(placement.is_replicate() for placement in tensor.placements):
        return Shard(words)
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    words_in_element = tensor.element_size() // words.itemsize
    return Shard(words, offset[0] * math.prod(tensor.shape[1:]) * words_in_element)
