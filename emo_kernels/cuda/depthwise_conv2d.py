"""Depthwise convolution, with the statistics of what it gives, and its gradient: launchers.

For CUDA tensors; for CPU tensors the same calls take the kernels' walk on the host, which is slow
and checks every access. Backends never choose it: it is for tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cuda import layout
from emo_kernels.spec import conv_output_size

_MOST = 2**24  # sizes, as csrc/cuda/depthwise_dispatch.h holds them


def depthwise_conv2d_unsupported(
    x: Tensor, weight: Tensor, *, stride: int, padding: int, dilation: int
) -> str | None:
    """Why these kernels cannot run the call, or ``None`` if they can."""
    if x.dtype not in layout.MAP_DTYPES:
        return f"the CUDA kernels take float32, float16 and bfloat16, got {x.dtype}"
    sizes = (*x.shape[1:], weight.shape[-1], stride, padding, dilation)
    if max(sizes) >= _MOST:
        return f"the CUDA kernels take sizes below 2**24, got {max(sizes)}"
    return None


def _forward(
    x: Tensor,
    weight: Tensor,
    pivot: Tensor | None,
    sums: Tensor | None,
    step: tuple[int, int, int],
) -> Tensor:
    n, c, h, w = x.shape
    k = weight.shape[-1]
    y = layout.new_map(x, n, c, conv_output_size(h, k, *step), conv_output_size(w, k, *step))
    if y.numel() == 0:
        if sums is not None:
            sums.zero_()
        return y
    x, weight = layout.pixels(x), weight.contiguous()
    pivot = None if pivot is None else pivot.contiguous()
    pointers = (
        layout.address(x),
        layout.vector(weight),
        layout.vector(pivot),
        layout.address(y),
        layout.address(sums),
    )
    layout.run(
        _C.cuda_depthwise_conv2d_scratch,
        _C.cuda_depthwise_conv2d,
        _C.cuda_depthwise_conv2d_walk,
        x,
        pointers,
        (n, c, h, w, k, *step),
    )
    return y


def depthwise_conv2d(
    x: Tensor, weight: Tensor, *, stride: int, padding: int, dilation: int
) -> Tensor:
    """One K x K filter per channel, as ``emo_kernels.ops.depthwise_conv2d`` defines it."""
    return _forward(x, weight, None, None, (stride, padding, dilation))


def depthwise_conv2d_statistics(
    x: Tensor, weight: Tensor, pivot: Tensor | None, *, stride: int, padding: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """The convolution y and, from the same pass, its (2, C) float64 sums around the pivot."""
    sums = torch.empty((2, x.shape[1]), dtype=torch.float64, device=x.device)
    return _forward(x, weight, pivot, sums, (stride, padding, dilation)), sums


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
    """Gradients of x and weight, those that are needed, from one reading of the maps.

    Args:
        grad: (N, C, H', W') at y, or, with ``y`` and ``coefficients`` (4, C), behind a batch norm
            of y: then c1 grad + c2 (y - mean) + c3 is the gradient at y.
        x: (N, C, H, W).
        weight: (C, 1, K, K).
        local_grad: (N, C, H, W), added to the gradient of x.
        needed: for x and for weight.
    """
    n, c, h, w = x.shape
    k = weight.shape[-1]
    dx = layout.new_map(x, n, c, h, w) if needed[0] else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
    grads = [g for g in (dx, dweight) if g is not None]
    if not grads:
        return grads
    if grad.numel() == 0:
        return [g.zero_() for g in grads]
    if coefficients is None:
        y = None
    maps = [layout.pixels(grad), layout.pixels(x) if needed[1] else None]
    maps += [layout.pixels_or_none(y), layout.pixels_or_none(local_grad)]
    weight_rows = weight.contiguous()
    rows = None if y is None or coefficients is None else coefficients.contiguous()
    pointers = (
        layout.address(maps[0]),
        layout.address(maps[1]),
        layout.vector(weight_rows),
        layout.address(maps[2]),
        layout.vector(rows),
        layout.address(maps[3]),
        layout.address(dx),
        layout.address(dweight),
    )
    layout.run(
        _C.cuda_depthwise_conv2d_backward_scratch,
        _C.cuda_depthwise_conv2d_backward,
        _C.cuda_depthwise_conv2d_backward_walk,
        x,
        pointers,
        (n, c, h, w, k, stride, padding, dilation),
    )
    if dweight is not None and dweight.stride() != weight.stride():
        grads[-1] = torch.empty_like(weight).copy_(dweight)
    return grads
