"""What each rank of a sharded trainer encodes of a tensor, and that the ranks make one version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from kleash.lm.digest import tensor_words
from kleash.ppo.shards import local_shard

pytestmark = pytest.mark.unit

NUM_RANKS = 3


@pytest.fixture(params=range(NUM_RANKS))
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """Three ranks of which this process is one: torch's group that never sends anything."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=NUM_RANKS)
    yield init_device_mesh("cpu", (NUM_RANKS,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize("shape", [(7, 4), (6,), (2, 3), (1,), (5, 2, 3), (0, 4)])
def test_rows_are_a_flat_range(
    mesh: DeviceMesh, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """ceil(rows / ranks) rows for each rank, as long as there are some; then none."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    whole = tensor_words(tensor)
    shard = local_shard(distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None))
    rows = -(-shape[0] // NUM_RANKS)
    words_in_row = len(whole) // max(shape[0], 1)
    start = min(rows * dist.get_rank(), shape[0]) * words_in_row
    end = min(rows * (dist.get_rank() + 1), shape[0]) * words_in_row
    assert shard.words.tolist() == whole[start:end].tolist()
    assert shard.first == start
    assert shard.words.dtype == whole.dtype


def test_a_plain_tensor_is_whole() -> None:
    tensor = torch.randn(3, 4, dtype=torch.bfloat16)
    shard = local_shard(tensor)
    assert shard.first == 0
    assert shard.words.dtype == np.uint16
    assert shard.words.tobytes() == tensor.view(torch.int16).numpy().tobytes()
    assert np.shares_memory(shard.words, tensor.view(torch.int16).numpy())


@pytest.mark.parametrize("shape", [(3, 4), ()])
def test_a_replicated_tensor_is_whole(mesh: DeviceMesh, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape)
    shard = local_shard(distribute_tensor(tensor, mesh, [Replicate()], src_data_rank=None))
    assert shard.words.tolist() == tensor_words(tensor).tolist()
    assert shard.first == 0


@pytest.mark.parametrize("placement", [Shard(1), Partial()])
def test_what_is_no_flat_range_is_refused(mesh: DeviceMesh, placement: Shard | Partial) -> None:
    tensor = DTensor.from_local(torch.ones(6, 2), mesh, [placement], run_check=False)
    with pytest.raises(ValueError, match=r"is not one flat range; shard its first dimension"):
        local_shard(tensor)


RANK = """
import json, sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from kleash.lm.digest import canonical_tensors, tensor_words
from kleash.lm.tiny import build_causal_lm
from kleash.ppo.shards import local_shard
from kleash.weights.encoder import Shadow, Shard, encode_shards, merge
from kleash.weights.manifest import TensorShape, check_manifest, schema_digest
from kleash.weights.v1 import weights_pb2

folder, rank, num_ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
)
# Odd sizes: the ranks' shares differ.
model = build_causal_lm("llama", vocab_size=61, hidden_size=24, num_layers=2, intermediate_size=27)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)


def tensors():
    return {name: its.bfloat16() for name, its in canonical_tensors(model).items()}


schema = {name: TensorShape(tuple(its.shape), "BF16") for name, its in tensors().items()}


def shards():
    cast = tensors()
    return lambda name: local_shard(cast[name])


def whole():
    gathered = {name: Shard(tensor_words(its.full_tensor())) for name, its in tensors().items()}
    return gathered.__getitem__


shadow, old = Shadow.of(schema, shards()), Shadow.of(schema, whole())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
ids = torch.randint(5, 61, (2, 16), generator=torch.Generator().manual_seed(rank))
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()

made = encode_shards(schema, shadow, shards(), folder)
ranks = [None] * num_ranks
dist.all_gather_object(ranks, made)
new = whole()
if rank == 0:
    version = {"run_id": "run", "fence": 1, "version": 1, "base": (0, old.digest)}
    manifest, file = merge(schema, ranks, folder, **version)
    check_manifest(manifest, schema, schema_digest(schema))
    single = encode_shards(schema, old, new, folder)
    unsharded, _ = merge(schema, [single], folder, **version)
    content = np.fromfile(file, np.uint8)
    old.advance(manifest, content, single.sums)
    (folder / "manifest").write_bytes(manifest.SerializeToString())
    np.save(folder / "object.npy", content)
    found = {
        "sharded": manifest.result_digest,
        "unsharded": unsharded.result_digest,
        "base": manifest.base_digest,
        "is_applied": all(
            np.array_equal(old.shards[name].words, new(name).words) for name in schema
        ),
        "parts": [len(entry.parts) for entry in manifest.tensors],
    }
    (folder / "found.json").write_text(json.dumps(found))
dist.barrier()
# Every rank brings its own share of the shadow to the committed version.
manifest = weights_pb2.Manifest.FromString((folder / "manifest").read_bytes())
shadow.advance(manifest, np.load(folder / "object.npy"), made.sums)
now = shards()
assert all(np.array_equal(shadow.shards[name].words, now(name).words) for name in schema)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_of_fsdp_publish_without_gathering(tmp_path: Path) -> None:
    """Two processes train one step under FSDP2; each encodes what it holds against its shadow."""
    num_ranks = 2
    errors = [(tmp_path / f"rank{rank}.txt").open("w+") for rank in range(num_ranks)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path, str(rank), str(num_ranks)],
            stdout=error,
            stderr=error,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank, error in enumerate(errors)
    ]
    try:
        for process, error in zip(ranks, errors, strict=True):
            code = process.wait(200)
            error.seek(0)
            assert code == 0, error.read()
    finally:
        for process, error in zip(ranks, errors, strict=True):
            process.kill()
            process.wait()
            error.close()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sharded"] == found["unsharded"] != found["base"]
    assert found["is_applied"]
    assert max(found["parts"]) == num_ranks
