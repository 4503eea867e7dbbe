"""Expanding pointwise convolution and its gradient: launchers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.launches import launch


def expand_unsupported(
    x: Tensor, weight: Tensor, *_: Tensor | None, groups: int = 1, **__: Any
) -> str | None:
    """Why the kernels cannot take these arguments, or ``None`` if they can."""
    if groups != 1:
        return f"the cpu kernels have no grouped expansion, got groups = {groups}"
    return layout.wrong_dtype(x)


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm: str = "none",
    eps: float = 1e-6,
    act: str = "none",
    groups: int = 1,
) -> Tensor:
    """act(W norm(x) + b), as ``emo_kernels.ops.expand`` defines it: (N, M, H, W)."""
    n, c, h, w = x.shape
    m, dtype = weight.shape[0], x.dtype
    out = layout.new_map(x, n, m, h, w)
    if out.numel() == 0:
        return out
    parameters = [layout.dense(t, dtype) for t in (weight, bias, norm_weight, norm_bias)]
    x = layout.pixels(x)
    sizes = (n, h * w, c, m, layout.NORMS[norm], layout.ACTIVATIONS[act])
    launch(_C.expand(layout.DTYPES[dtype], sizes, eps), x, *parameters, out)
    return out


def expand_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    affine: Tensor | None = None,
    out_grad: Tensor | None = None,
    out_weight: Tensor | None = None,
    drop_scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    needed: Sequence[bool],
    norm: str = "none",
    eps: float = 1e-6,
    act: str = "none",
    groups: int = 1,
    norm_grad: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of (x, weight, bias, norm_weight, norm_bias), those that are needed.

    With ``affine``: the gradient at norm(x) and its sums, as the reference defines them.

    Args:
        norm_grad: (N, C, H, W), added to the gradient at norm(x).
    """
    n, c, h, w = x.shape
    m, dtype = weight.shape[0], x.dtype
    o = 0 if out_grad is None else out_grad.shape[1]
    trains_norm = affine is not None
    wants_sums = needed[3] or (needed[4] and not trains_norm)
    dx = layout.new_map(x, n, c, h, w) if needed[0] else None
    dweight = layout.empty((m, c), layout.computed_in(dtype)) if needed[1] else None
    dbias = layout.doubles(m) if needed[2] else None
    sums = layout.doubles(2, c) if wants_sums else None
    mean = invstd = None
    if affine is not None:
        norm, (norm_weight, norm_bias, mean, invstd) = "affine", affine
        residual = None
    if x.numel() == 0:
        for empty in (dx, dweight, dbias, sums):
            if empty is not None:
                empty.zero_()
    else:
        tensors = [layout.pixels(grad), layout.pixels(x), layout.dense(weight, dtype)]
        vectors = (bias, norm_weight, norm_bias, mean, invstd)
        tensors += [layout.dense(t, dtype) for t in vectors]
        tensors += [layout.dense_map(out_grad), layout.dense(out_weight, dtype)]
        tensors += [layout.dense(drop_scale, dtype)]
        tensors += [layout.dense_map(residual), layout.dense_map(norm_grad)]
        tensors += [dx, dweight, dbias, sums]
        sizes = (n, h * w, c, m, o, layout.NORMS[norm], layout.ACTIVATIONS[act], trains_norm)
        launch(_C.expand_backward(layout.DTYPES[dtype], sizes, eps), *tensors)
    grads = [dx, *map(layout.gradient_like, (dweight, dbias), (weight, bias))]
    if trains_norm:
        return layout.chosen([*grads, sums, None], needed)
    rows = (None, None) if sums is None else (sums[1], sums[0])
    return layout.chosen(
        [*grads, *map(layout.gradient_like, rows, (norm_weight, norm_bias))], needed
    )
