"""The whole gradient of a narrow expansion in one kernel: da never leaves the chip.

Computes: what expand_backward.py describes: da = (grad + drop Wp^T out_grad) act'(a), dx from
    dn = da W, dW = da^T n, db = sum da and the sums behind the norm's gradients.
Tiling: a program owns a share of the pixels and walks over it BLOCK_P at a time, all M and all C
    in one tile, M in two halves; dW, db and the sums stay in registers until the end.
Traffic: reads P M of grad, P C of x and residual and P O of out_grad, writes P C: for 24 to 96
    channels at 112 x 112 a fourth of what the three kernels move with da in between.
Numerics: as theirs: da rounded once for the tensor core, everything else in fp32.
Limits: M <= 128, C and O <= 64, 16-bit maps, no groups: stage 1, and stage 2 of 1M and 2M.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from emo_kernels.triton import launch, layout
from emo_kernels.triton.activation import activate_backward
from emo_kernels.triton.expand import load_normalized, load_statistics
from emo_kernels.triton.expand_backward_terms import (
    Results,
    Tensors,
    Wants,
    input_gradient,
    new_partials,
    summed_value,
)
from emo_kernels.triton.expand_backward_weight import MULTIPROCESSORS
from emo_kernels.triton.normalize import load_channels

_HALF = 64  # channels of half a tile: M is taken in two halves, whose da are not alive at once


@triton.jit
def load_tile(ptr, rows, mask_rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix (..., COLUMNS), BLOCK >= COLUMNS wide; zero outside."""
    offs = tl.arange(0, BLOCK)
    keep = mask_rows[:, None] & (offs < COLUMNS)[None, :]
    return tl.load(ptr + rows[:, None].to(tl.int64) * COLUMNS + offs[None, :], mask=keep, other=0.0)


@triton.jit
def half_gradient(
    n,  # (BLOCK_P, BLOCK_C)
    weight,  # (BLOCK_M, BLOCK_C), the rows of this half
    bias_ptr,
    out_grad,  # (BLOCK_P, BLOCK_O)
    drop,  # (BLOCK_P,)
    grad_ptr,
    out_weight_ptr,
    rows,
    mask_p,
    offs_m,
    OUT: tl.constexpr,
    M: tl.constexpr,
    ACT: tl.constexpr,
    SKIPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """da (BLOCK_P, BLOCK_M), fp32, of one half of the channels; zero outside."""
    mask_m = offs_m < M
    bias = load_channels(bias_ptr, offs_m, mask_m, 0.0)
    a = tl.dot(n, tl.trans(weight), input_precision=PRECISION) + bias[None, :]
    keep = mask_p[:, None] & mask_m[None, :]
    if SKIPS:
        offs_o = tl.arange(0, BLOCK_O)
        out_weight = tl.load(
            out_weight_ptr + offs_o[:, None] * M + offs_m[None, :],
            mask=(offs_o < OUT)[:, None] & mask_m[None, :],
            other=0.0,
        )
        skipped = tl.dot(out_grad, out_weight, input_precision=PRECISION) * drop[:, None]
        grad = tl.load(grad_ptr + rows[:, None] * M + offs_m[None, :], mask=keep, other=0.0)
        grad = grad.to(tl.float32) + skipped
    else:
        grad = tl.load(grad_ptr + rows[:, None] * M + offs_m[None, :], mask=keep, other=0.0)
        grad = grad.to(tl.float32)
    return tl.where(mask_p[:, None], activate_backward(grad, a, ACT), 0.0)


@triton.jit(do_not_specialize=["P", "PIXELS", "steps"])
def _expand_bwd_fused_kernel(
    grad_ptr,  # (P, M)
    x_ptr,  # (P, C)
    weight_ptr,  # (M, C), in the type of x
    bias_ptr,  # (M,) or None
    statistics_ptr,  # (2, P) fp32, or None
    norm_weight_ptr,  # (C,) or None
    norm_bias_ptr,  # (C,) or None
    affine_ptr,  # (4, C) fp32; None unless NORM is "batch"
    out_grad_ptr,  # (P, OUT) or None
    out_weight_ptr,  # (OUT, M) in the type of x, or None
    drop_scale_ptr,  # (N,) or None
    residual_ptr,  # (P, C) or None
    dx_ptr,  # (P, C) or None
    weight_partials_ptr,  # (shares, M, C) fp32, or None
    bias_partials_ptr,  # (shares, M) fp32, or None
    sums_partials_ptr,  # (2, shares, C) fp32, or None
    P,
    PIXELS,  # of an image
    steps,  # of BLOCK_P pixels in a share
    C: tl.constexpr,
    M: tl.constexpr,
    OUT: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tl.static_assert(2 * BLOCK_M >= M and BLOCK_C >= C and BLOCK_O >= OUT)
    PROLOGUE: tl.constexpr = "affine" if NORM == "batch" else NORM
    SKIPS: tl.constexpr = out_grad_ptr is not None
    share = tl.program_id(0).to(tl.int64)
    offs_m, offs_c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dw_1 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    db_1 = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if BLOCK_M < M:
        offs_2 = BLOCK_M + offs_m
        dw_2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        db_2 = tl.zeros((BLOCK_M,), dtype=tl.float32)
    sum_dn = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_value = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for step in range(0, steps):
        rows = (share * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = rows < P
        mean, rstd = load_statistics(statistics_ptr, rows, mask_p, P, NORM)
        n = load_normalized(
            x_ptr + rows[:, None] * C,
            mask_p,
            offs_c,
            mask_c,
            mean,
            rstd,
            norm_weight_ptr,
            norm_bias_ptr,
            PROLOGUE,
        )
        out_grad = n
        drop = tl.full((BLOCK_P,), 1.0, tl.float32)
        if SKIPS:
            out_grad = load_tile(out_grad_ptr, rows, mask_p, OUT, BLOCK_O)
            if drop_scale_ptr is not None:
                drop = tl.load(drop_scale_ptr + rows // PIXELS, mask=mask_p, other=0.0)
                drop = drop.to(tl.float32)
        weight = load_tile(weight_ptr, offs_m, offs_m < M, C, BLOCK_C)
        da = half_gradient(
            n,
            weight,
            bias_ptr,
            out_grad,
            drop,
            grad_ptr,
            out_weight_ptr,
            rows,
            mask_p,
            offs_m,
            OUT,
            M,
            ACT,
            SKIPS,
            PRECISION,
            BLOCK_O,
        )
        db_1 += tl.sum(da, axis=0)
        da = da.to(n.dtype)
        dw_1 = tl.dot(tl.trans(da), n, dw_1, input_precision=PRECISION)
        dn = tl.dot(da, weight, input_precision=PRECISION)
        if BLOCK_M < M:
            weight = load_tile(weight_ptr, offs_2, offs_2 < M, C, BLOCK_C)
            da = half_gradient(
                n,
                weight,
                bias_ptr,
                out_grad,
                drop,
                grad_ptr,
                out_weight_ptr,
                rows,
                mask_p,
                offs_2,
                OUT,
                M,
                ACT,
                SKIPS,
                PRECISION,
                BLOCK_O,
            )
            db_2 += tl.sum(da, axis=0)
            da = da.to(n.dtype)
            dw_2 = tl.dot(tl.trans(da), n, dw_2, input_precision=PRECISION)
            dn = tl.dot(da, weight, dn, input_precision=PRECISION)
        if NORM == "batch":
            dn = dn.to(n.dtype).to(tl.float32)
        x = load_tile(x_ptr, rows, mask_p, C, BLOCK_C).to(tl.float32)
        value = summed_value(x, offs_c, mask_c, mean, rstd, affine_ptr, C, NORM)
        if sums_partials_ptr is not None:
            sum_dn += tl.sum(dn, axis=0)
            sum_value += tl.sum(dn * value, axis=0)
        if dx_ptr is not None:
            dx = input_gradient(dn, value, offs_c, mask_c, rstd, norm_weight_ptr, C, NORM)
            if residual_ptr is not None:
                dx += load_tile(residual_ptr, rows, mask_p, C, BLOCK_C).to(tl.float32)
            keep = mask_p[:, None] & mask_c[None, :]
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + rows[:, None] * C + offs_c[None, :], dx, mask=keep)

    store_parameters(
        weight_partials_ptr, bias_partials_ptr, share, dw_1, db_1, offs_m, offs_c, M, C
    )
    if BLOCK_M < M:
        store_parameters(
            weight_partials_ptr, bias_partials_ptr, share, dw_2, db_2, offs_2, offs_c, M, C
        )
    if sums_partials_ptr is not None:
        out = sums_partials_ptr + share * C + offs_c
        tl.store(out, sum_dn, mask=mask_c)
        tl.store(out + tl.num_programs(0).to(tl.int64) * C, sum_value, mask=mask_c)


@triton.jit
def store_parameters(
    weight_ptr, bias_ptr, share, dw, db, offs_m, offs_c, M: tl.constexpr, C: tl.constexpr
):
    """The share's partials of dW and db for the channels offs_m, where they are wanted."""
    mask_m = offs_m < M
    if weight_ptr is not None:
        out = weight_ptr + (share * M + offs_m[:, None]) * C + offs_c[None, :]
        tl.store(out, dw, mask=mask_m[:, None] & (offs_c < C)[None, :])
    if bias_ptr is not None:
        tl.store(bias_ptr + share * M + offs_m, db, mask=mask_m)


def _expand_bwd_fused_rule(
    arch: int, *, p: int, c: int, m: int, o: int, itemsize: int
) -> dict[str, int]:
    """Two programs an SM, by registers; as many shares."""
    blocks = {
        "BLOCK_M": min(max(triton.next_power_of_2(m), 16), _HALF),
        "BLOCK_C": max(triton.next_power_of_2(c), 16),
        "BLOCK_O": max(triton.next_power_of_2(o), 16),
    }
    shares = 2 * MULTIPROCESSORS
    if arch == launch.INTERPRETER:
        return blocks | {"BLOCK_P": 256, "SHARES": 2, "num_warps": 4, "num_stages": 1}
    wide = max(blocks["BLOCK_C"], blocks["BLOCK_O"]) > 32
    if wide:  # 64 rows would spill
        return blocks | {"BLOCK_P": 32, "SHARES": shares, "num_warps": 8, "num_stages": 2}
    rows = 64 if arch >= 90 else 16
    return blocks | {"BLOCK_P": rows, "SHARES": shares, "num_warps": 4, "num_stages": 2}


def fuses(t: Tensors, groups: int) -> bool:
    """Whether one kernel can hold the expansion; in fp32, whose products need registers, none."""
    m, c = t.weight.shape
    o = 0 if t.out_grad is None else t.out_grad.shape[1]
    narrow = groups == 1 and m <= 2 * _HALF and max(c, o) <= _HALF
    return narrow and (t.x.element_size() == 2 or launch.interpreting())


def expand_backward_fused(t: Tensors, wants: Wants, *, norm: str, act: str) -> Results:
    """The gradient in one kernel; needs :func:`fuses`."""
    n, c, h, w = t.x.shape
    p, m = n * h * w, t.weight.shape[0]
    o = 0 if t.out_grad is None else t.out_grad.shape[1]
    sizes = {"p": p, "c": c, "m": m, "o": o, "itemsize": t.x.element_size()}
    tiles = dict(launch.tiles("expand_bwd_fused", _expand_bwd_fused_rule, **sizes))
    blocks = triton.cdiv(p, tiles["BLOCK_P"])
    steps = triton.cdiv(blocks, tiles.pop("SHARES"))
    shares = triton.cdiv(blocks, steps)
    results = Results(
        layout.new_map(t.x, n, c, h, w) if wants.dx else None,
        new_partials(wants.weight, t.x, shares, m, c),
        new_partials(wants.bias, t.x, shares, m),
        new_partials(wants.sums, t.x, 2, shares, c),
    )
    with layout.on_device(t.x):
        _expand_bwd_fused_kernel[(shares,)](
            *t,
            *results,
            p,
            h * w,
            steps,
            C=c,
            M=m,
            OUT=o,
            NORM=norm if t.affine is None else "batch",
            ACT=act,
            PRECISION=layout.precision(),
            **tiles,
        )
    return results
