"""Maps as the kernels see them: the matrix (P, C) of a map's pixels, row by row, P = N H W."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def pixels(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) with the pixels dense in memory, C fastest; a copy only if need be.

    The strides of dimensions of one element, which PyTorch leaves open, are settled too.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def new_map(
    like: Tensor, n: int, c: int, h: int, w: int, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised (N, C, H, W) map with dense pixels on the device of ``like``."""
    dtype = like.dtype if dtype is None else dtype
    strides = (h * w * c, 1, w * c, c)  # not a view, which could not be changed in place
    return torch.empty_strided((n, c, h, w), strides, dtype=dtype, device=like.device)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launch on the GPU that holds ``x``, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
