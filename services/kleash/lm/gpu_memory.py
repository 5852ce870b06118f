"""Memory of the CUDA devices that models were loaded on, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kleash.base import metrics

_devices: set[int] = set()
"""Indices of those that this process uses."""

READERS: dict[str, Callable[[int], int]] = {
    "allocated": torch.cuda.memory_allocated,
    "reserved": torch.cuda.memory_reserved,
    "total": lambda index: torch.cuda.get_device_properties(index).total_memory,
}


def export_gpu_memory(device: torch.device) -> None:
    """Show the memory of ``device`` from now on, beside that of others; nothing without CUDA."""
    if device.type != "cuda":
        return
    _devices.add(torch.cuda.current_device() if device.index is None else device.index)
    for kind, read in READERS.items():
        # Read at each scrape, in the thread of the metrics port.
        metrics.GPU_MEMORY_BYTES.labels(kind).set_function(
            lambda read=read: float(sum(read(index) for index in sorted(_devices)))
        )
