"""Depthwise convolution: the operator to copy when adding one.

Computes: y[n, i, j, c] = sum_ab weight[c, a, b] x[n, i S + a D - P, j S + b D - P, c], zeros
    outside the map; ``_statistics`` adds the batch-norm sums of y as stored, in the same pass.
Tiling: a program has BLOCK_T tiles of R_H x R_W neighbouring pixels of y, BLOCK_C channels; a
    thread has two channels of one tile, and their sums, in registers. The patch of x under a tile
    is loaded once, each element meeting all pixels it reaches: K K multiplications and
    (R_H + K - 1)(R_W + K - 1) / (R_H R_W) loads a pixel at stride 1. All loops unroll.
Traffic: x once (halos from the caches), y once: 2 K K operations for 2 elements at stride 1, where
    instructions bind before memory does (K = 5: about 45 a pixel and channel on sm_90).
Numerics: fp32 products and sums, rounded once. Statistics: ``batch_norm.py``.
Limits: unrolled for K <= 7, stride and dilation <= 2; beyond, ``depthwise_conv2d_general.py``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.spec import conv_output_size
from emo_kernels.triton import launch, layout
from emo_kernels.triton.batch_norm import (
    about_pivot,
    batch_norm_sums,
    channel_block,
    load_coefficients,
    load_or,
    new_partial_sums,
)
from emo_kernels.triton.depthwise_conv2d_general import convolve_general
from emo_kernels.triton.reduce_tall import reduce_tall

# --------------------------------------------------------------------------- geometry of one tile
# Forward, a tile of y reads a patch of x; BACKWARD, a tile of dx, whose sides are multiples of the
# stride, reads a patch of dy. p counts rows (columns) of the patch, r those of the tile.


@triton.constexpr_function
def first_row(K, STRIDE, PADDING, DILATION, BACKWARD):
    """Row of the patch's map where a patch begins, for the tile at row 0."""
    return -(((K - 1) * DILATION - PADDING) // STRIDE) if BACKWARD else -PADDING


@triton.constexpr_function
def patch_side(R, K, STRIDE, PADDING, DILATION, BACKWARD):
    """Rows of the patch under a tile of R rows."""
    if BACKWARD:
        return (R - 1 + PADDING) // STRIDE - first_row(K, STRIDE, PADDING, DILATION, True) + 1
    return (R - 1) * STRIDE + (K - 1) * DILATION + 1


@triton.constexpr_function
def row_tap(p, r, K, STRIDE, PADDING, DILATION, BACKWARD):
    """The filter's row through which row p of the patch meets row r of the tile; -1: none."""
    if BACKWARD:
        p += first_row(K, STRIDE, PADDING, DILATION, True)
        a, rest = divmod(r + PADDING - p * STRIDE, DILATION)
    else:
        a, rest = divmod(p - r * STRIDE, DILATION)
    return a if rest == 0 and 0 <= a < K else -1


@triton.constexpr_function
def tap(p, q, r, R_W, K, STRIDE, PADDING, DILATION, BACKWARD):
    """The tap (of K K) through which (p, q) of the patch meets pixel r of the tile; -1: none."""
    a = row_tap(p, r // R_W, K, STRIDE, PADDING, DILATION, BACKWARD)
    b = row_tap(q, r % R_W, K, STRIDE, PADDING, DILATION, BACKWARD)
    return a * K + b if a >= 0 and b >= 0 else -1


@triton.constexpr_function
def first_use(a, K, STRIDE, PADDING, DILATION, BACKWARD):
    """The first row of the patch that meets row a of the filter."""
    if BACKWARD:
        first = first_row(K, STRIDE, PADDING, DILATION, True)
        return -((a * DILATION - PADDING) // STRIDE) - first
    return a * DILATION


# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def tile_indices(pid_t, tiles_h, tiles_w, BLOCK_T: tl.constexpr):
    """Image (int64), row and column (in tiles) of BLOCK_T consecutive tiles."""
    first = pid_t * BLOCK_T
    per_image = tiles_h * tiles_w
    in_image = (first % per_image).to(tl.int32) + tl.arange(0, BLOCK_T)
    n = first // per_image + in_image // per_image
    in_image %= per_image
    return n, in_image // tiles_w, in_image % tiles_w


@triton.jit
def load_patch(ptr, normed_ptr, offs, mask, c1, c2, c3, mean):
    """Elements of the map, or c1 grad + c2 (y - mean) + c3 where there is a norm; zeros outside."""
    x = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if normed_ptr is not None:
        y = tl.load(normed_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = c1[None, :] * x + (c2[None, :] * (y - mean[None, :]) + c3[None, :])
        x = tl.where(mask, x, 0.0)
    return x


@triton.jit
def correlate(
    ptr,  # (N H W, C), the map the patches are of
    normed_ptr,  # as ptr, or None: y of a batch norm behind it
    coefficients_ptr,  # (4, C), with normed_ptr
    weight_ptr,  # (K K, C)
    n,
    i0,  # (BLOCK_T,) first row and column of the patches
    j0,
    H,
    W,
    live,  # (BLOCK_T, BLOCK_C) tiles and channels that exist
    offs_c,
    mask_c,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    R_H: tl.constexpr,
    R_W: tl.constexpr,
):
    """The R_H R_W pixels of every tile, row by row: a tuple of (BLOCK_T, BLOCK_C) in fp32."""
    acc = ()
    for _ in tl.static_range(R_H * R_W):
        acc = acc + (tl.zeros(live.shape, tl.float32),)
    w = ()
    for _ in tl.static_range(K * K):
        w = w + (tl.zeros(offs_c.shape, tl.float32),)
    c1, c2, c3, mean = 0.0, 0.0, 0.0, 0.0
    if normed_ptr is not None:
        c1, c2, c3, mean = load_coefficients(coefficients_ptr, offs_c, mask_c, C)
    row_pitch = W.to(tl.int64) * C
    offs = (n * H + i0) * row_pitch + j0.to(tl.int64) * C
    offs = offs[:, None] + offs_c[None, :]
    for p in tl.static_range(patch_side(R_H, K, STRIDE, PADDING, DILATION, BACKWARD)):
        for t in tl.static_range(K * K):
            if first_use(t // K, K, STRIDE, PADDING, DILATION, BACKWARD) == p:
                w_t = tl.load(weight_ptr + t * C + offs_c, mask=mask_c, other=0.0)
                w = w[:t] + (w_t.to(tl.float32),) + w[t + 1 :]
        row_live = live & ((i0 + p).to(tl.uint32, bitcast=True) < H)[:, None]
        for q in tl.static_range(patch_side(R_W, K, STRIDE, PADDING, DILATION, BACKWARD)):
            mask = row_live & ((j0 + q).to(tl.uint32, bitcast=True) < W)[:, None]
            x = load_patch(ptr, normed_ptr, offs + q * C, mask, c1, c2, c3, mean)
            for r in tl.static_range(R_H * R_W):
                if tap(p, q, r, R_W, K, STRIDE, PADDING, DILATION, BACKWARD) >= 0:
                    w_t = w[tap(p, q, r, R_W, K, STRIDE, PADDING, DILATION, BACKWARD)]
                    acc = acc[:r] + (acc[r] + x * w_t[None, :],) + acc[r + 1 :]
        offs += row_pitch
    return acc


@triton.jit
def _depthwise_conv2d_fwd_kernel(
    x_ptr,  # (N H W, C)
    weight_ptr,  # (K K, C)
    y_ptr,  # (N HO WO, C)
    pivot_ptr,  # (C,) or None
    partials_ptr,  # (programs, 2, C) fp64, or None: no statistics
    N,
    H,
    W,
    HO,
    WO,
    tiles_h,
    tiles_w,
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
    pid_t = pid // blocks_c
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    n, tile_i, tile_j = tile_indices(pid_t, tiles_h, tiles_w, BLOCK_T)
    live = (n < N)[:, None] & mask_c[None, :]
    i, j = tile_i * R_H, tile_j * R_W
    acc = correlate(
        x_ptr,
        None,
        None,
        weight_ptr,
        n,
        i * STRIDE - PADDING,
        j * STRIDE - PADDING,
        H,
        W,
        live,
        offs_c,
        mask_c,
        C,
        K,
        STRIDE,
        PADDING,
        DILATION,
        False,
        R_H,
        R_W,
    )
    dtype = y_ptr.dtype.element_ty
    y_offs = ((n * HO + i) * WO + j)[:, None] * C + offs_c[None, :]
    shift = acc[0].to(dtype).to(tl.float32)  # sums are of deviations from a tile's first pixel
    s1 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for r in tl.static_range(R_H * R_W):
        mask = live & ((i + r // R_W < HO) & (j + r % R_W < WO))[:, None]
        y = acc[r].to(dtype)
        tl.store(y_ptr + y_offs + (WO.to(tl.int64) * (r // R_W) + r % R_W) * C, y, mask=mask)
        if partials_ptr is not None:
            deviation = tl.where(mask, y.to(tl.float32) - shift, 0.0)
            s1 += deviation
            s2 += deviation * deviation
    if partials_ptr is not None:
        count = tl.minimum(HO - i, R_H) * tl.minimum(WO - j, R_W)
        count = tl.where(n < N, count, 0).to(tl.float64)[:, None]
        delta = shift.to(tl.float64) - load_or(pivot_ptr, offs_c, mask_c, 0.0)[None, :]
        s1, s2 = about_pivot(s1.to(tl.float64), s2.to(tl.float64), count, delta)
        at = partials_ptr + pid_t * 2 * C + offs_c
        tl.store(at, tl.sum(s1, axis=0), mask=mask_c)
        tl.store(at + C, tl.sum(s2, axis=0), mask=mask_c)


# -------------------------------------------------------------------------------------- launchers


def unrolls(k: int, stride: int, dilation: int) -> bool:
    """Whether the unrolled kernels take this geometry."""
    return k <= 7 and stride <= 2 and dilation <= 2


def tap_rows(weight: Tensor) -> Tensor:
    """The weight (C, 1, K, K) as (K K, C): a tap of neighbouring channels in one load."""
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]).contiguous()


def stencil_tiles(arch: int, c: int, sides: list[tuple[int, int, float]]) -> dict[str, int]:
    """Launch parameters for the cheapest of some (R_H, R_W, cost), two channels a thread."""
    r_h, r_w, _ = min(sides, key=lambda side: side[2])
    if arch == launch.INTERPRETER:
        block_c = min(triton.next_power_of_2(c), 64)
        return {"R_H": r_h, "R_W": r_w, "BLOCK_T": 256, "BLOCK_C": block_c, "num_warps": 4}
    block_c = channel_block(c, 64)
    warps = 4
    block_t = max(64 * warps // block_c, 1)
    return {"R_H": r_h, "R_W": r_w, "BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": warps}


def _fwd_rule(
    arch: int, *, c: int, k: int, s: int, d: int, h: int, w: int, p: int
) -> dict[str, int]:
    """The tile with the fewest instructions a pixel, edges included, within about 128 registers."""
    if arch == launch.INTERPRETER:
        return stencil_tiles(arch, c, [(1, 2, 0.0)])
    pixels = {1: 28, 2: 16}[s] if k <= 3 else {1: 14, 2: 8}[s] if k <= 5 else 8 // s
    sides = []
    for r_h, r_w in ((4, 7), (2, 7), (1, 7), (4, 4), (2, 4), (1, 4), (2, 2), (1, 2), (1, 1)):
        patch = ((r_h - 1) * s + (k - 1) * d + 1) * ((r_w - 1) * s + (k - 1) * d + 1)
        wasted = -(-h // r_h) * r_h * -(-w // r_w) * r_w / (h * w)
        if r_h * r_w <= pixels:
            sides.append((r_h, r_w, wasted * (k * k + 2.6 * patch / (r_h * r_w) + 4)))
    return stencil_tiles(arch, c, sides)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, *, stride: int, padding: int, dilation: int
) -> Tensor:
    """One K x K filter per channel, zeros outside the map.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, K, K).
        stride, padding, dilation: in pixels, the same for rows and columns.

    Returns:
        (N, C, H', W') with H' = (H + 2 padding - dilation (K - 1) - 1) // stride + 1.
    """
    y, _ = _forward(x, weight, None, stride, padding, dilation, statistics=False)
    return y


def depthwise_conv2d_statistics(
    x: Tensor, weight: Tensor, pivot: Tensor | None, *, stride: int, padding: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """The convolution y and its batch-norm sums, ``batch_norm_sums(y, pivot)``, in one pass."""
    y, sums = _forward(x, weight, pivot, stride, padding, dilation, statistics=True)
    assert sums is not None
    return y, sums


def _forward(
    x: Tensor,
    weight: Tensor,
    pivot: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    *,
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    n, c, h, w = x.shape
    k = weight.shape[-1]
    ho, wo = (conv_output_size(side, k, stride, padding, dilation) for side in (h, w))
    if n == 0 or not unrolls(k, stride, dilation):
        y = convolve_general(x, tap_rows(weight), k, ho, wo, stride, padding, dilation)
        return y, batch_norm_sums(y, pivot) if statistics else None
    y = layout.new_map(x, n, c, ho, wo)
    tiles = launch.tiles(
        "depthwise_conv2d_fwd", _fwd_rule, c=c, k=k, s=stride, d=dilation, h=ho, w=wo, p=n * ho * wo
    )
    tiles_h, tiles_w = triton.cdiv(ho, tiles["R_H"]), triton.cdiv(wo, tiles["R_W"])
    programs = triton.cdiv(n * tiles_h * tiles_w, tiles["BLOCK_T"])
    partials = new_partial_sums(x, programs) if statistics else None
    programs = programs if partials is None else partials.shape[0]
    with layout.on_device(x):
        _depthwise_conv2d_fwd_kernel[(programs * triton.cdiv(c, tiles["BLOCK_C"]),)](
            x_ptr=layout.pixels(x),
            weight_ptr=tap_rows(weight),
            y_ptr=y,
            pivot_ptr=None if pivot is None else pivot.contiguous(),
            partials_ptr=partials,
            N=n,
            H=h,
            W=w,
            HO=ho,
            WO=wo,
            tiles_h=tiles_h,
            tiles_w=tiles_w,
            C=c,
            K=k,
            STRIDE=stride,
            PADDING=padding,
            DILATION=dilation,
            **tiles,
        )
    return y, None if partials is None else reduce_tall(partials, torch.float64)


def depthwise_conv2d_unsupported(
    x: Tensor, weight: Tensor, *, stride: int, padding: int, dilation: int
) -> str | None:
    """Why these kernels cannot run the call, or ``None`` if they can."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernels take float32, float16 and bfloat16, got {x.dtype}"
    if x.shape[2] * x.shape[3] >= 2**31:
        return f"the Triton kernels take maps of fewer than 2**31 pixels, got {tuple(x.shape)}"
    return None
