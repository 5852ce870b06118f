"""Random numbers of the trainer: functions of (seed, purpose, place), never a running state.

A resumed run therefore draws what the undisturbed run would have drawn, with nothing to store.
Minibatches, prompts and pretraining data are permutations of kleash.data.shuffle.
"""

from __future__ import annotations

import hashlib

from kleash.data.shuffle import shuffled


def draw(num_items: int, *, seed: int, purpose: str, position: int, count: int) -> list[int]:
    """``count`` indices from ``position`` on in an endless sequence of fresh permutations.

    Every item comes once an epoch. Example: with 3 items, position 2 and count 2 are the last index
    of the first permutation and the first of the second.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(position + len(indices), num_items)
        order = shuffled(num_items, seed=seed, epoch=epoch, purpose=purpose)
        indices.extend(order[offset : offset + count - len(indices)].tolist())
    return indices


def sampling_seed(seed: int, step: int) -> int:
    """Seed of the responses of a step: a prompt that comes again in a later step is answered anew.

    Step 0 is the evaluation's, the same every time.
    """
    digest = hashlib.blake2b(f"sampling\0{seed}\0{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
