"""The channel means of squeeze-excite, forward and backward: launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.launches import launch

_SQUEEZE, _BACKWARD = 2, 3  # PixelsOp of csrc/emo_kernels.h


def squeeze(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(N, M): the mean over an image's pixels of silu(scale[m] y + shift[m])."""
    n, m, h, w = y.shape
    if y.numel() == 0:
        return scale.new_zeros((n, m))
    y, rows = layout.pixels(y), layout.dense(torch.stack([scale, shift]), y.dtype)
    means = layout.empty((n, m), layout.computed_in(y.dtype))
    kernel = _C.pixels(layout.DTYPES[y.dtype], _SQUEEZE, 0, (n, h * w, m))
    launch(kernel, y, None, None, None, rows, means, None, None)
    return means.to(scale.dtype)


def squeeze_backward(grad: Tensor, y: Tensor, affine: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """dz with what comes through the means, and its sums (2, M) in float64."""
    n, m, h, w = y.shape
    out = layout.new_map(y, n, m, h, w)
    if y.numel() == 0:
        return out, y.new_zeros((2, m), dtype=torch.float64)
    sums = layout.doubles(2, m)
    y, dz, means = layout.pixels(y), layout.pixels(dz), layout.dense(grad, y.dtype)
    rows = layout.dense(affine, y.dtype)
    kernel = _C.pixels(layout.DTYPES[y.dtype], _BACKWARD, 0, (n, h * w, m))
    launch(kernel, y, dz, None, None, rows, means, out, sums)
    return out, sums
