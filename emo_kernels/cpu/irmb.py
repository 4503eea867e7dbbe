"""Launcher of the whole-block CPU kernel: allocate, call, return."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.spec import IRMBSpec, IRMBWeights, conv_output_size

_DTYPES = {torch.float32: 0, torch.float64: 1}
_NORMS = {"none": 0, "batch": 1, "layer": 2}
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
_WINDOWS = {"grid": 0, "block": 1, "both": 2}
_MAX_TAPS = 64  # kMaxTaps of csrc/cpu/irmb_plan.h


def irmb_unsupported(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> str | None:
    """Why the kernel cannot run this block, or ``None`` if it can."""
    if x.dtype not in _DTYPES:
        return f"the cpu kernel computes in float32 and float64, got {x.dtype}"
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
        x: (N, C, H, W), fp32 or fp64; used in place when channels_last, else copied into it.
        weights: the block's tensors, of x's dtype.
        spec: the block's switches; those :func:`irmb_unsupported` accepts.

    Returns:
        (N, O, H', W'), channels_last.

    Raises:
        ValueError: the kernel refuses a size or a pointer.
    """
    dense = IRMBWeights._make(None if t is None else t.contiguous() for t in weights)
    return irmb_bind(x, dense, spec)(x)


def irmb_bind(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> Callable[[Tensor], Tensor]:
    """:func:`irmb` with all settled but the map's contents.

    The result takes maps of x's shape and dtype, as long as the weights, which are dense, stay
    where they are; it reads their values at every call.
    """
    w = weights
    assert w.dw_weight is not None and w.proj_weight is not None
    n, c, h, width = x.shape
    m, k = w.dw_weight.shape[0], w.dw_weight.shape[3]
    o = w.proj_weight.shape[0]
    r = 0 if w.se_reduce_weight is None else w.se_reduce_weight.shape[0]
    step = (k, spec.stride, spec.padding, spec.dilation)
    out_h, out_w = conv_output_size(h, *step), conv_output_size(width, *step)
    shape, strides = (n, o, out_h, out_w), (o * out_h * out_w, 1, o * out_w, o)
    dtype, map_strides = x.dtype, (c * h * width, 1, c * width, c)
    pointers = tuple([0 if t is None else t.data_ptr() for t in w])
    counts = tuple([0 if t is None else t.numel() for t in w])
    sizes = (n, c, h, width, m, o, k, r)
    switches = (
        _NORMS[spec.norm],
        _ACTIVATIONS[spec.act],
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.skip,
        spec.head_dim,
        spec.window_size,
        _WINDOWS[spec.window_mode],
        spec.attn_pre,
    )

    def run(x: Tensor) -> Tensor:
        if x.stride() != map_strides:  # whatever torch says of dimensions of size one
            x = torch.empty_strided(x.shape, map_strides, dtype=dtype).copy_(x)
        out = torch.empty_strided(shape, strides, dtype=dtype)
        _C.irmb(
            _DTYPES[dtype],
            x.data_ptr(),
            out.data_ptr(),
            pointers,
            counts,
            sizes,
            switches,
            spec.norm_eps,
            spec.bn_eps,
            torch.get_num_threads(),
        )
        return out

    return run
