"""Gradients of a composition by PyTorch's own autograd, for the backward of every reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    grad: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """d<function(*tensors), grad> / d tensor, for the needed tensors in order."""
    with torch.enable_grad():
        leaves = [
            None if t is None else t.detach().requires_grad_(n)
            for t, n in zip(tensors, needed, strict=True)
        ]
        sought = [t for t, n in zip(leaves, needed, strict=True) if t is not None and n]
        if not sought:
            return []
        out = function(*leaves)
        return list(torch.autograd.grad(out, sought, grad.to(out.dtype), materialize_grads=True))


def channel_sums(grad: Tensor, x: Tensor, affine: Tensor) -> Tensor:
    """(2, C) in float64: sum grad and sum grad xhat over pixels, xhat = (x - mean) invstd."""
    grad64 = grad.double()
    mean, invstd = affine[2:].double().reshape(2, 1, -1, 1, 1)
    return torch.stack([grad64.sum((0, 2, 3)), (grad64 * (x - mean) * invstd).sum((0, 2, 3))])
