"""Second half of the block and its gradient: launchers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.launches import launch


def shrink_unsupported(y: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the kernels cannot take these arguments, or ``None`` if they can."""
    return layout.wrong_dtype(y)


def shrink(
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    local: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    drop_scale: Tensor | None = None,
) -> Tensor:
    """residual + drop_scale[n] W (local + gate silu(scale y + shift)): (N, O, H, W)."""
    return _shrink((y, weight, scale, shift, local, residual, gate, drop_scale), None, None)


def shrink_statistics(
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    local: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    drop_scale: Tensor | None,
    pivot: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`shrink` and, from the same pass, its (2, O) float64 sums around the pivot."""
    sums = layout.doubles(2, weight.shape[0])
    arguments = (y, weight, scale, shift, local, residual, gate, drop_scale)
    return _shrink(arguments, pivot, sums), sums


def _shrink(arguments: tuple[Any, ...], pivot: Tensor | None, sums: Tensor | None) -> Tensor:
    y, weight, scale, shift, local, residual, gate, drop_scale = arguments
    n, m, h, w = y.shape
    o, dtype = weight.shape[0], y.dtype
    out = layout.new_map(y, n, o, h, w)
    if out.numel() == 0:
        if sums is not None:
            sums.zero_()
        return out
    tensors = [layout.pixels(y), *(layout.dense(t, dtype) for t in (weight, scale, shift))]
    tensors += [layout.dense_map(local), layout.dense_map(residual)]
    tensors += [layout.dense(t, dtype) for t in (gate, drop_scale, pivot)]
    launch(_C.shrink(layout.DTYPES[dtype], (n, h * w, m, o)), *tensors, out, sums)
    return out


def shrink_backward(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    local: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    drop_scale: Tensor | None = None,
    affine: Tensor | None = None,
    *,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the eight tensors of :func:`shrink`, those that are needed.

    With ``affine``: dz in place of y's gradient and its sums in place of scale's, as the reference
    defines them.
    """
    n, m, h, w = y.shape
    o, dtype = weight.shape[0], y.dtype
    trains_norm = affine is not None
    wants_sums = needed[2] or (needed[3] and not trains_norm)
    dy = layout.new_map(y, n, m, h, w) if needed[0] else None
    dweight = layout.empty((o, m), layout.computed_in(dtype)) if needed[1] else None
    sums = layout.doubles(2, m) if wants_sums else None
    dlocal = layout.new_map(y, n, m, h, w) if needed[4] else None
    dgate = layout.doubles(n, m) if needed[6] else None
    ddrop = layout.doubles(n) if needed[7] else None
    mean = invstd = None
    if affine is not None:
        scale, shift, mean, invstd = affine
    if y.numel() == 0:
        for empty in (dy, dweight, sums, dlocal, dgate, ddrop):
            if empty is not None:
                empty.zero_()
    else:
        tensors = [layout.pixels(grad), layout.pixels(y), layout.dense(weight, dtype)]
        tensors += [layout.dense(scale, dtype), layout.dense(shift, dtype), layout.dense_map(local)]
        tensors += [layout.dense(t, dtype) for t in (gate, drop_scale, mean, invstd)]
        tensors += [dy, dweight, dlocal, sums, dgate, ddrop]
        sizes = (n, h * w, m, o, trains_norm)
        launch(_C.shrink_backward(layout.DTYPES[dtype], sizes), *tensors)
    rows: tuple[Tensor | None, Tensor | None] = (None, None)
    if sums is not None:
        rows = (
            (sums, None)
            if trains_norm
            else (layout.gradient_like(sums[1], scale), layout.gradient_like(sums[0], shift))
        )
    residual_grad = grad.clone() if needed[5] else None
    grads = [dy, layout.gradient_like(dweight, weight), *rows, dlocal, residual_grad]
    grads += [layout.gradient_like(dgate, gate), layout.gradient_like(ddrop, drop_scale)]
    return layout.chosen(grads, needed)
