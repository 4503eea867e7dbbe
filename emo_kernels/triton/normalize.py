"""Norms in front of a kernel: layer norm over the channels of a pixel, and affine.

Computes: layer: n = (x - mean) rstd weight + bias, mean and rstd = 1 / sqrt(var + eps) of each
    pixel over its C channels, biased variance; affine: n = x weight + bias. And their gradients.
Tiling: device functions on a tile (BLOCK_P, BLOCK_C) of pixels and channels; the kernels here take
    whole rows, BLOCK_C channels at a time.
Traffic: the statistics read x once and write 8 bytes a pixel; whoever walks over x in pieces (a
    GEMM over K) then normalises each piece with two loads a row.
Numerics: fp32. The variance is the mean of squared deviations, a second pass over the row, and the
    mean is corrected by theirs: digits survive a mean far from zero.
Limits: weight and bias may be absent (None), in any floating-point type.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout


@triton.jit
def load_channels(ptr, offs_c, mask_c, DEFAULT: tl.constexpr):
    """The parameter vector at ``ptr`` for channels ``offs_c`` in fp32; ``DEFAULT`` where absent."""
    if ptr is None:
        values = tl.full(offs_c.shape, DEFAULT, tl.float32)
    else:
        values = tl.load(ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return values


@triton.jit
def tile_statistics(x, mask_c, C: tl.constexpr, eps):
    """Mean and rstd (BLOCK_P,) of the rows of a tile (BLOCK_P, BLOCK_C >= C), fp32.

    Columns outside ``mask_c`` (BLOCK_C,) may hold anything finite.
    """
    x = tl.where(mask_c[None, :], x, 0.0)
    mean = tl.sum(x, axis=1) / C
    deviation = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
    correction = tl.sum(deviation, axis=1) / C
    variance = tl.sum(deviation * deviation, axis=1) / C - correction * correction
    return mean + correction, tl.rsqrt(tl.maximum(variance, 0.0, tl.PropagateNan.ALL) + eps)


@triton.jit
def row_statistics(x_ptr, rows, mask_p, C: tl.constexpr, eps, BLOCK_C: tl.constexpr):
    """Mean and rstd (BLOCK_P,) of the rows ``rows`` (int64) of x (P, C), read BLOCK_C at a time."""
    offs_c = tl.arange(0, BLOCK_C)
    base = x_ptr + rows[:, None] * C
    if BLOCK_C >= C:
        mask_c = offs_c < C
        keep = mask_p[:, None] & mask_c[None, :]
        x = tl.load(base + offs_c[None, :], mask=keep, other=0.0).to(tl.float32)
        mean, rstd = tile_statistics(x, mask_c, C, eps)
    else:
        total = tl.zeros(rows.shape, dtype=tl.float32)
        for c in range(0, C, BLOCK_C):
            keep = mask_p[:, None] & (c + offs_c < C)[None, :]
            x = tl.load(base + (c + offs_c)[None, :], mask=keep, other=0.0)
            total += tl.sum(x.to(tl.float32), axis=1)
        mean = total / C
        total = tl.zeros(rows.shape, dtype=tl.float32)
        squares = tl.zeros(rows.shape, dtype=tl.float32)
        for c in range(0, C, BLOCK_C):
            keep = mask_p[:, None] & (c + offs_c < C)[None, :]
            x = tl.load(base + (c + offs_c)[None, :], mask=keep, other=0.0).to(tl.float32)
            deviation = tl.where(keep, x - mean[:, None], 0.0)
            total += tl.sum(deviation, axis=1)
            squares += tl.sum(deviation * deviation, axis=1)
        correction = total / C
        variance = squares / C - correction * correction
        mean += correction
        rstd = tl.rsqrt(tl.maximum(variance, 0.0, tl.PropagateNan.ALL) + eps)
    return mean, rstd


@triton.jit
def standardize(x, mean, rstd):
    """xhat of a tile from the statistics of its rows."""
    return (x - mean[:, None]) * rstd[:, None]


@triton.jit
def normalize(x, mean, rstd, weight, bias, NORM: tl.constexpr):
    """NORM(x) of a tile in fp32: row statistics (BLOCK_P,), parameters (BLOCK_C,).

    Where NORM is ``none`` or ``affine``, ``mean`` and ``rstd`` are not looked at; ``none`` looks
    at nothing.
    """
    tl.static_assert(NORM == "none" or NORM == "affine" or NORM == "layer")
    if NORM == "layer":
        x = standardize(x, mean, rstd)
    if NORM != "none":
        x = x * weight[None, :] + bias[None, :]
    return x


@triton.jit
def layer_norm_backward(g, xhat, rstd, C: tl.constexpr):
    """dx of a tile of whole rows, g = dn weight; both g and xhat zero outside the C columns."""
    mean_g = tl.sum(g, axis=1) / C
    mean_gx = tl.sum(g * xhat, axis=1) / C
    return rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])


@triton.jit
def _layer_norm_statistics_kernel(
    x_ptr,  # (P, C)
    statistics_ptr,  # (2, P) fp32: mean, rstd
    P,
    eps,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = rows < P
    mean, rstd = row_statistics(x_ptr, rows, mask_p, C, eps, BLOCK_C)
    tl.store(statistics_ptr + rows, mean, mask=mask_p)
    tl.store(statistics_ptr + P + rows, rstd, mask=mask_p)


def _statistics_rule(arch: int, *, p: int, c: int) -> dict[str, int]:
    """Whole rows in registers up to 1024 channels, 16 KiB of fp32 a program."""
    block_c = min(triton.next_power_of_2(c), 1024)
    if arch == launch.INTERPRETER:
        return {"BLOCK_P": 1024, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 1}
    block_p = max(4096 // block_c, 4)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 1}


def layer_norm_statistics(x: Tensor, eps: float) -> Tensor:
    """Mean and rstd of every pixel of ``x`` (N, C, H, W) with dense pixels: (2, P) in fp32."""
    n, c, h, w = x.shape
    p = n * h * w
    statistics = torch.empty((2, p), dtype=torch.float32, device=x.device)
    tiles = launch.tiles("layer_norm_statistics", _statistics_rule, p=p, c=c)
    if p:
        with layout.on_device(x):
            _layer_norm_statistics_kernel[(triton.cdiv(p, tiles["BLOCK_P"]),)](
                x,
                statistics,
                p,
                eps,
                C=c,
                **tiles,
            )
    return statistics
