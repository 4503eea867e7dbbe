"""The whole block in inference: launcher of its kernels. For CPU tensors, of their walk."""

from __future__ import annotations

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cuda import layout
from emo_kernels.spec import IRMBSpec, IRMBWeights, conv_output_size

_NORMS = {"none": 0, "batch": 1, "layer": 2}
_NO_NORM = dict.fromkeys(("norm_weight", "norm_bias", "norm_mean", "norm_var"))
# In the order of csrc/emo_kernels_cuda.h.
_VECTORS = tuple(n for n in IRMBWeights._fields if not n.startswith(("qk_", "se_")))
_WINDOWS = {"grid": 0, "block": 1}
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
    if w.v_weight is None:
        return "the cuda kernels need the expanding convolution (v_weight is None)"
    if w.dw_weight is None:
        return "the cuda kernels need the depthwise convolution (dw_weight is None)"
    if w.se_reduce_weight is not None:
        return "the cuda kernels have no squeeze-excite, which needs the whole map first"
    if spec.v_groups != 1:
        return f"the cuda kernels have no grouped expansion, got v_groups = {spec.v_groups}"
    if spec.skip and spec.stride != 1:
        return f"the cuda kernels take skips at stride 1 only, got {spec.stride}"
    if spec.head_dim and not spec.attn_pre:
        return "the cuda kernels attend before the expansion only (attn_pre is False)"
    if spec.head_dim and spec.op_order != "attn_conv":
        return f"the cuda kernels attend before the convolution only, got {spec.op_order!r}"
    if spec.head_dim and spec.window_mode not in _WINDOWS:
        return f"the cuda kernels take windows 'grid' and 'block', got {spec.window_mode!r}"
    return _too_large(x, w, spec)


def _too_large(x: Tensor, w: IRMBWeights, spec: IRMBSpec) -> str | None:
    assert w.v_weight is not None and w.proj_weight is not None
    largest = max(*x.shape[1:], *w.v_weight.shape[:2], spec.padding, spec.dilation, spec.stride)
    if largest >= _MOST or x.shape[2] * x.shape[3] >= 2**30:
        return f"the cuda kernels take sizes below 2**24 and maps below 2**30 pixels, got {largest}"
    if x.numel() == 0:
        return None
    limit = shared_limit(x)
    dtype = layout.DTYPES[x.dtype]
    attention = _attention_sizes(x, spec, limit)
    if spec.head_dim and not _C.cuda_irmb_attention_shared_bytes(dtype, attention):
        tokens = max(spec.window_size, 0) ** 2 or x.shape[2] * x.shape[3]
        return (
            f"windows of {tokens} tokens of {x.shape[1]} channels do not fit: at most 128 tokens, "
            f"in {limit} bytes of shared memory"
        )
    if _C.cuda_irmb_shared_bytes(dtype, _sizes(x, w, spec, limit)):
        return None
    return (
        f"no tile of {x.shape[1]} channels to {w.v_weight.shape[0]} to {w.proj_weight.shape[0]} "
        f"fits into the {limit} bytes of shared memory that a block has here"
    )


def irmb(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> Tensor:
    """One block in inference, as :func:`emo_kernels.reference.irmb` computes it.

    Args:
        x: (N, C, H, W), fp32, bf16 or fp16; used in place when its pixels are dense, else copied.
        weights: the block's tensors in x's dtype, which are copied as they are, or another up to
            fp32, which are rounded on the way. They are read at every call.
        spec: the block's switches; those :func:`irmb_unsupported` accepts.

    Returns:
        (N, O, H', W'), channels_last.
    """
    w = weights
    assert w.dw_weight is not None and w.proj_weight is not None
    n, _, h, wide = x.shape
    step = (w.dw_weight.shape[-1], spec.stride, spec.padding, spec.dilation)
    sides = (conv_output_size(side, *step) for side in (h, wide))
    out = layout.new_map(x, n, w.proj_weight.shape[0], *sides)
    if out.numel() == 0:
        return out
    w = IRMBWeights._make(None if t is None else t.contiguous() for t in weights)
    x = layout.pixels(x)
    if not spec.head_dim:
        _run(x, x if spec.skip else None, out, w, spec)
        return out
    attended = torch.empty_like(x)
    _attend(x, attended, w, spec)
    _run(
        attended, x if spec.skip else None, out, w._replace(**_NO_NORM), spec._replace(norm="none")
    )
    return out


def _attend(pixels: Tensor, out: Tensor, w: IRMBWeights, spec: IRMBSpec) -> None:
    """The block's attention over norm(x), both (N, H, W, C)."""
    vectors = (w.norm_weight, w.norm_bias, w.norm_mean, w.norm_var, w.qk_weight, w.qk_bias)
    pointers = (layout.address(pixels), layout.address(out), *map(layout.vector, vectors))
    layout.run(
        _C.cuda_irmb_attention_scratch,
        _C.cuda_irmb_attention,
        _C.cuda_irmb_attention_walk,
        pixels,
        pointers,
        _attention_sizes(pixels.permute(0, 3, 1, 2), spec, shared_limit(pixels)),
    )


def _attention_sizes(x: Tensor, spec: IRMBSpec, limit: int) -> tuple[float, ...]:
    windows = (spec.head_dim, spec.window_size)
    switches = (_NORMS[spec.norm], _WINDOWS.get(spec.window_mode, 0), limit)
    return (*x.shape, *windows, *switches, spec.norm_eps)


def _run(
    pixels: Tensor, residual: Tensor | None, out: Tensor, w: IRMBWeights, spec: IRMBSpec
) -> None:
    """The rest of the block, from (N, H, W, C) pixels."""
    vectors = [getattr(w, name) for name in _VECTORS]
    maps = (layout.address(pixels), layout.address(residual), layout.address(out))
    pointers = (*maps, *map(layout.vector, vectors))
    sizes = _sizes(pixels.permute(0, 3, 1, 2), w, spec, shared_limit(pixels))
    layout.run(_C.cuda_irmb_scratch, _C.cuda_irmb, _C.cuda_irmb_walk, pixels, pointers, sizes)


def _sizes(x: Tensor, w: IRMBWeights, spec: IRMBSpec, limit: int) -> tuple[float, ...]:
    assert w.v_weight is not None and w.dw_weight is not None and w.proj_weight is not None
    channels = (w.v_weight.shape[0], w.proj_weight.shape[0])
    step = (w.dw_weight.shape[-1], spec.stride, spec.padding, spec.dilation)
    switches = (_NORMS[spec.norm], layout.ACTIVATIONS[spec.act], int(spec.skip), limit)
    return (*x.shape, *channels, *step, *switches, spec.norm_eps, spec.bn_eps)
