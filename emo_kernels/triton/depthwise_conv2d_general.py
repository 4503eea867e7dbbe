"""Depthwise convolution of any geometry, one pixel and one tap at a time.

Computes: out = in * weight (forward), or its transpose (backward for x), or the filter's gradient,
    for kernels, strides and dilations too large to unroll.
Tiling: BLOCK_P pixels x BLOCK_C channels of the output and a loop over taps. Filter's gradient: a
    program has one tap of BLOCK_C channels over a fixed range of pixels.
Traffic: every output pixel loads K K inputs, from the caches; the filter's gradient reads both maps
    K K times.
Numerics: fp32 products and sums, rounded once; the order of additions depends on the shape alone.
Limits: none of the geometry's; slower than the unrolled kernels where those apply.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.batch_norm import PROGRAMS, channel_block

# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def _pixel_indices(offs_p, H, W):
    """Image (int64), row and column of some pixels."""
    n = offs_p // (H.to(tl.int64) * W)
    in_image = (offs_p - n * H * W).to(tl.int32)
    return n, in_image // W, in_image % W


@triton.jit
def _depthwise_conv2d_general_kernel(
    in_ptr,  # (N H W, C)
    weight_ptr,  # (K K, C)
    add_ptr,  # as out, or None
    out_ptr,  # (N HO WO, C)
    P,  # N HO WO
    H,
    W,
    HO,
    WO,
    K,
    stride,
    padding,
    dilation,
    C: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_p = pid // blocks_c * BLOCK_P + tl.arange(0, BLOCK_P)
    n, i, j = _pixel_indices(offs_p, HO, WO)
    live = (offs_p < P)[:, None] & mask_c[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for a in range(0, K):
        for b in range(0, K):
            if BACKWARD:
                row, col = i + padding - a * dilation, j + padding - b * dilation
                inside = (row >= 0) & (col >= 0) & (row % stride == 0) & (col % stride == 0)
                row, col = row // stride, col // stride
                inside &= (row < H) & (col < W)
            else:
                row, col = i * stride + a * dilation - padding, j * stride + b * dilation - padding
                inside = (row >= 0) & (row < H) & (col >= 0) & (col < W)
            offs = ((n * H + row) * W + col)[:, None] * C + offs_c[None, :]
            x = tl.load(in_ptr + offs, mask=live & inside[:, None], other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + (a * K + b) * C + offs_c, mask=mask_c, other=0.0)
            acc += x * w.to(tl.float32)[None, :]
    offs = offs_p[:, None] * C + offs_c[None, :]
    if add_ptr is not None:
        acc += tl.load(add_ptr + offs, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _depthwise_conv2d_general_bwd_weight_kernel(
    grad_ptr,  # (N HO WO, C)
    x_ptr,  # (N H W, C)
    partials_ptr,  # (programs, C, K K)
    P,  # N HO WO
    rows,  # pixels of one program, a multiple of BLOCK_P
    H,
    W,
    HO,
    WO,
    K,
    stride,
    padding,
    dilation,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    t = (pid // blocks_c % (K * K)).to(tl.int32)
    pid_p = pid // blocks_c // (K * K)
    start = pid_p * rows
    end = tl.minimum(start + rows, P)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    offs_p = start + tl.arange(0, BLOCK_P)
    for _ in range(0, rows, BLOCK_P):
        n, i, j = _pixel_indices(offs_p, HO, WO)
        row = i * stride + t // K * dilation - padding
        col = j * stride + t % K * dilation - padding
        inside = (offs_p < end) & (row >= 0) & (row < H) & (col >= 0) & (col < W)
        mask = inside[:, None] & mask_c[None, :]
        grad = tl.load(grad_ptr + offs_p[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        offs = ((n * H + row) * W + col)[:, None] * C + offs_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0)
        acc += grad.to(tl.float32) * x.to(tl.float32)
        offs_p += BLOCK_P
    at = partials_ptr + (pid_p * C + offs_c) * (K * K) + t
    tl.store(at, tl.sum(acc, axis=0), mask=mask_c)


# -------------------------------------------------------------------------------------- launchers


def _general_rule(arch: int, *, c: int, p: int) -> dict[str, int]:
    """Eight elements a thread."""
    if arch == launch.INTERPRETER:
        block_c = min(triton.next_power_of_2(c), 128)
        return {"BLOCK_P": min(512, 32768 // block_c), "BLOCK_C": block_c, "num_warps": 4}
    block_c = channel_block(c)
    return {"BLOCK_P": 1024 // block_c, "BLOCK_C": block_c, "num_warps": 4}


def convolve_general(
    x: Tensor,
    taps: Tensor,
    k: int,
    ho: int,
    wo: int,
    stride: int,
    padding: int,
    dilation: int,
    *,
    backward: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """The convolution of x with taps (K K, C), or its transpose; plus ``add`` where given."""
    n, c, h, w = x.shape
    out = layout.new_map(x, n, c, ho, wo)
    p = n * ho * wo
    if p == 0:
        return out
    tiles = launch.tiles("depthwise_conv2d_general", _general_rule, c=c, p=p)
    programs = triton.cdiv(p, tiles["BLOCK_P"]) * triton.cdiv(c, tiles["BLOCK_C"])
    with layout.on_device(x):
        _depthwise_conv2d_general_kernel[(programs,)](
            in_ptr=layout.pixels(x),
            weight_ptr=taps,
            add_ptr=None if add is None else layout.pixels(add),
            out_ptr=out,
            P=p,
            H=h,
            W=w,
            HO=ho,
            WO=wo,
            K=k,
            stride=stride,
            padding=padding,
            dilation=dilation,
            C=c,
            BACKWARD=backward,
            **tiles,
        )
    return out


def weight_partials_general(
    grad: Tensor, x: Tensor, k: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """Partial sums (programs, C, K K) in fp32 of the filter's gradient."""
    n, c, h, w = x.shape
    ho, wo = grad.shape[2:]
    p = n * ho * wo
    tiles = launch.tiles("depthwise_conv2d_general_bwd_weight", _general_rule, c=c, p=p)
    blocks_c, block_p = triton.cdiv(c, tiles["BLOCK_C"]), tiles["BLOCK_P"]
    programs = min(triton.cdiv(p, block_p), max(PROGRAMS // (blocks_c * k * k), 2))
    rows = triton.cdiv(triton.cdiv(p, programs), block_p) * block_p
    programs = triton.cdiv(p, rows)
    partials = torch.empty((programs, c, k * k), dtype=torch.float32, device=x.device)
    with layout.on_device(x):
        _depthwise_conv2d_general_bwd_weight_kernel[(programs * blocks_c * k * k,)](
            grad_ptr=layout.pixels(grad),
            x_ptr=layout.pixels(x),
            partials_ptr=partials,
            P=p,
            rows=rows,
            H=h,
            W=w,
            HO=ho,
            WO=wo,
            K=k,
            stride=stride,
            padding=padding,
            dilation=dilation,
            C=c,
            **tiles,
        )
    return partials
