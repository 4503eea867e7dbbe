"""Shrink: batch norm's affine, SiLU, gate, local skip, projection, stochastic depth and residual.

Computes: out = residual + drop_scale[n] W (local + gate[n, m] silu(scale[m] y + shift[m])), the
    block's second half; SPEC 1, DESIGN F3.
Tiling: a program owns BLOCK_P pixels and BLOCK_O + BLOCK_O2 output channels, all O up to 320; it
    walks M, K of the GEMM, BLOCK_M at a time. Two blocks of O waste less than one power of two.
Traffic: reads y, local (M a pixel) and residual (O) once, writes out (O) once; W comes from L2.
    2 M O flops for 2 (2 M + 2 O) bytes a pixel: 64 to 120 flops a byte on the official layers.
Numerics: the chain in fp32, its result rounded to the map's dtype for the tensor cores, fp32 sums;
    stochastic depth and residual are added in fp32; out is rounded once. The statistics for the
    next block's batch norm are of out as stored: fp32 in a tile, fp64 between tiles.
Limits: no fp64; any N (0 too), M, O and map size.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.activation import silu
from emo_kernels.triton.reduce_tall import reduce_tall, whole_groups


@triton.jit
def load_channels(ptr, offs, mask):
    """A row (1, BLOCK) of a vector over channels, in fp32."""
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_tile(ptr, at, mask):
    """A tile in fp32, 0 where masked."""
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_weight(weight_ptr, offs_o, offs_m, mask_m, M: tl.constexpr, OUT: tl.constexpr):
    """A tile of the projection (O, M), 0 beyond its edges."""
    at = offs_o[:, None] * M + offs_m[None, :]  # a weight has fewer than 2^31 elements
    return tl.load(weight_ptr + at, mask=(offs_o < OUT)[:, None] & mask_m[None, :], other=0.0)


@triton.jit
def _store_out(
    acc,
    drop,
    residual_ptr,
    pivot_ptr,
    out_ptr,
    sums_ptr,
    rows,
    mask_p,
    offs_o,
    OUT: tl.constexpr,
):
    """Epilogue of a block of output channels: drop, residual, rounding, sums of what is stored."""
    mask_o = offs_o < OUT
    mask = mask_p[:, None] & mask_o[None, :]
    at = rows[:, None] * OUT + offs_o[None, :]
    if drop is not None:
        acc *= drop[:, None]
    if residual_ptr is not None:
        acc += load_tile(residual_ptr, at, mask)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=mask)
    if sums_ptr is not None:
        value = out.to(tl.float32)
        if pivot_ptr is not None:
            value -= load_channels(pivot_ptr, offs_o, mask_o)
        value = tl.where(mask_p[:, None], value, 0.0)
        tl.store(sums_ptr + offs_o, tl.sum(value, axis=0), mask=mask_o)
        tl.store(sums_ptr + OUT + offs_o, tl.sum(value * value, axis=0), mask=mask_o)


@triton.jit
def _shrink_fwd_kernel(
    y_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    local_ptr,
    residual_ptr,
    gate_ptr,
    drop_ptr,
    pivot_ptr,
    out_ptr,
    sums_ptr,  # (blocks of pixels, 2, O) partials
    P,
    HW,
    M: tl.constexpr,
    OUT: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_O2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    first = pid // CHUNKS * BLOCK_P  # offsets within the tile behind it fit 32 bits
    rows = tl.arange(0, BLOCK_P)
    mask_p = rows < tl.minimum(P - first, BLOCK_P).to(tl.int32)
    first_o = (pid % CHUNKS).to(tl.int32) * (BLOCK_O + BLOCK_O2)
    offs_o = first_o + tl.arange(0, BLOCK_O)
    acc = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    if BLOCK_O2:
        offs_o2 = first_o + BLOCK_O + tl.arange(0, BLOCK_O2)
        acc2 = tl.zeros((BLOCK_P, BLOCK_O2), dtype=tl.float32)
    image = first // HW
    images = ((first - image * HW).to(tl.int32) + rows) // HW  # behind the tile's first
    for start in range(0, M, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_p[:, None] & mask_m[None, :]
        at = rows[:, None] * M + offs_m[None, :]
        t = load_tile(y_ptr + first * M, at, mask)
        if scale_ptr is not None:
            t *= load_channels(scale_ptr, offs_m, mask_m)
            t += load_channels(shift_ptr, offs_m, mask_m)
        t = silu(t)
        if gate_ptr is not None:
            t *= load_tile(gate_ptr + image * M, images[:, None] * M + offs_m[None, :], mask)
        if local_ptr is not None:
            t += load_tile(local_ptr + first * M, at, mask)
        t = t.to(weight_ptr.dtype.element_ty)
        w = load_weight(weight_ptr, offs_o, offs_m, mask_m, M, OUT)
        acc = tl.dot(t, w.T, acc, input_precision=PRECISION)
        if BLOCK_O2:
            w2 = load_weight(weight_ptr, offs_o2, offs_m, mask_m, M, OUT)
            acc2 = tl.dot(t, w2.T, acc2, input_precision=PRECISION)
    drop = None
    if drop_ptr is not None:
        drop = load_tile(drop_ptr + image, images, mask_p)
    out_ptr += first * OUT
    if residual_ptr is not None:
        residual_ptr += first * OUT
    if sums_ptr is not None:
        sums_ptr += pid // CHUNKS * (2 * OUT)
    _store_out(acc, drop, residual_ptr, pivot_ptr, out_ptr, sums_ptr, rows, mask_p, offs_o, OUT)
    if BLOCK_O2:
        _store_out(
            acc2, drop, residual_ptr, pivot_ptr, out_ptr, sums_ptr, rows, mask_p, offs_o2, OUT
        )


def output_blocks(o: int) -> tuple[int, int]:
    """Two powers of two that cover ``o`` channels more tightly than one; the second may be 0."""
    whole = max(16, triton.next_power_of_2(o))
    half = whole // 2
    rest = max(16, triton.next_power_of_2(max(o - half, 1)))
    return (whole, 0) if half < 16 or half + rest >= whole else (half, rest)


def shrink_fwd_rule(arch: int, *, p: int, m: int, o: int, bits: int) -> dict[str, int]:
    """As many pixels a program as the accumulator (BLOCK_P, O) leaves registers for."""
    if arch == launch.INTERPRETER:
        block_p = min(max(16, triton.next_power_of_2(p)), 2048)
        block_m = min(max(16, triton.next_power_of_2(m)), 256)
        block_o = min(max(16, triton.next_power_of_2(o)), 512)
        tiles = {"BLOCK_P": block_p, "BLOCK_M": block_m, "BLOCK_O": block_o, "BLOCK_O2": 0}
        return tiles | {"num_warps": 4, "num_stages": 1}
    largest = 320 if arch >= 90 else 160  # what the registers hold; before sm_90 also t and W
    block_o, block_o2 = output_blocks(triton.cdiv(o, triton.cdiv(o, largest)))
    width = block_o + block_o2
    if bits == 32:  # no tensor cores: each thread multiplies, small tiles keep it in registers
        block_o, block_o2 = (block_o, block_o2) if width <= 128 else (64, 0)
        tiles = {"BLOCK_P": 64, "BLOCK_M": 16, "BLOCK_O": block_o, "BLOCK_O2": block_o2}
        return tiles | {"num_warps": 8, "num_stages": 2}
    if p <= 1024:  # single images: programs share the channels of O rather than the pixels
        block_o, block_o2 = min(block_o, 32), 0
    block_p = 128 if width <= 160 and p >= 1 << 15 else 64  # enough programs for 132 SMs
    tiles = {"BLOCK_P": block_p, "BLOCK_M": 32 if m <= 32 else 64}
    warps = 8 if block_p * max(width, tiles["BLOCK_M"]) >= 128 * 64 else 4
    return tiles | {"BLOCK_O": block_o, "BLOCK_O2": block_o2, "num_warps": warps, "num_stages": 2}


def _forward(
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    local: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    drop_scale: Tensor | None,
    pivot: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    n, m, h, w = y.shape
    o, p = weight.shape[0], n * h * w
    out = layout.new_map(y, n, o, h, w)
    if p == 0:
        return out, y.new_zeros((2, o), dtype=torch.float64) if statistics else None
    bits = 8 * y.element_size()
    tiles = launch.tiles("shrink_fwd", shrink_fwd_rule, p=p, m=m, o=o, bits=bits)
    blocks = triton.cdiv(p, tiles["BLOCK_P"])
    chunks = triton.cdiv(o, tiles["BLOCK_O"] + tiles["BLOCK_O2"])
    blocks = whole_groups(blocks) if statistics else blocks  # a program without pixels sums 0
    partials = y.new_empty((blocks, 2, o), dtype=torch.float32) if statistics else None
    with layout.on_device(y):
        _shrink_fwd_kernel[(blocks * chunks,)](
            layout.pixels(y),
            layout.operand(weight, y),
            layout.dense(scale),
            layout.dense(shift),
            layout.dense_map(local),
            layout.dense_map(residual),
            layout.dense(gate),
            layout.dense(drop_scale),
            layout.dense(pivot),
            out,
            partials,
            p,
            h * w,
            M=m,
            OUT=o,
            CHUNKS=chunks,
            PRECISION=layout.precision(),
            **tiles,
        )
    return out, None if partials is None else reduce_tall(partials, torch.float64)


def shrink(
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    local: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    drop_scale: Tensor | None = None,
) -> Tensor:
    """The operator of :func:`emo_kernels.ops.shrink` on Triton, in one pass."""
    return _forward(
        y, weight, scale, shift, local, residual, gate, drop_scale, pivot=None, statistics=False
    )[0]


def shrink_statistics(
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    local: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    drop_scale: Tensor | None,
    pivot: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`shrink` and, in the same pass, what the next block's batch norm needs to know of it.

    Args:
        pivot: (O,), subtracted from out before it is summed; ``None`` is 0.

    Returns:
        out (N, O, H, W), and (2, O) in fp64: the sums over pixels of out - pivot and of its
        square, of out as it is stored.
    """
    out, sums = _forward(
        y, weight, scale, shift, local, residual, gate, drop_scale, pivot, statistics=True
    )
    assert sums is not None
    return out, sums


def shrink_unsupported(y: Tensor, *_: Tensor | None) -> str | None:
    """Why these kernels cannot run the call, or ``None`` if they can."""
    if y.dtype is torch.float64:
        return "triton has no float64 kernels"
    return None
