"""Gradient of the depthwise convolution for its filters.

Computes: dweight[c, a, b] = sum_nij dy[n, i, j, c] x[n, i S + a D - P, j S + b D - P, c], with
    dy = c1 grad + c2 (y - mean) + c3 formed in the loads where there are coefficients.
Tiling: a program has BLOCK_C channels of BLOCK_T columns of tiles at a time and walks down their
    rows. A thread holds all K K sums of its two channels in registers, R_H R_W elements of dy, and
    meets each element of x under them once.
Traffic: reads grad, y and x once, but for halos from the caches; 2 K K operations a pixel and
    channel, in some 2 K K instructions.
Numerics: fp32. Programs' partial sums are added in a fixed order, by the shape alone; no atomics.
Limits: K <= 7, stride and dilation <= 2; beyond, ``depthwise_conv2d_general.py``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.batch_norm import PROGRAMS, load_coefficients
from emo_kernels.triton.depthwise_conv2d import (
    load_patch,
    patch_side,
    stencil_tiles,
    tap,
    tile_indices,
)
from emo_kernels.triton.reduce_tall import reduce_tall, whole_groups

# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def _add_at(sums, t: tl.constexpr, value):
    """A tuple of sums with ``value`` added to sum t."""
    return sums[:t] + (sums[t] + value,) + sums[t + 1 :]


@triton.jit
def _weight_tile(
    acc,  # K K sums (BLOCK_T, BLOCK_C)
    grad_ptr,
    y_ptr,
    x_ptr,
    y_offs,  # (BLOCK_T, BLOCK_C) of the tiles' first elements
    x_offs,
    i,  # row of the tiles
    j,  # (BLOCK_T,) columns of the tiles
    H,
    W,
    HO,
    WO,
    live,
    c1,
    c2,
    c3,
    mean,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    R_H: tl.constexpr,
    R_W: tl.constexpr,
):
    """Add to the filter's K K sums what R_H x R_W pixels of dy and the patch of x give."""
    dy = ()
    for r in tl.static_range(R_H * R_W):
        mask = live & ((i + r // R_W < HO) & (j + r % R_W < WO))[:, None]
        at = y_offs + (WO.to(tl.int64) * (r // R_W) + r % R_W) * C
        dy = dy + (load_patch(grad_ptr, y_ptr, at, mask, c1, c2, c3, mean),)
    row, col = i * STRIDE - PADDING, j * STRIDE - PADDING
    for p in tl.static_range(patch_side(R_H, K, STRIDE, PADDING, DILATION, False)):
        row_live = live & ((row + p >= 0) & (row + p < H))
        for q in tl.static_range(patch_side(R_W, K, STRIDE, PADDING, DILATION, False)):
            mask = row_live & ((col + q).to(tl.uint32, bitcast=True) < W)[:, None]
            x = tl.load(x_ptr + x_offs + q * C, mask=mask, other=0.0).to(tl.float32)
            for r in tl.static_range(R_H * R_W):
                if tap(p, q, r, R_W, K, STRIDE, PADDING, DILATION, False) >= 0:
                    acc = _add_at(
                        acc, tap(p, q, r, R_W, K, STRIDE, PADDING, DILATION, False), x * dy[r]
                    )
        x_offs += W.to(tl.int64) * C
    return acc


@triton.jit
def _depthwise_conv2d_bwd_weight_kernel(
    grad_ptr,  # (N HO WO, C)
    x_ptr,  # (N H W, C)
    y_ptr,  # (N HO WO, C) or None
    coefficients_ptr,  # (4, C) or None
    partials_ptr,  # (programs, C, K K)
    N,
    H,
    W,
    HO,
    WO,
    tiles_w,  # columns of tiles in an image
    strips,  # blocks of BLOCK_T columns of one program
    row_tiles,  # rows of tiles of one program
    row_programs,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    R_H: tl.constexpr,
    R_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    pid_p = pid // blocks_c
    first_i = (pid_p % row_programs * row_tiles).to(tl.int32) * R_H
    last_i = tl.minimum(first_i + row_tiles * R_H, HO)
    c1, c2, c3, mean = 0.0, 0.0, 0.0, 0.0
    if y_ptr is not None:
        c1, c2, c3, mean = load_coefficients(coefficients_ptr, offs_c, mask_c, C)
    acc = ()
    for _ in tl.static_range(K * K):
        acc = acc + (tl.zeros((BLOCK_T, BLOCK_C), tl.float32),)
    for s in range(0, strips):
        n, tile_i, tile_j = tile_indices(pid_p // row_programs * strips + s, 1, tiles_w, BLOCK_T)
        j = tile_j * R_W
        live = (n < N)[:, None] & mask_c[None, :]
        y_offs = ((n * HO + first_i) * WO + j)[:, None] * C + offs_c[None, :]
        x_row, x_col = first_i * STRIDE - PADDING, j * STRIDE - PADDING
        x_offs = ((n * H + x_row) * W + x_col)[:, None] * C + offs_c[None, :]
        for i in range(first_i, last_i, R_H):
            acc = _weight_tile(
                acc,
                grad_ptr,
                y_ptr,
                x_ptr,
                y_offs,
                x_offs,
                i,
                j,
                H,
                W,
                HO,
                WO,
                live,
                c1,
                c2,
                c3,
                mean,
                C,
                K,
                STRIDE,
                PADDING,
                DILATION,
                R_H,
                R_W,
            )
            y_offs += WO.to(tl.int64) * (R_H * C)
            x_offs += W.to(tl.int64) * (R_H * STRIDE * C)
    at = partials_ptr + (pid_p * C + offs_c) * (K * K)
    for t in tl.static_range(K * K):
        tl.store(at + t, tl.sum(acc[t], axis=0), mask=mask_c)


# -------------------------------------------------------------------------------------- launchers


def _bwd_weight_rule(
    arch: int, *, c: int, k: int, s: int, d: int, h: int, w: int, p: int
) -> dict[str, int]:
    """All K K sums and the tile's dy in registers; the fewest instructions a pixel."""
    if arch == launch.INTERPRETER:
        return stencil_tiles(arch, c, [(2, 1, 0.0)]) | {"BLOCK_T": 64}
    pixels = (14 if k <= 3 else 8 if k <= 5 else 4) // s
    sides = []
    for r_h, r_w in ((4, 7), (2, 7), (1, 7), (4, 4), (2, 4), (1, 4), (2, 2), (1, 2), (1, 1)):
        if r_h * r_w <= pixels:
            patch = ((r_h - 1) * s + (k - 1) * d + 1) * ((r_w - 1) * s + (k - 1) * d + 1)
            wasted = -(-h // r_h) * r_h * -(-w // r_w) * r_w / (h * w)
            sides.append((r_h, r_w, wasted * (k * k + 2.6 * patch / (r_h * r_w) + 6)))
    return stencil_tiles(arch, c, sides)


def weight_partials(
    grad: Tensor,
    x: Tensor,
    k: int,
    y: Tensor | None,
    coefficients: Tensor | None,
    geometry: dict[str, int],
) -> Tensor:
    """Partial sums (programs, C, K K) of the filter's gradient."""
    n, c, h, w = x.shape
    ho, wo = grad.shape[2:]
    tiles = launch.tiles(
        "depthwise_conv2d_bwd_weight",
        _bwd_weight_rule,
        c=c,
        k=k,
        s=geometry["STRIDE"],
        d=geometry["DILATION"],
        h=ho,
        w=wo,
        p=n * ho * wo,
    )
    blocks_c = triton.cdiv(c, tiles["BLOCK_C"])
    tiles_h, tiles_w = triton.cdiv(ho, tiles["R_H"]), triton.cdiv(wo, tiles["R_W"])
    blocks_t = triton.cdiv(n * tiles_w, tiles["BLOCK_T"])
    wanted = max(PROGRAMS // blocks_c, 2)  # programs of a block of channels
    strips = triton.cdiv(blocks_t, wanted)
    row_tiles = triton.cdiv(tiles_h, max(wanted // blocks_t, 1))
    row_programs = triton.cdiv(tiles_h, row_tiles)
    programs = whole_groups(triton.cdiv(blocks_t, strips) * row_programs)
    partials = torch.empty((programs, c, k * k), dtype=torch.float32, device=x.device)
    with layout.on_device(x):
        _depthwise_conv2d_bwd_weight_kernel[(programs * blocks_c,)](
            grad_ptr=grad,
            x_ptr=layout.pixels(x),
            y_ptr=y,
            coefficients_ptr=coefficients,
            partials_ptr=partials,
            N=n,
            H=h,
            W=w,
            HO=ho,
            WO=wo,
            tiles_w=tiles_w,
            strips=strips,
            row_tiles=row_tiles,
            row_programs=row_programs,
            C=c,
            K=k,
            **geometry,
            **tiles,
        )
    return partials


def add_up(partials: Tensor, weight: Tensor) -> Tensor:
    """The sum of the partials, with the shape, dtype and strides of the weight."""
    c, k = weight.shape[0], weight.shape[-1]
    grad = torch.empty_like(weight)
    if grad.is_contiguous() or grad.is_contiguous(memory_format=torch.channels_last):
        reduce_tall(partials, out=grad.as_strided((c, k * k), (k * k, 1)))
        return grad
    return grad.copy_(reduce_tall(partials).view(weight.shape))
