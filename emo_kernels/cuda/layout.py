"""Tensors as the CUDA kernels take them: dense, channels innermost, by address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
NORMS = {"none": 0, "affine": 1, "layer": 2}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
MAP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as the dense matrix (N, H, W, C) of its pixels; a copy only if need be."""
    return x.permute(0, 2, 3, 1).contiguous()


def pixels_or_none(x: Tensor | None) -> Tensor | None:
    """:func:`pixels` of a map, if there is one."""
    return None if x is None else pixels(x)


def new_map(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """An uninitialised (N, C, H, W) map with dense pixels, dtype and device of ``like``."""
    strides = (h * w * c, 1, w * c, c)
    return torch.empty_strided((n, c, h, w), strides, dtype=like.dtype, device=like.device)


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for one that is absent. The caller keeps it alive."""
    return 0 if tensor is None else tensor.data_ptr()


def vector(tensor: Tensor | None) -> tuple[int, int]:
    """Address and dtype of a dense vector or small array, which may have any dtype."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def scratch(like: Tensor, size: int) -> Tensor:
    """``size`` bytes on the device of ``like``, aligned to 16 and more."""
    return torch.empty((size + 15) // 16 * 2, dtype=torch.float64, device=like.device)


def run(
    scratch_bytes: Callable[..., int],
    launch: Callable[..., None],
    walk: Callable[..., None],
    x: Tensor,
    pointers: tuple[Any, ...],
    sizes: tuple[float, ...],
) -> None:
    """One call on the device and stream of ``x``, or on the host."""
    arguments = (DTYPES[x.dtype], pointers, sizes)
    space = scratch(x, scratch_bytes(*arguments))
    if not x.is_cuda:
        walk(*arguments, space.data_ptr())
        return
    stream = torch.cuda.current_stream(x.device)
    launch(*arguments, space.data_ptr(), x.device.index, stream.cuda_stream)
