"""The whole block in inference: launcher of its kernels. For CPU tensors, of their walk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cuda import layout
from emo_kernels.spec import IRMBSpec, IRMBWeights, conv_output_size

_NORMS = {"none": 0, "batch": 1, "layer": 2}
_WINDOWS = {"grid": 0, "block": 1}
_ATTEND = {None: 0, "apart": 1, "inside": 2}
_MOST = 2**24  # sizes, as csrc/cuda/irmb_dispatch.h holds them
# Bytes of shared memory that a block may have, by compute capability; elsewhere the least.
_SHARED = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
_LEAST_SHARED = 101376


def shared_limit(x: Tensor) -> int:
    """Shared memory that a block may have on the GPU of ``x``; on the host an H200's."""
    if not x.is_cuda:
        return _SHARED[9, 0]
    return _SHARED.get(torch.cuda.get_device_capability(x.device), _LEAST_SHARED)


def irmb_unsupported(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> str | None:
    """Why the kernels cannot run this block, or ``None`` if they can."""
    w = weights
    if x.dtype not in layout.MAP_DTYPES:
        return f"the cuda kernels take float32, float16 and bfloat16, got {x.dtype}"
    for name, tensor in w.present():
        if tensor.dtype not in layout.MAP_DTYPES:
            return f"the cuda kernels take weights up to float32, got {name} in {tensor.dtype}"
    if w.dw_weight is None:
        return "the cuda kernels need the depthwise convolution (dw_weight is None)"
    if spec.v_groups != 1:
        return f"the cuda kernels have no grouped expansion, got v_groups = {spec.v_groups}"
    if spec.skip and spec.stride != 1:
        return f"the cuda kernels take skips at stride 1 only, got {spec.stride}"
    if spec.head_dim and not spec.attn_pre and w.v_weight is not None:
        return "the cuda kernels attend before the expansion only (attn_pre is False)"
    if spec.head_dim and spec.op_order != "attn_conv":
        return f"the cuda kernels attend before the convolution only, got {spec.op_order!r}"
    if spec.head_dim and spec.window_mode not in _WINDOWS:
        return f"the cuda kernels take windows 'grid' and 'block', got {spec.window_mode!r}"
    return _too_large(x, w, spec)


def _too_large(x: Tensor, w: IRMBWeights, spec: IRMBSpec) -> str | None:
    m, o = _expanded_channels(w), _output_channels(w)
    largest = max(*x.shape[1:], m, o, spec.padding, spec.dilation, spec.stride)
    if largest >= _MOST or x.shape[2] * x.shape[3] >= 2**30:
        return f"the cuda kernels take sizes below 2**24 and maps below 2**30 pixels, got {largest}"
    if x.numel() == 0:
        return None
    limit, found = shared_limit(x), irmb_report(x, w, spec)
    if found["kernels"]:
        return None
    if spec.head_dim and not found["attention"]:
        tokens = max(spec.window_size, 0) ** 2 or x.shape[2] * x.shape[3]
        return (
            f"windows of {tokens} tokens of {x.shape[1]} channels do not fit: at most 128 tokens, "
            f"in {limit} bytes of shared memory"
        )
    if w.se_reduce_weight is not None and not found["excite"]:
        return f"the squeeze-excite of {m} channels does not fit into {limit} bytes"
    return (
        f"no tile of {x.shape[1]} channels to {m} to {o} fits into the {limit} bytes of shared "
        "memory that a block has here"
    )


def irmb_report(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> dict[str, Any]:
    """How the kernels would run the block: their names, none where they cannot, and why these.

    ``block``, ``attention``, ``excite``, ``image``: bytes of shared memory of a block of threads, 0
    where it does not fit; ``inside``: whether the attention runs in the kernel ``image`` of the
    whole block, with the times counted for that, ``time_inside``, and for two, ``time_apart``.
    """
    sizes = _sizes(x, weights, spec, shared_limit(x))
    return _C.cuda_irmb_report(layout.DTYPES[x.dtype], sizes)


def _expanded_channels(w: IRMBWeights) -> int:
    assert w.dw_weight is not None
    return w.dw_weight.shape[0]


def _output_channels(w: IRMBWeights) -> int:
    assert w.proj_weight is not None
    return w.proj_weight.shape[0]


def irmb(x: Tensor, weights: IRMBWeights, spec: IRMBSpec, *, attend: str | None = None) -> Tensor:
    """One block in inference, as :func:`emo_kernels.reference.irmb` computes it.

    Args:
        x: (N, C, H, W), fp32, bf16 or fp16; used in place when its pixels are dense, else copied.
        weights: the block's tensors in x's dtype, which are copied as they are, or another up to
            fp32, which are rounded on the way. They are read at every call.
        spec: the block's switches; those :func:`irmb_unsupported` accepts.
        attend: ``"inside"`` the block's own kernel or ``"apart"`` in another, to compare them;
            ``None`` where it is counted to be faster.

    Returns:
        (N, O, H', W'), channels_last.
    """
    assert weights.dw_weight is not None
    n, _, h, wide = x.shape
    step = (weights.dw_weight.shape[-1], spec.stride, spec.padding, spec.dilation)
    sides = (conv_output_size(side, *step) for side in (h, wide))
    out = layout.new_map(x, n, _output_channels(weights), *sides)
    if out.numel() == 0:
        return out
    w = IRMBWeights._make(None if t is None else t.contiguous() for t in weights)
    sizes = _sizes(x, w, spec, shared_limit(x), attend)
    pixels = layout.pixels(x)
    pointers = (layout.address(pixels), layout.address(out), *map(layout.vector, w))
    layout.run(_C.cuda_irmb_scratch, _C.cuda_irmb, _C.cuda_irmb_walk, pixels, pointers, sizes)
    return out


def _sizes(
    x: Tensor, w: IRMBWeights, spec: IRMBSpec, limit: int, attend: str | None = None
) -> tuple[float, ...]:
    """What the kernels are told besides pointers, in the order of python/cuda_bindings.cpp."""
    assert w.dw_weight is not None
    excited = 0 if w.se_reduce_weight is None else w.se_reduce_weight.shape[0]
    channels = (_expanded_channels(w), _output_channels(w))
    step = (spec.stride, spec.padding, spec.dilation)
    windows = (spec.head_dim, spec.window_size, _WINDOWS.get(spec.window_mode, 0))
    switches = (
        _NORMS[spec.norm],
        layout.ACTIVATIONS[spec.act],
        int(w.v_weight is not None),
        int(spec.skip),
        _ATTEND[attend],
        limit,
    )
    kernel = w.dw_weight.shape[-1]
    eps = (spec.norm_eps, spec.bn_eps)
    return (*x.shape, *channels, kernel, excited, *step, *windows, *switches, *eps)
