"""Depthwise convolution, with the statistics of what it gives, and its gradient: launchers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.launches import launch
from emo_kernels.spec import conv_output_size

_MOST_TAPS = 64  # kMostTaps of csrc/emo_kernels.h


def depthwise_conv2d_unsupported(x: Tensor, weight: Tensor, **_: Any) -> str | None:
    """Why the kernels cannot take these arguments, or ``None`` if they can."""
    if weight.shape[-1] > _MOST_TAPS:
        return f"the cpu kernels take depthwise kernels up to {_MOST_TAPS} taps a side"
    return layout.wrong_dtype(x)


def _convolve(
    x: Tensor,
    weight: Tensor,
    pivot: Tensor | None,
    sums: Tensor | None,
    options: tuple[int, int, int],
) -> Tensor:
    n, c, h, w = x.shape
    k = weight.shape[-1]
    y = layout.new_map(x, n, c, conv_output_size(h, k, *options), conv_output_size(w, k, *options))
    if y.numel() == 0:
        if sums is not None:
            sums.zero_()
        return y
    filters, pivot = layout.dense(weight, x.dtype), layout.dense(pivot, x.dtype)
    x = layout.pixels(x)
    kernel = _C.depthwise_conv2d(layout.DTYPES[x.dtype], (n, c, h, w, k, *options))
    launch(kernel, x, filters, pivot, y, sums)
    return y


def depthwise_conv2d(
    x: Tensor, weight: Tensor, *, stride: int = 1, padding: int, dilation: int = 1
) -> Tensor:
    """y[c] = w[c] * x[c], as ``emo_kernels.ops.depthwise_conv2d`` defines it."""
    return _convolve(x, weight, None, None, (stride, padding, dilation))


def depthwise_conv2d_statistics(
    x: Tensor,
    weight: Tensor,
    pivot: Tensor | None,
    *,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """y and, from the same pass, its (2, C) float64 sums around the pivot."""
    sums = layout.doubles(2, x.shape[1])
    return _convolve(x, weight, pivot, sums, (stride, padding, dilation)), sums


def depthwise_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    local_grad: Tensor | None = None,
    *,
    needed: Sequence[bool],
    stride: int,
    padding: int,
    dilation: int,
) -> list[Tensor]:
    """Gradients of x and weight, those that are needed."""
    n, c, h, w = x.shape
    k = weight.shape[-1]
    dx = layout.new_map(x, n, c, h, w) if needed[0] else None
    dweight = layout.empty((c, 1, k, k), layout.computed_in(x.dtype)) if needed[1] else None
    if grad.numel() == 0:
        grads = [None if g is None else g.zero_() for g in (dx, dweight)]
        return layout.chosen(grads, needed)
    if coefficients is None:
        y = None
    tensors = (
        layout.pixels(grad),
        layout.pixels(x) if needed[1] else None,
        layout.dense(weight, x.dtype),
        layout.dense_map(y),
        layout.dense(coefficients, x.dtype),
        layout.dense_map(local_grad),
        dx,
        dweight,
    )
    sizes = (n, c, h, w, k, stride, padding, dilation)
    launch(_C.depthwise_conv2d_backward(layout.DTYPES[x.dtype], sizes), *tensors)
    return layout.chosen([dx, layout.gradient_like(dweight, weight)], needed)
