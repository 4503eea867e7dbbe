"""Tensors as the kernels see them: a map is the matrix (P, C) of its pixels, row by row."""

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


def dense(value: Tensor | None) -> Tensor | None:
    """A vector or a small matrix without gaps."""
    return None if value is None else value.contiguous()


def dense_map(value: Tensor | None) -> Tensor | None:
    """A map as :func:`pixels` gives it."""
    return None if value is None else pixels(value)


def operand(weight: Tensor, x: Tensor) -> Tensor:
    """A 1x1 weight as the dense matrix (O, I) in the type of ``x``, as the dot wants it."""
    return weight.reshape(weight.shape[0], weight.shape[1]).to(x.dtype).contiguous()


def precision() -> str:
    """How tl.dot multiplies fp32 operands."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
