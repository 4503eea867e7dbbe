"""Training kernels inside what surrounds a step: checkpointing, compile, autograd's memory."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from block_kinds import relative
from grid import device_of, slow_with
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training_step import (  # noqa: F401  (the fixtures)
    assert_same_step,
    counted_steps,
    small,
    small_map,
    twins,
)

import emo_kernels as ek
from emo_kernels.accelerate import AcceleratedForward

OPERATOR = "irmb_training"
# Some of the blocks have no kernel for inference; what trains is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:accelerate. .* blocks are not accelerated")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend: str, reentrant: bool, x: Tensor) -> None:
    plain, fast = twins(small("attention_pre"), backend)
    x = x.requires_grad_()
    for block in (plain, fast):
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        y.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        if name != "qk.conv.bias":
            assert relative(q.grad, p.grad) < 2e-5, name


def test_double_backward_is_pytorchs(backend: str, x: Tensor) -> None:
    plain, fast = twins(small("conv"), backend)
    seconds = []
    for block in (plain, fast):
        leaf = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert relative(seconds[1], seconds[0]) < 1e-4


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["conv_layer_norm_se", "attention_both_pre"])
def test_compiled(backend: str, kind: str, compiler: str, x: Tensor, steps: list[str]) -> None:
    plain, fast = twins(small(kind), backend)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend=compiler)
    assert_same_step(plain, _Named(compiled, fast), x)
    assert steps == [backend]


class _Named(nn.Module):
    """A compiled block under the names of the block."""

    def __init__(self, compiled: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.call, self.block = [compiled], [block]

    def forward(self, x: Tensor) -> Tensor:
        return self.call[0](x)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.block[0].named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self.block[0].named_buffers(*args, **kwargs)


@slow_with("triton")
def test_saved_bytes_of_emo_5m(backend: str) -> None:
    """At batch 256 in bf16, by count: 5.3 GB at most for the whole model; eager keeps 12.3."""
    model = ek.create_model("emo_5m").train()
    ek.accelerate(model, backend=backend)
    assert all(
        isinstance(m.__dict__["forward"], AcceleratedForward)
        for _, m in ek.accelerate.__globals__["find_blocks"](model)
    )
    batch = 8
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(batch, 3, 224, 224, device=device_of(backend))
        x = x.to(memory_format=torch.channels_last)
        half = backend != "cpu"  # whose kernels take no 16-bit maps: in fp32, and twice the bytes
        fused = saved_bytes(model, x, half)
        ek.restore(model)
        eager = saved_bytes(model, x, half)
    width = 1 if half else 2
    # On a CPU, in fp32, q, k and slopes of expansions from 64 channels on are kept too, narrower
    # expansions without a skip are not: 11.1 GB by count.
    assert fused / batch * 256 < (11.2e9 if backend == "cpu" else 5.3e9)
    assert width * 12.0e9 < eager / batch * 256 < width * 13.0e9, "the count itself is off"


def saved_bytes(model: nn.Module, x: Tensor, half: bool) -> int:
    """Bytes of the distinct storages that autograd keeps of one step, but for the weights'."""
    weights = {p.shape for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.shape not in weights:
            kept.setdefault(t.untyped_storage()._cdata, t)
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast(x.device.type, torch.bfloat16, enabled=half),
    ):
        out = model(x)
    assert out.shape == (x.shape[0], 1000)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_explain_names_the_training_backend(backend: str) -> None:
    block = small("attention_pre").to(device_of(backend))
    (row,) = ek.explain(ek.accelerate(block, backend=backend)).rows
    assert row.training == backend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = ek.accelerate(small("attention_last").to(device_of(backend)))
    (row,) = ek.explain(block).rows
    assert row.training == "reference" and "behind the convolution" in str(row.training_reasons)


@pytest.mark.parametrize("of", ["the map", "the gradient"])
def test_lazy_negation_is_read(of: str) -> None:
    torch.manual_seed(0)
    block = ek.nn.iRMB(16, 16, attn_s=False, exp_ratio=2.0).train()
    other = copy.deepcopy(block)
    ek.accelerate(block, backend="cpu")
    x, grad = torch.randn(2, 16, 9, 9), torch.randn(2, 16, 9, 9)
    if of == "the map":
        x = torch._neg_view(x)
    else:
        grad = torch._neg_view(grad)
    found = []
    for one in (block, other):
        mine = x.detach().requires_grad_()
        out = one(mine)
        out.backward(grad)
        assert mine.grad is not None
        found.append((out.detach(), mine.grad, one.proj.conv.weight.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
