"""Training kernels across processes: synchronised batch norm inside DistributedDataParallel."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from block_kinds import randomise, relative
from grid import device_of, implementing
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

import emo_kernels as ek
from emo_kernels.models.stages import PatchEmbedding
from emo_kernels.nn import iRMB

# Half of the one; the batch's mean takes the other away again.
NO_INFLUENCE = ("qk.conv.bias", "convs.0.0.bias")
SHARES = (2, 1)  # images of each process: batches need not be equal
OPTIONS = {"attn_pre": True, "exp_ratio": 2.0, "act_layer": "gelu", "qkv_bias": True}


def make_block(stem: bool = False) -> nn.Module:
    """A block; or one behind a stem, of the same input."""
    torch.manual_seed(0)
    block = randomise(iRMB(4, 4, dim_head=2, window_size=2, **OPTIONS)).float().train()
    return nn.Sequential(PatchEmbedding(4, 4, "silu").train(), block) if stem else block


def make_batch(stem: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    sides = [(9, 8), (5, 4)] if stem else [(5, 4), (5, 4)]
    return tuple(torch.randn(sum(SHARES), 4, *side, generator=generator) for side in sides)


def train_a_share(rank: int, backend: str, stem: bool, folder: str) -> None:
    """What one process does; it leaves its results in ``folder``."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", len(SHARES))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(SHARES))
    block = make_block(stem)
    model = DistributedDataParallel(block)
    for norm in [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]:
        # DistributedDataParallel lets nobody in who has these on the CPU, but not what becomes so.
        norm.__class__, norm.process_group = nn.SyncBatchNorm, None
    ek.accelerate(block, backend=backend)
    x, g = (t.split(SHARES)[rank].clone() for t in make_batch(stem))
    x.requires_grad_()
    y = model(x)
    y.backward(g)
    grads = {n: p.grad * len(SHARES) for n, p in block.named_parameters()}  # DDP averages
    result = {"y": y.detach(), "x": x.grad, "grads": grads, "buffers": dict(block.named_buffers())}
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def shard_a_block(rank: int, backend: str, folder: str) -> None:
    """The same step under FSDP2, its parameters gathered when the block is called."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", len(SHARES))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(SHARES))
    block = make_block()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # every process has its own batch: statistics that all share
    plain = copy.deepcopy(block)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (len(SHARES),))
    fully_shard(ek.accelerate(block, backend=backend), mesh=mesh)
    x, g = make_batch()
    block(x).backward(g)
    plain(x).backward(g)
    errors = {
        name: relative(p.grad.full_tensor(), q.grad)
        for (name, p), q in zip(block.named_parameters(), plain.parameters(), strict=True)
    }
    torch.save(errors, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def blocks_and_stems() -> Iterator[Any]:
    """Every backend's block; the stem of those that train it: PyTorch's would need a GPU here."""
    for stem, operator in ((False, "irmb_training"), (True, "conv_norm_act_training")):
        for backend in implementing(operator):
            yield pytest.param(backend, stem, id=f"{backend}-{'stem' if stem else 'block'}")


@pytest.mark.slow
@pytest.mark.parametrize("backend", implementing("irmb_training"))
def test_fully_sharded_parameters(backend: str) -> None:
    if device_of(backend) == "cuda":
        pytest.skip("two processes on one GPU: gloo on CPU tensors shows the same sharding")
    with tempfile.TemporaryDirectory() as folder:
        spawn(shard_a_block, (backend, folder), nprocs=len(SHARES))
        errors = torch.load(Path(folder, "0.pt"))
    del errors["qk.conv.bias"]  # half of it has no influence
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize(("backend", "stem"), list(blocks_and_stems()))
def test_two_processes_are_one_batch(backend: str, stem: bool) -> None:
    if device_of(backend) == "cuda":
        pytest.skip("two processes on one GPU: gloo on CPU tensors shows the same collectives")
    plain = make_block(stem)
    untouched = copy.deepcopy(plain)
    x, g = make_batch(stem)
    x.requires_grad_()
    y = plain(x)
    y.backward(g)
    with tempfile.TemporaryDirectory() as folder:
        spawn(train_a_share, (backend, stem, folder), nprocs=len(SHARES))
        found = [torch.load(Path(folder, f"{r}.pt")) for r in range(len(SHARES))]
    assert relative(torch.cat([f["y"] for f in found]), y) < 1e-5
    assert relative(torch.cat([f["x"] for f in found]), x.grad) < 1e-5
    for name, p in plain.named_parameters():
        if not name.endswith(NO_INFLUENCE):
            assert relative(found[0]["grads"][name], p.grad) < 2e-5, name
    before = dict(untouched.named_buffers())
    for name, buffer in plain.named_buffers():
        assert not torch.equal(buffer, before[name]), name
        for rank in range(len(SHARES)):
            got = found[rank]["buffers"][name]
            assert torch.allclose(got, buffer, rtol=1e-5, atol=1e-6), name
