"""One training step of a block, plain and accelerated, for the tests of training."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from block_kinds import KINDS, randomise
from grid import device_of, implementing
from torch import Tensor, nn

import emo_kernels as ek
from emo_kernels import backends
from emo_kernels.nn import iRMB

KERNELS = implementing("irmb_training")
# What a training step is made of, and no kernels: the block's own forward must do.
WITHOUT_KERNELS = ("attention_last", "attention_last_se", "attention_only", "neither")


@pytest.fixture(name="steps")
def counted_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that ran: names of the shrink operator's calls by backend, none from a tape."""
    calls: list[str] = []
    monkeypatch.setattr("emo_kernels.cpu.repeated", lambda run, options, t: run(*options, *t))
    for name in KERNELS:
        shrink = backends.function(name, "shrink_backward")
        namespace = backends._namespaces[name]

        def counted(*args: Any, _name: str = name, _run: Any = shrink, **kwargs: Any) -> Any:
            calls.append(_name)
            return _run(*args, **kwargs)

        monkeypatch.setattr(namespace, "shrink_backward", counted)
    yield calls


@pytest.fixture(name="x")
def small_map(backend: str) -> Tensor:
    return torch.randn(3, 4, 5, 4, generator=torch.Generator().manual_seed(1)).to(
        device_of(backend)
    )


def small(kind: str, **changes: Any) -> iRMB:
    block = randomise(iRMB(4, 4, dim_head=2, window_size=2, **{**KINDS[kind], **changes}))
    return block.float().train()


def twins(block: nn.Module, backend: str) -> tuple[nn.Module, nn.Module]:
    """(plain, accelerated) with the same weights, where the backend's tensors live."""
    block = block.to(device_of(backend))
    return copy.deepcopy(block), ek.accelerate(block, backend=backend)


def step(block: nn.Module, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = block(x)
    generator = torch.Generator().manual_seed(7)
    y.backward(torch.randn(y.shape, generator=generator).to(y))
    grads = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in block.named_buffers()}
    return {"out": y.detach(), "x": x.grad, **grads, **buffers}


def assert_same_step(plain: nn.Module, fast: nn.Module, x: Tensor, limit: float = 2e-5) -> None:
    want, got = step(plain, x), step(fast, x)
    assert got.keys() == want.keys()
    for name, expected in want.items():
        found = got[name]
        if name == "qk.conv.bias":  # half of it has no influence
            found, expected = found.chunk(2)[0], expected.chunk(2)[0]
        assert found.dtype == expected.dtype and found.shape == expected.shape, name
        scale = max(float(expected.double().norm()), 1e-3)
        error = float((found.double() - expected.double()).norm()) / scale
        assert error < limit, f"{name}: {error:.2e}"


def assert_as_near_as_autocast(
    draws: Iterable[tuple[nn.Module, nn.Module, Tensor]], dtype: torch.dtype
) -> None:
    """Steps under autocast are as near the fp64 block's as eager's: maps, gradients, buffers.

    Over all the draws (plain, fast, x) together: of one, either may be the luckier.
    """
    errors: dict[str, list[Tensor]] = defaultdict(list)
    for plain, fast, x in draws:
        exact = copy.deepcopy(plain).double()
        with torch.autocast(x.device.type, dtype):
            eager, got = step(plain, x), step(fast, x)
        want = step(exact, x.double())
        assert got.keys() == eager.keys() == want.keys()
        for name, truth in want.items():
            assert got[name].dtype == eager[name].dtype, name
            parts = [got[name].double() - truth, eager[name].double() - truth, truth.double()]
            if name == "qk.conv.bias":  # half of it has no influence
                parts = [t.chunk(2)[0] for t in parts]
            errors[name].append(torch.stack([t.square().sum() for t in parts]))
    for name, squares in errors.items():
        ours, eagers, size = torch.stack(squares).sum(0).sqrt().tolist()
        # The masters' gradients are fp32 in both; what rounds is the 16 bits of the maps.
        limit = 1.25 * eagers + torch.finfo(dtype).eps / 2 * size
        assert ours <= limit, f"{name}: {ours:.2e} > {limit:.2e}"
