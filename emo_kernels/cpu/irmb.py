"""Launcher of the whole-block CPU kernel: allocate, call, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.bound import bind
from emo_kernels.spec import BoundCall, Conditions, IRMBSpec, IRMBWeights, conv_output_size

_NORMS = {"none": 0, "batch": 1, "layer": 2}
_MAX_TAPS = 64  # kMaxTaps of csrc/cpu/irmb_plan.h


def irmb_unsupported(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> str | None:
    """Why the kernel cannot run this block, or ``None`` if it can."""
    if reason := layout.wrong_dtype(x):
        return reason
    dtypes = {tensor.dtype for _, tensor in weights.present()}
    if dtypes != {x.dtype} and (x.dtype, dtypes) != (torch.bfloat16, {torch.float32}):
        names = ", ".join(sorted(map(str, dtypes)))
        return (
            f"the cpu kernel takes weights of the map's dtype, {x.dtype}, or all in float32 with "
            f"a map in bfloat16, got {names}"
        )
    if spec.head_dim > 0 and spec.op_order != "attn_conv":
        return f"the cpu kernel attends before the convolution only, got {spec.op_order!r}"
    if spec.v_groups != 1:
        return f"the cpu kernel has no grouped expansion, got v_groups = {spec.v_groups}"
    if weights.dw_weight is None:
        return "the cpu kernel needs the depthwise convolution (dw_weight is None)"
    if weights.dw_weight.shape[-1] > _MAX_TAPS:
        return f"the cpu kernel takes depthwise kernels up to {_MAX_TAPS} taps a side"
    if spec.skip and spec.stride != 1:
        return f"the cpu kernel takes skips at stride 1 only, got {spec.stride}"
    return None


def irmb(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> Tensor:
    """One block in inference, as :func:`emo_kernels.reference.irmb` computes it.

    Args:
        x: (N, C, H, W), fp32, bf16 or fp64; used in place when channels_last, else copied into it.
        weights: the block's tensors, of x's dtype, or fp32 ones with a bf16 map: the kernel rounds
            what it multiplies, as autocast does.
        spec: the block's switches; those :func:`irmb_unsupported` accepts.

    Returns:
        (N, O, H', W'), channels_last.

    Raises:
        ValueError: the kernel refuses a size or a pointer.
    """
    dense = IRMBWeights._make(None if t is None else t.contiguous() for t in weights)
    if x.stride() != layout.strides(*x.shape[1:]):  # whatever torch says of sides of size one
        x = layout.new_map(x, *x.shape).copy_(x)
    out = layout.new_map(x, *_output_shape(x, weights, spec))
    kernel = _C.prepare_irmb(*_arguments(x, dense, spec))
    kernel(x.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def irmb_bind(
    x: Tensor, weights: IRMBWeights, spec: IRMBSpec, conditions: Conditions
) -> BoundCall | None:
    """:func:`irmb` with all settled but the map's contents, for eager inference to repeat.

    It reads the weights at every call, where they lie now.
    """
    return bind(
        _C.prepare_irmb(*_arguments(x, weights, spec)),
        x,
        layout.strides(*x.shape[1:]),
        _output_shape(x, weights, spec),
        conditions,
        memory_format=torch.channels_last,
    )


def _output_shape(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> tuple[int, int, int, int]:
    assert weights.dw_weight is not None and weights.proj_weight is not None
    o = weights.proj_weight.shape[0]
    step = (weights.dw_weight.shape[3], spec.stride, spec.padding, spec.dilation)
    h, w = (conv_output_size(side, *step) for side in x.shape[2:])
    return x.shape[0], o, h, w


def _arguments(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> tuple[Any, ...]:
    """All that the kernel takes but the memory of the maps and the threads."""
    w = weights
    assert w.dw_weight is not None and w.proj_weight is not None
    r = 0 if w.se_reduce_weight is None else w.se_reduce_weight.shape[0]
    m, _, _, k = w.dw_weight.shape
    switches = (
        _NORMS[spec.norm],
        layout.ACTIVATIONS[spec.act],
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.skip,
        spec.head_dim,
        spec.window_size,
        layout.WINDOWS[spec.window_mode],
        spec.attn_pre,
    )
    return (
        layout.DTYPES[x.dtype],
        layout.DTYPES[w.dw_weight.dtype],
        layout.addresses(*w),
        tuple([0 if t is None else t.numel() for t in w]),
        (*x.shape, m, w.proj_weight.shape[0], k, r),
        switches,
        spec.norm_eps,
        spec.bn_eps,
    )
