"""The served model's tensors in place: seen as words, changed by a version, and changed back.

    predict   what the digest will be, with the live tensors read only       while serving
    save      old words of tensors that a full part overwrites, on disk      while serving
    apply     part after part in place; a wrong digest is undone at once      between two steps
    undo      deltas subtract themselves; saved words are copied back         between two steps

Nothing here knows of versions, fences or callers: kleash.policy.replica does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from kleash.base import tracing
from kleash.lm.digest import DTYPE_NAMES, canonical_tensors
from kleash.rpc.errors import PreconditionFailed
from kleash.weights.codec import (
    Codec,
    CodecError,
    apply_change,
    apply_encoded,
    changed_values,
    decode_delta,
    decode_full,
)
from kleash.weights.digest import MASK, digest_bytes, sum_change, tensor_sum
from kleash.weights.encoder import digest_of
from kleash.weights.manifest import EXPONENTS, FULL_CODECS, TensorShape, places, schema_digest
from kleash.weights.spool import Spool, SpoolObject
from kleash.weights.v1 import weights_pb2


class UndoFailedError(Exception):
    """The weights in memory are of no version."""


@dataclass(frozen=True, eq=False)
class Step:
    """A manifest and the bytes of its object."""

    manifest: weights_pb2.Manifest
    data: np.ndarray

    def parts(self) -> Iterator[tuple[str, weights_pb2.Part, np.ndarray]]:
        """(tensor, part, its encoded bytes), in order."""
        for entry, part, offset in places(self.manifest):
            yield entry.name, part, self.data[offset : offset + part.encoded_bytes]


class LiveTensor:
    """One tensor seen as flat unsigned words; on a CPU it is the memory itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        shape = TensorShape(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
        self.shape = shape
        size = np.dtype(shape.word_type).itemsize
        signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
        assert tensor.is_contiguous(), "a served tensor is not contiguous"
        self._flat = tensor.detach().reshape(-1).view(signed)
        on_cpu = tensor.device.type == "cpu"
        self._words = self._flat.numpy().view(shape.word_type) if on_cpu else None

    def read(self, first: int, count: int) -> np.ndarray:
        """Words; a view on a CPU, a copy elsewhere."""
        if self._words is not None:
            return self._words[first : first + count]
        return self._flat[first : first + count].cpu().numpy().view(self.shape.word_type)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Words at flat indices."""
        if self._words is not None:
            return self._words[indices]
        place = torch.from_numpy(indices).to(self._flat.device)
        return self._flat[place].cpu().numpy().view(self.shape.word_type)

    def scatter(self, indices: np.ndarray, words: np.ndarray) -> None:
        """Put words at flat indices."""
        if self._words is not None:
            self._words[indices] = words
            return
        place = torch.from_numpy(indices).to(self._flat.device)
        self._flat[place] = self._as_tensor(words)

    def write(self, first: int, words: np.ndarray) -> None:
        """Put consecutive words."""
        if self._words is not None:
            self._words[first : first + len(words)] = words
            return
        self._flat[first : first + len(words)] = self._as_tensor(words)

    def _as_tensor(self, words: np.ndarray) -> torch.Tensor:
        signed = words.view(np.uint8 if words.itemsize == 1 else f"i{words.itemsize}")
        return torch.from_numpy(signed.copy()).to(self._flat.device)


class LiveWeights:
    """All tensors of a served model and their digest sums."""

    def __init__(self, model: Any) -> None:
        self._tensors = {
            name: LiveTensor(tensor) for name, tensor in canonical_tensors(model).items()
        }
        self._parameters = {name for name, _ in model.named_parameters()}
        self.schema = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.schema_digest = schema_digest(self.schema)
        self._sums = self._all_sums()

    @property
    def digest(self) -> str:
        """Digest of the weights, from sums that every change keeps up to date."""
        return digest_of(self.schema, self._sums)

    def audit(self) -> str:
        """Digest of the weights, computed from all of their bits."""
        return digest_of(self.schema, self._all_sums())

    def predict(self, steps: Sequence[Step]) -> str:
        """The digest after ``steps``, without changing anything.

        Raises PreconditionFailed: DIGEST_MISMATCH with the layer (part, tensor, model) or
        NON_FINITE with the tensor.
        """
        sums = dict(self._sums)
        by_tensor: dict[str, dict[int, list[tuple[weights_pb2.Part, np.ndarray]]]] = {}
        for number, step in enumerate(steps):
            for name, part, data in step.parts():
                _check_bytes(name, part, data)
                by_tensor.setdefault(name, {}).setdefault(number, []).append((part, data))
        for name, parts_of in by_tensor.items():
            try:
                sums[name] = self._predict_tensor(name, list(parts_of.values()))
            except CodecError as error:
                raise _mismatch("part", f"a part of tensor '{name}': {error}", name) from None
        last = steps[-1].manifest
        for entry in last.tensors:
            if digest_bytes(sums[entry.name]) != entry.digest:
                raise _mismatch(
                    "tensor", f"tensor '{entry.name}' would not get the promised digest", entry.name
                )
        return digest_of(self.schema, sums)

    def save(self, steps: Sequence[Step], spool: Spool) -> SpoolObject | None:
        """The words of every tensor that a full part overwrites, in a file; None without any.

        Raises Overloaded (SPOOL_FULL).
        """
        names = _overwritten(steps)
        if not names:
            return None
        saved = spool.scratch(sum(self.schema[name].num_bytes for name in names))
        try:
            for name in names:
                words = self._tensors[name].read(0, self.schema[name].num_words)
                saved.append(words.view(np.uint8).data)
        except BaseException:
            saved.close()
            raise
        return saved

    @tracing.measured("swap")
    def apply(self, steps: Sequence[Step], saved: SpoolObject | None, digest: str) -> None:
        """Change the tensors in place until their digest is ``digest``, or not at all.

        Raises PreconditionFailed (DIGEST_MISMATCH) when the old weights are back, UndoFailedError
        when they are not.
        """
        before = dict(self._sums)
        done: list[tuple[str, weights_pb2.Part, np.ndarray]] = []
        try:
            for step in steps:
                for name, part, data in step.parts():
                    # Decoding comes before the first write: a part that raises changed nothing.
                    self._sums[name] = self._change(name, part, data, undo=False)
                    done.append((name, part, data))
            if self.digest != digest:
                raise _mismatch("model", f"the weights got digest {self.digest}, not {digest}")
        except BaseException as error:
            self._undo(done, steps, saved, before)
            if isinstance(error, CodecError):
                raise _mismatch("part", str(error)) from None
            raise

    def undo(self, steps: Sequence[Step], saved: SpoolObject | None, digest: str) -> None:
        """Take ``steps`` back, to the weights of ``digest``. Raises UndoFailedError."""
        done = [part for step in steps for part in step.parts()]
        self._undo(done, steps, saved, None)
        if self.digest != digest:
            raise UndoFailedError(f"the weights got digest {self.digest}, not {digest}.")

    def _undo(
        self,
        done: list[tuple[str, weights_pb2.Part, np.ndarray]],
        steps: Sequence[Step],
        saved: SpoolObject | None,
        before: dict[str, int] | None,
    ) -> None:
        overwritten = _overwritten(steps)
        try:
            for name, part, data in reversed(done):
                if name not in overwritten:
                    self._sums[name] = self._change(name, part, data, undo=True)
            offset = 0
            touched = {name for name, _, _ in done}
            for name in overwritten:
                assert saved is not None
                shape = self.schema[name]
                words = saved.view()[offset : offset + shape.num_bytes].view(shape.word_type)
                offset += shape.num_bytes
                if name in touched:
                    self._tensors[name].write(0, words)
                    self._sums[name] = tensor_sum(words)
        except Exception as error:
            self._sums = self._all_sums()
            raise UndoFailedError(f"the change could not be taken back: {error}") from error
        if before is not None and self._sums != before:
            self._sums = self._all_sums()
            raise UndoFailedError("the weights are not what they were before the change.")

    def _change(self, name: str, part: weights_pb2.Part, data: np.ndarray, *, undo: bool) -> int:
        """Apply one part; returns the tensor's new sum."""
        tensor, first, total = self._tensors[name], part.first_element, self._sums[name]
        codec, word_type = Codec(part.codec), np.dtype(tensor.shape.word_type)
        if codec in FULL_CODECS:
            new = decode_full(codec, data.data, part.num_elements, word_type)
            total += tensor_sum(new, first) - tensor_sum(tensor.read(first, len(new)), first)
            tensor.write(first, new)
            return total & MASK
        change = decode_delta(codec, data.data, part.num_elements, word_type)
        if change.indices is None:
            new = tensor.read(first, part.num_elements).copy()
            total -= tensor_sum(new, first)
            apply_change(new, change, undo=undo)
            tensor.write(first, new)
            return (total + tensor_sum(new, first)) & MASK
        indices = change.indices + first
        old = tensor.gather(indices)
        new = changed_values(old, change.steps, undo=undo)
        tensor.scatter(indices, new)
        return (total + sum_change(indices, old, new)) & MASK

    def _predict_tensor(
        self, name: str, steps: list[list[tuple[weights_pb2.Part, np.ndarray]]]
    ) -> int:
        """The tensor's sum after several versions; one tensor is copied, and only if need be."""
        tensor, total = self._tensors[name], self._sums[name]
        word_type = np.dtype(tensor.shape.word_type)
        if len(steps) > 1:
            words = tensor.read(0, tensor.shape.num_words).copy()
            for parts in steps:
                for part, data in parts:
                    window = words[part.first_element : part.first_element + part.num_elements]
                    apply_encoded(window, Codec(part.codec), data.data)
            self._check_finite(name, words)
            return tensor_sum(words)
        for part, data in steps[0]:
            first, codec = part.first_element, Codec(part.codec)
            if codec == Codec.SPARSE_DELTA:
                change = decode_delta(codec, data.data, part.num_elements, word_type)
                assert change.indices is not None
                indices = change.indices + first
                old = tensor.gather(indices)
                new = changed_values(old, change.steps)
                total += sum_change(indices, old, new)
            else:
                new = tensor.read(first, part.num_elements).copy()
                total -= tensor_sum(new, first)
                apply_encoded(new, codec, data.data)
                total += tensor_sum(new, first)
            self._check_finite(name, new)
        return total & MASK

    def _check_finite(self, name: str, words: np.ndarray) -> None:
        mask = EXPONENTS.get(self.schema[name].dtype)
        if mask is None or name not in self._parameters:
            return
        if ((words & words.dtype.type(mask)) == mask).any():
            raise PreconditionFailed(
                f"tensor '{name}' holds NaN or infinity; the training has diverged.",
                reason="NON_FINITE",
                metadata={"tensor": name},
            )

    def _all_sums(self) -> dict[str, int]:
        return {
            name: tensor_sum(tensor.read(0, tensor.shape.num_words))
            for name, tensor in self._tensors.items()
        }


def _overwritten(steps: Sequence[Step]) -> list[str]:
    """Tensors of which a full part replaces elements: those cannot be subtracted."""
    return sorted(
        {name for step in steps for name, part, _ in step.parts() if part.codec in FULL_CODECS}
    )


def _check_bytes(name: str, part: weights_pb2.Part, data: np.ndarray) -> None:
    if xxhash.xxh3_128_digest(data.data) != part.xxh3_128:
        raise _mismatch("part", f"a part of tensor '{name}' does not have its checksum", name)


def _mismatch(layer: str, sentence: str, tensor: str = "") -> PreconditionFailed:
    return PreconditionFailed(
        f"{sentence}; the old weights go on serving, publish again.",
        reason="DIGEST_MISMATCH",
        metadata={"layer": layer, **({"tensor": tensor} if tensor else {})},
    )
