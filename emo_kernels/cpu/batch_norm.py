"""Batch norm of a training step: launchers of its passes over a map and of what lies between."""

from __future__ import annotations

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.launches import launch, moves

_SUMS, _BACKWARD, _ACT, _ACT_SUMS = 0, 1, 4, 5  # PixelsOp of csrc/emo_kernels.h


def batch_norm_sums(x: Tensor, pivot: Tensor | None) -> Tensor:
    """(2, C) float64: sums over the pixels of x - pivot and of its square."""
    n, c, h, w = x.shape
    if x.numel() == 0:
        return x.new_zeros((2, c), dtype=torch.float64)
    x, pivot = layout.pixels(x), layout.dense(pivot, x.dtype)
    sums = layout.doubles(2, c)
    kernel = _C.pixels(layout.DTYPES[x.dtype], _SUMS, 0, (n, h * w, c))
    launch(kernel, x, None, None, pivot, None, None, None, sums)
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
    affine = layout.empty((4, sums.shape[1]), dtype)
    vectors = [layout.dense(t, dtype) for t in (pivot, weight, bias, running_mean, running_var)]
    sums = sums.contiguous()  # float64, as the kernels write them
    n = float(count if global_count is None else global_count)
    kernel = _C.batch_norm(layout.DTYPES[dtype], sums.shape[1], n, momentum, eps)
    launch(kernel, sums, *vectors, affine, None)
    for running, moved in zip((running_mean, running_var), vectors[3:], strict=True):
        if running is None or moved is None:
            continue
        if moved is not running:
            if running.dtype in layout.DTYPES and running.is_contiguous():
                dtypes = layout.DTYPES[dtype], layout.DTYPES[running.dtype]
                launch(_C.convert(*dtypes, running.numel()), moved, running)
            else:
                launch(running.copy_, moved)
        moves(running)
    return affine


def batch_norm_backward_finalize(
    sums: Tensor,
    affine: Tensor,
    count: float,
    global_count: Tensor | None,
    batch_statistics: bool,
) -> Tensor:
    """(4, C): c1, c2, c3, mean of dx = c1 dz + c2 (x - mean) + c3."""
    coefficients = layout.empty(tuple(affine.shape), affine.dtype)
    known = sums.contiguous() if batch_statistics else None
    n = float(count if global_count is None else global_count)
    kernel = _C.batch_norm(layout.DTYPES[affine.dtype], affine.shape[1], n, 0.0, 0.0)
    launch(kernel, known, None, None, None, None, None, affine, coefficients)
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
    kernel = _C.pixels(layout.DTYPES[x.dtype], _BACKWARD, 0, (n, h * w, c))
    launch(kernel, x, grad, residual, None, rows, None, dx, None)
    return dx


def batch_norm_activate(x: Tensor, norm: Tensor, *, act: str) -> Tensor:
    """act(scale (x - mean) + bias): (N, C, H, W), channels_last."""
    n, c, h, w = x.shape
    out = layout.new_map(x, n, c, h, w)
    if x.numel() == 0:
        return out
    x, rows = layout.pixels(x), layout.dense(norm, x.dtype)
    launch(_norm_act(x, _ACT, act), x, None, None, None, rows, None, out, None)
    return out


def batch_norm_activate_sums(grad: Tensor, x: Tensor, norm: Tensor, *, act: str) -> Tensor:
    """(2, C) float64: sum dz and sum dz xhat, dz behind the norm, grad behind act."""
    n, c, h, w = x.shape
    if x.numel() == 0:
        return x.new_zeros((2, c), dtype=torch.float64)
    x, grad, rows = layout.pixels(x), layout.pixels(grad), layout.dense(norm, x.dtype)
    sums = layout.doubles(2, c)
    launch(_norm_act(x, _ACT_SUMS, act), x, grad, None, None, rows, None, None, sums)
    return sums


def _norm_act(x: Tensor, op: int, act: str) -> _C.Launch:
    n, c, h, w = x.shape
    return _C.pixels(layout.DTYPES[x.dtype], op, layout.ACTIVATIONS[act], (n, h * w, c))
