"""Gradient of an expansion's input, and the sums over pixels behind its norm's gradients.

Computes: dn = da W per group, then the norm's backward: none: dx = dn; affine: dx = dn weight;
    layer: dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dn weight; each + residual. With the
    affine of a training batch norm: dn itself. Sums: dn and dn v over the pixels, v = x (affine)
    or xhat (layer, batch).
Tiling: BLOCK_P pixels and BLOCK_C channels a program, over M in steps of BLOCK_K. Layer norm needs
    whole rows, BLOCK_C >= C; more channels than 512, or groups, take a kernel of their own for it.
Traffic: reads P M of da and P C of x and residual, writes P C: da M / C times the rest.
Numerics: fp32 from the accumulator to the one rounding. Batch norm's sums take dn as stored.
Limits: sums come as one fp32 partial a program, added in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.expand import block_for, load_statistics, tile_of
from emo_kernels.triton.expand_backward_terms import (
    Tensors,
    Wants,
    input_gradient,
    new_partials,
    summed_value,
)
from emo_kernels.triton.normalize import load_channels, standardize
from emo_kernels.triton.reduce_tall import whole_groups

ROWS_MOST = 512  # of channels whose layer norm ends in the GEMM's epilogue


@triton.jit
def store_sums(partials_ptr, part, parts, dn, value, offs_c, mask_c, C: tl.constexpr):
    """Row ``part`` of the partial sums (2, parts, C) of dn and dn value."""
    row = partials_ptr + part * C + offs_c
    tl.store(row, tl.sum(dn, axis=0), mask=mask_c)
    second = row + parts.to(tl.int64) * C
    tl.store(second, tl.sum(dn * value, axis=0), mask=mask_c)


@triton.jit(do_not_specialize=["P", "parts"])
def _expand_bwd_input_kernel(
    da_ptr,  # (P, M)
    weight_ptr,  # (M, C / GROUPS), in the type of da
    x_ptr,  # (P, C); None where NORM is "none"
    statistics_ptr,  # (2, P) fp32, or None
    norm_weight_ptr,  # (C,) or None
    affine_ptr,  # (4, C) fp32; None unless NORM is "batch"
    residual_ptr,  # (P, C) or None
    dx_ptr,  # (P, C) or None
    partials_ptr,  # (2, parts, C) fp32, or None
    P,
    parts,
    C: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tl.static_assert(
        NORM != "layer" or (GROUPS == 1 and BLOCK_C >= C), "layer norm wants whole rows"
    )
    K: tl.constexpr = M // GROUPS
    rows, mask_p, group, offs_c, mask_c = tile_of(P, C, GROUPS, BLOCK_P, BLOCK_C)
    columns = offs_c - group * (C // GROUPS)
    da_rows = da_ptr + rows[:, None] * M + group * K
    weight_tile = weight_ptr + group.to(tl.int64) * K * (C // GROUPS) + columns[None, :]
    dn = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        da = tl.load(da_rows + offs_k[None, :], mask=mask_p[:, None] & mask_k[None, :], other=0.0)
        weight = tl.load(
            weight_tile + offs_k[:, None].to(tl.int64) * (C // GROUPS),
            mask=mask_k[:, None] & mask_c[None, :],
            other=0.0,
        )
        dn = tl.dot(da, weight, dn, input_precision=PRECISION)

    keep = mask_p[:, None] & mask_c[None, :]
    offs = rows[:, None] * C + offs_c[None, :]
    if NORM == "batch":
        dn = dn.to(da_ptr.dtype.element_ty).to(tl.float32)
    x = dn
    if x_ptr is not None:
        x = tl.load(x_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    mean, rstd = load_statistics(statistics_ptr, rows, mask_p, P, NORM)
    value = summed_value(x, offs_c, mask_c, mean, rstd, affine_ptr, C, NORM)
    if partials_ptr is not None:
        part = tl.program_id(0).to(tl.int64) // (tl.num_programs(0) // parts)
        store_sums(partials_ptr, part, parts, dn, value, offs_c, mask_c, C)
    if dx_ptr is not None:
        dx = input_gradient(dn, value, offs_c, mask_c, rstd, norm_weight_ptr, C, NORM)
        if residual_ptr is not None:
            dx += tl.load(residual_ptr + offs, mask=keep, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["P", "parts"])
def _expand_bwd_layer_norm_kernel(
    dn_ptr,  # (P, C) fp32
    x_ptr,  # (P, C)
    statistics_ptr,  # (2, P) fp32
    norm_weight_ptr,  # (C,) or None
    residual_ptr,  # (P, C) or None
    dx_ptr,  # (P, C) or None
    partials_ptr,  # (2, parts, C) fp32, or None
    P,
    parts,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    rows = pid * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = rows < P
    mean, rstd = load_statistics(statistics_ptr, rows, mask_p, P, "layer")
    sum_g = tl.zeros((BLOCK_P,), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        keep = mask_p[:, None] & mask_c[None, :]
        offs = rows[:, None] * C + offs_c[None, :]
        dn = tl.load(dn_ptr + offs, mask=keep, other=0.0)
        x = tl.load(x_ptr + offs, mask=keep, other=0.0).to(tl.float32)
        xhat = tl.where(mask_c[None, :], standardize(x, mean, rstd), 0.0)
        g = dn * load_channels(norm_weight_ptr, offs_c, mask_c, 1.0)[None, :]
        sum_g += tl.sum(g, axis=1)
        sum_gx += tl.sum(g * xhat, axis=1)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        keep = mask_p[:, None] & mask_c[None, :]
        offs = rows[:, None] * C + offs_c[None, :]
        dn = tl.load(dn_ptr + offs, mask=keep, other=0.0)
        x = tl.load(x_ptr + offs, mask=keep, other=0.0).to(tl.float32)
        xhat = tl.where(mask_c[None, :], standardize(x, mean, rstd), 0.0)
        if dx_ptr is not None:
            g = dn * load_channels(norm_weight_ptr, offs_c, mask_c, 1.0)[None, :]
            dx = rstd[:, None] * (g - (sum_g[:, None] + xhat * sum_gx[:, None]) / C)
            if residual_ptr is not None:
                dx += tl.load(residual_ptr + offs, mask=keep, other=0.0).to(tl.float32)
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=keep)
        if partials_ptr is not None:
            store_sums(partials_ptr, pid, parts, dn, xhat, offs_c, mask_c, C)


def _expand_bwd_input_rule(
    arch: int, *, p: int, c: int, m: int, rows: int, itemsize: int
) -> dict[str, int]:
    """One channel tile where it fits, as each reads da anew; whole rows (``rows``) if need be."""
    whole = max(triton.next_power_of_2(c), 16)
    if arch == launch.INTERPRETER:
        block_k = max(min(triton.next_power_of_2(m), 512), 16)
        blocks = {"BLOCK_P": 512, "BLOCK_C": whole if rows else min(whole, 512), "BLOCK_K": block_k}
        return blocks | {"num_warps": 4, "num_stages": 1}
    if itemsize == 4:
        block_c = whole if rows else min(whole, 64)
        block_p = max(min(64, 8192 // block_c), 16)
        return {
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
            "BLOCK_K": 16 if block_c > 128 else 32,
            "num_warps": 8,
            "num_stages": 2,
        }
    block_c = whole if rows else block_for(c, (32, 64, 128, 256), 96)
    wide = block_c > 128
    block_p = 16384 // block_c if wide else min(8192 // block_c, 128)
    if rows and block_c >= 128 and arch < 90:
        block_p = 32  # more would spill in the layer norm's epilogue
    return {
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "BLOCK_K": 32 if wide else 64,
        "num_warps": 16 if block_c > 256 else 8 if block_c >= 64 else 4,
        "num_stages": 3,
    }


def _layer_norm_rule(arch: int, *, p: int, c: int) -> dict[str, int]:
    """32 KiB of fp32 a tile."""
    block_c = min(triton.next_power_of_2(c), 512)
    block_p = 512 if arch == launch.INTERPRETER else max(8192 // block_c, 16)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 8, "num_stages": 1}


def expand_backward_input(
    da: Tensor, t: Tensors, wants: Wants, *, norm: str, groups: int
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, partials (2, parts, C) of the sums of dn and dn v), each ``None`` unless wanted.

    ``da`` (N, M, H, W) has dense pixels; ``norm`` is "batch" for dn in place of dx.
    """
    n, c, h, w = t.x.shape
    dx = layout.new_map(t.x, n, c, h, w) if wants.dx else None
    if norm == "layer" and (groups > 1 or c > ROWS_MOST):
        dn = layout.new_map(t.x, n, c, h, w, torch.float32)
        _launch_gemm(da, t._replace(residual=None), dn, False, "none", groups)
        return dx, _launch_layer_norm(dn, t, dx, wants.sums)
    return dx, _launch_gemm(da, t, dx, wants.sums, norm, groups)


def _launch_gemm(
    da: Tensor, t: Tensors, dx: Tensor | None, want_sums: bool, norm: str, groups: int
) -> Tensor | None:
    n, c, h, w = t.x.shape
    p, m = n * h * w, da.shape[1]
    tiles = launch.tiles(
        "expand_bwd_input",
        _expand_bwd_input_rule,
        p=p,
        c=c // groups,
        m=m // groups,
        rows=int(norm == "layer"),
        itemsize=t.x.element_size(),
    )
    parts = whole_groups(triton.cdiv(p, tiles["BLOCK_P"]))
    partials = new_partials(want_sums, t.x, 2, parts, c)
    with layout.on_device(t.x):
        _expand_bwd_input_kernel[(parts * groups * triton.cdiv(c // groups, tiles["BLOCK_C"]),)](
            da,
            t.weight,
            None if norm == "none" else t.x,
            t.statistics,
            t.norm_weight,
            t.affine,
            t.residual,
            dx,
            partials,
            p,
            parts,
            C=c,
            M=m,
            GROUPS=groups,
            NORM=norm,
            PRECISION=layout.precision(),
            **tiles,
        )
    return partials


def _launch_layer_norm(dn: Tensor, t: Tensors, dx: Tensor | None, want_sums: bool) -> Tensor | None:
    n, c, h, w = t.x.shape
    p = n * h * w
    tiles = launch.tiles("expand_bwd_layer_norm", _layer_norm_rule, p=p, c=c)
    parts = whole_groups(triton.cdiv(p, tiles["BLOCK_P"]))
    partials = new_partials(want_sums, t.x, 2, parts, c)
    with layout.on_device(t.x):
        _expand_bwd_layer_norm_kernel[(parts,)](
            dn,
            t.x,
            t.statistics,
            t.norm_weight,
            t.residual,
            dx,
            partials,
            p,
            parts,
            C=c,
            **tiles,
        )
    return partials
