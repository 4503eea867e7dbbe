"""Launchers of the dense convolution with its norm and activation, and of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.batch_norm import batch_norm_activate_sums, batch_norm_backward_finalize
from emo_kernels.cpu.bound import bind
from emo_kernels.cpu.launches import launch
from emo_kernels.spec import BoundCall, Conditions, conv_output_size

_MOST_TAPS = 64  # kMostTaps of csrc/emo_kernels.h
_MOST_INPUTS = 16  # beyond, a GEMM over packed pixels is the better kernel


def conv_norm_act_unsupported(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the kernel cannot take these arguments, or ``None`` if it can."""
    if weight.shape[-1] > _MOST_TAPS:
        return f"the cpu kernel takes kernels up to {_MOST_TAPS} taps a side"
    if weight.shape[1] > _MOST_INPUTS:
        return f"the cpu kernel takes up to {_MOST_INPUTS} input channels, got {weight.shape[1]}"
    return layout.wrong_dtype(x)


conv_norm_act_training_unsupported = conv_norm_act_unsupported


def _is_nhwc(x: Tensor) -> bool:
    """Whether the map is read as (N, H, W, C); of one that is both layouts, either is right."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _is_dense(x: Tensor) -> bool:
    """Whether the map, or the weight, is in one of the two layouts that are read."""
    return x.is_contiguous() or _is_nhwc(x)


def _dense(x: Tensor) -> Tensor:
    """x in one of the two layouts that are read."""
    return x if _is_nhwc(x) else x.contiguous()


def _sizes(x: Tensor, weight: Tensor, act: str, **options: Any) -> tuple[int, ...]:
    step = (options["stride"], options["padding"], options["dilation"])
    tail = (*step, _is_nhwc(x), layout.ACTIVATIONS[act])
    return (*x.shape, weight.shape[0], weight.shape[-1], *tail)


def _prepare(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    pivot: Tensor | None = None,
    sums: Tensor | None = None,
    *,
    eps: float = 1.0,
    **options: Any,
) -> _C.Prepared:
    weight = tensors[0]
    assert weight is not None
    pointers = layout.addresses(*tensors), layout.addresses(pivot, sums)
    dtypes = layout.DTYPES[x.dtype], layout.DTYPES[weight.dtype]
    sizes = (*_sizes(x, weight, **options), _is_nhwc(weight))
    return _C.prepare_conv_norm_act(*dtypes, *pointers, sizes, eps)


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
    """act(BN(W * x + b)), as ``emo_kernels.ops.conv_norm_act`` defines it.

    The weights may be wider than a map of 16 bits.
    """
    out = layout.new_map(x, *_output_shape(x, weight, **options))
    if out.numel() == 0:
        return out
    x, given = _dense(x), (weight, bias, norm_weight, norm_bias, norm_mean, norm_var)
    if all(t is None or t.dtype == x.dtype for t in given):
        tensors = [_dense(weight), *(None if t is None else t.contiguous() for t in given[1:])]
    else:
        tensors = [layout.dense(t, x.dtype) for t in given]
    _prepare(x, tensors, **options)(x.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def conv_norm_act_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, pivot: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """y = W * x + b and, from the same pass, its (2, O) float64 sums around the pivot."""
    y = layout.new_map(x, *_output_shape(x, weight, **options))
    sums = layout.doubles(2, weight.shape[0])
    if y.numel() == 0:
        return y, sums.zero_()
    x = _dense(x)
    filters, vector, pivot = (layout.dense(t, x.dtype) for t in (weight, bias, pivot))
    kernel = _prepare(x, (filters, vector, *4 * (None,)), pivot, sums, act="none", **options)
    kernel(x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y, sums


def conv_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    y: Tensor | None = None,
    norm: Tensor | None = None,
    coefficients: Tensor | None = None,
    *,
    needed: Sequence[bool],
    act: str = "none",
    eps: float = 1e-6,
    **options: Any,
) -> list[Tensor]:
    """Gradients of the seven tensors of the operator, those that are needed.

    With ``coefficients`` those of x and weight, as the reference defines them; else y is computed
    again.
    """
    sums = None
    if y is None or norm is None or coefficients is None:
        y = conv_norm_act(x, weight, bias, act="none", **options)
        norm = _norm(y, norm_weight, norm_bias, norm_mean, norm_var, eps)
        sums = batch_norm_activate_sums(grad, y, norm, act=act)
        coefficients = batch_norm_backward_finalize(sums, norm, 1.0, None, False)
    n, c, h, w = x.shape
    dx = layout.new_map(x, n, c, h, w) if needed[0] else None
    dweight = None
    if needed[1]:
        dweight = layout.empty(tuple(weight.shape), layout.computed_in(x.dtype))
    if grad.numel() == 0:
        for empty in (dx, dweight):
            if empty is not None:
                empty.zero_()
    elif needed[0] or needed[1]:
        x = _dense(x)
        maps = layout.pixels(grad), layout.pixels(y), x
        vectors = [layout.dense(t, x.dtype) for t in (weight, norm, coefficients)]
        sizes = _sizes(x, weight, act, **options)
        kernel = _C.conv_norm_act_backward(layout.DTYPES[x.dtype], sizes)
        launch(kernel, *maps, *vectors, dx, dweight)
    grads = [dx, layout.gradient_like(dweight, weight), *5 * [None]]
    if sums is not None:
        rows = (norm[0] * sums[0], sums[1], sums[0])
        grads[2:5] = map(layout.gradient_like, rows, (bias, norm_weight, norm_bias))
        still = (norm_mean, norm_var)
        grads[5:] = [None if t is None else torch.zeros_like(t) for t in still]
    return layout.chosen(grads, needed)


def _norm(y: Tensor, *norm_and_eps: Any) -> Tensor:
    """(4, O): scale, bias, mean, 1 / standard deviation; of no norm where there is none."""
    weight, bias, mean, var, eps = norm_and_eps
    dtype = layout.computed_in(y.dtype)
    one, zero = torch.ones(y.shape[1], dtype=dtype), torch.zeros(y.shape[1], dtype=dtype)
    if mean is None:
        return torch.stack([one, zero, zero, one])
    invstd = torch.rsqrt(var.to(dtype) + eps)
    scale = invstd if weight is None else invstd * weight.to(dtype)
    return torch.stack([scale, zero if bias is None else bias.to(dtype), mean.to(dtype), invstd])


def conv_norm_act_bind(
    x: Tensor,
    weight: Tensor,
    *others: Tensor | None,
    conditions: Conditions,
    **options: Any,
) -> BoundCall | None:
    """:func:`conv_norm_act` with all settled but the map's contents."""
    if not _is_dense(x):
        return None
    kernel = _prepare(x, (weight, *others), **options)
    shape = _output_shape(x, weight, **options)
    return bind(kernel, x, x.stride(), shape, conditions, is_dense=_is_dense)
