"""Launcher of layer norm, mean and linear head: allocate, call, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.bound import bind
from emo_kernels.spec import BoundCall, Conditions


def norm_pool_linear_unsupported(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the kernel cannot take these arguments, or ``None`` if it can."""
    return layout.wrong_dtype(x)


def _prepare(x: Tensor, tensors: tuple[Tensor | None, ...], eps: float) -> _C.Prepared:
    weight = tensors[0]
    assert weight is not None
    pointers = layout.addresses(*tensors)
    return _C.prepare_norm_pool_linear(
        layout.DTYPES[x.dtype], pointers, (*x.shape, weight.shape[0]), eps
    )


def norm_pool_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float,
) -> Tensor:
    """W mean(LN(x)) + b, as ``emo_kernels.ops.norm_pool_linear`` defines it."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    if out.numel() == 0:
        return out
    pixels = layout.pixels(x)
    operands = (weight, bias, norm_weight, norm_bias)
    tensors = tuple(None if t is None else t.contiguous() for t in operands)
    _prepare(x, tensors, eps)(pixels.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def norm_pool_linear_bind(
    x: Tensor,
    weight: Tensor,
    *others: Tensor | None,
    conditions: Conditions,
    eps: float,
) -> BoundCall | None:
    """:func:`norm_pool_linear` with all settled but the map's contents."""
    kernel = _prepare(x, (weight, *others), eps)
    return bind(
        kernel,
        x,
        layout.strides(*x.shape[1:]),
        (x.shape[0], weight.shape[0]),
        conditions,
        memory_format=torch.channels_last,
    )
