"""Batch norm of a training step: launchers of the sums and of the gradient over the pixels.

What is left between them is (C,) wide, and plain torch in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout

_SUMS, _BACKWARD = 0, 1  # PixelsOp of csrc/emo_kernels.h


def batch_norm_sums(x: Tensor, pivot: Tensor | None) -> Tensor:
    """(2, C) float64: sums over the pixels of x - pivot and of its square."""
    n, c, h, w = x.shape
    if x.numel() == 0:
        return x.new_zeros((2, c), dtype=torch.float64)
    x, pivot = layout.pixels(x), layout.dense(pivot, x.dtype)
    sums = layout.doubles(2, c)
    pointers = layout.addresses(x, None, None, pivot, None, None, None, sums)
    threads = torch.get_num_threads()
    _C.pixels(layout.DTYPES[x.dtype], _SUMS, pointers, (n, h * w, c), threads)
    return sums


def batch_norm_finalize(
    sums: Tensor,
    count: float,
    global_count: Tensor | None,
    pivot: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """(4, C): scale, shift, mean, 1 / sqrt(var + eps); moves the running statistics in place."""
    n = count if global_count is None else global_count.double()
    mean = sums[0] / n
    var = torch.addcmul(sums[1] / n, mean, mean, value=-1.0).clamp_min_(0.0)
    if pivot is not None:
        mean += pivot
    for running, new in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
        if running is not None:
            running.copy_(torch.lerp(running.double(), new, momentum))
    invstd = torch.rsqrt(var + eps)
    affine = torch.empty((4, sums.shape[1]), dtype=dtype)
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale
    affine[0] = scale
    affine[1] = shift if bias is None else shift + bias
    affine[2] = mean
    affine[3] = invstd
    return affine


def batch_norm_backward_finalize(
    sums: Tensor,
    affine: Tensor,
    count: float,
    global_count: Tensor | None,
    batch_statistics: bool,
) -> Tensor:
    """(4, C): c1, c2, c3, mean of dx = c1 dz + c2 (x - mean) + c3."""
    scale, _, mean, invstd = affine
    coefficients = torch.zeros_like(affine)
    coefficients[0] = scale
    coefficients[3] = mean
    if batch_statistics:
        n = count if global_count is None else global_count.double()
        means = sums * scale.double() / -n
        coefficients[1] = means[1] * invstd
        coefficients[2] = means[0]
    return coefficients


def batch_norm_backward(
    grad: Tensor, x: Tensor, coefficients: Tensor, residual: Tensor | None
) -> Tensor:
    """dx = c1 grad + c2 (x - mean) + c3 (+ residual): (N, C, H, W), channels_last."""
    n, c, h, w = x.shape
    dx = layout.new_map(x, n, c, h, w)
    if x.numel() == 0:
        return dx
    x, grad, residual = layout.pixels(x), layout.pixels(grad), layout.dense_map(residual)
    rows = layout.dense(coefficients, x.dtype)
    pointers = layout.addresses(x, grad, residual, None, rows, None, dx, None)
    threads = torch.get_num_threads()
    _C.pixels(layout.DTYPES[x.dtype], _BACKWARD, pointers, (n, h * w, c), threads)
    return dx
