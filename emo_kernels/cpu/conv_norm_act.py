"""Launcher of the dense convolution with its norm and activation: allocate, call, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.bound import BoundCall, bind
from emo_kernels.spec import Conditions, conv_output_size

_MOST_TAPS = 64  # kMostTaps of csrc/emo_kernels.h
_MOST_INPUTS = 16  # beyond, a GEMM over packed pixels is the better kernel


def conv_norm_act_unsupported(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the kernel cannot take these arguments, or ``None`` if it can."""
    if weight.shape[-1] > _MOST_TAPS:
        return f"the cpu kernel takes kernels up to {_MOST_TAPS} taps a side"
    if weight.shape[1] > _MOST_INPUTS:
        return f"the cpu kernel takes up to {_MOST_INPUTS} input channels, got {weight.shape[1]}"
    return layout.wrong_dtype(x)


def _is_nhwc(x: Tensor) -> bool:
    """Whether the map is read as (N, H, W, C); of one that is both layouts, either is right."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _prepare(x: Tensor, tensors: tuple[Tensor | None, ...], **options: Any) -> _C.Prepared:
    weight = tensors[0]
    assert weight is not None
    step = (options["stride"], options["padding"], options["dilation"])
    act = layout.ACTIVATIONS[options["act"]]
    sizes = (*x.shape, weight.shape[0], weight.shape[-1], *step, _is_nhwc(x), act)
    pointers = layout.addresses(*tensors)
    return _C.prepare_conv_norm_act(layout.DTYPES[x.dtype], pointers, sizes, options["eps"])


def _output_shape(x: Tensor, weight: Tensor, **options: Any) -> tuple[int, int, int, int]:
    step = (weight.shape[-1], options["stride"], options["padding"], options["dilation"])
    h, w = (conv_output_size(side, *step) for side in x.shape[2:])
    return x.shape[0], weight.shape[0], h, w


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """act(BN(W * x + b)), as ``emo_kernels.ops.conv_norm_act`` defines it."""
    out = layout.new_map(x, *_output_shape(x, weight, **options))
    if out.numel() == 0:
        return out
    if not _is_nhwc(x):
        x = x.contiguous()
    norm = (norm_weight, norm_bias, norm_mean, norm_var)
    tensors = tuple(None if t is None else t.contiguous() for t in (weight, bias, *norm))
    _prepare(x, tensors, **options)(x.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def conv_norm_act_bind(
    x: Tensor,
    weight: Tensor,
    *others: Tensor | None,
    conditions: Conditions,
    **options: Any,
) -> BoundCall | None:
    """:func:`conv_norm_act` with all settled but the map's contents."""
    if not (x.is_contiguous() or _is_nhwc(x)):
        return None
    kernel = _prepare(x, (weight, *others), **options)
    return bind(kernel, x, x.stride(), _output_shape(x, weight, **options), conditions)
