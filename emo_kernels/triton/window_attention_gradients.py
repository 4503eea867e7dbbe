"""Window attention, backward: from gradients at q, k and n to those of x, Wqk, its bias, the norm.

Computes: dn += Wqk^T [dq; dk]; dx = the norm's gradient at x (+ residual), d norm_weight and
    d norm_bias; dWqk = [dq; dk] n^T, d qk_bias = (sum dq, 0), sums over the pixels of the map. With
    a training batch norm in front: dn itself, and (sum dn, sum dn xhat).
Tiling: input: a program owns BLOCK_P pixels and walks over C in tiles of BLOCK_C; behind a layer
    norm, whose gradient needs means over C, a second walk finishes what the first stored.
    weight: a program owns a tile of Wqk and every pixel of its share of the map.
Traffic: input reads dq, dk, dn, x and the residual (6 C elements a pixel) and writes C; weight
    reads 3 C, as many times as Wqk has tiles the other way (from L2), and writes one fp32 copy of
    Wqk a share.
Numerics: fp32 accumulators; n and Wqk rounded to the dtype of x for the tensor cores. Behind a
    layer norm dn norm_weight is rounded to the dtype of x between the walks, as PyTorch rounds dn.
    Partial sums are added in a fixed order, no atomics. Padding is not in any map here: n is zero
    there, its queries have no gradient, and the gradients of its keys only reach the K half of the
    bias, which is zero.
Limits: none of its own.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import layout
from emo_kernels.triton.activation import activate_backward
from emo_kernels.triton.expand import block_for, load_statistics
from emo_kernels.triton.launch import INTERPRETER, tiles
from emo_kernels.triton.normalize import load_channels, standardize
from emo_kernels.triton.partials import reduce_partials
from emo_kernels.triton.window_tiles import normalized


class Norm(NamedTuple):
    """The norm in front: its kind, its parameters, the statistics of layer norm or ``affine``."""

    kind: str  # none, affine, layer; batch: a training batch norm
    weight: Tensor | None = None  # (C,)
    bias: Tensor | None = None  # (C,)
    statistics: Tensor | None = None  # (2, P) of layer norm, (2, C) of batch norm: mean, rstd


@triton.jit
def _window_attention_bwd_input_kernel(
    dn_ptr,  # (P, C)
    dqk_ptr,  # (P, 2C), or None
    qk_weight_ptr,  # (2C, C)
    x_ptr,  # (P, C)
    statistics_ptr,  # (2, P) of layer norm, (2, C) of batch norm
    norm_weight_ptr,  # (C,)
    residual_ptr,  # (P, C), or None
    dx_ptr,  # (P, C), or None
    partials_ptr,  # (2, programs, C) fp32, or None
    P,
    C: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    first = pid * BLOCK_P
    live = first + offs_p < P
    dtype = x_ptr.dtype.element_ty
    mean, rstd = load_statistics(statistics_ptr, first + offs_p, live, P, NORM)
    sum_g = tl.zeros([BLOCK_P], tl.float32)
    sum_gx = tl.zeros([BLOCK_P], tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask = live[:, None] & mask_c[None, :]
        at = offs_p[:, None] * C + offs_c[None, :]
        dn = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        if dqk_ptr is not None:
            for m in range(0, 2 * C, BLOCK_K):
                offs_m = m + tl.arange(0, BLOCK_K)
                mask_m = offs_m < 2 * C
                dqk = tl.load(
                    dqk_ptr + first * (2 * C) + offs_p[:, None] * (2 * C) + offs_m[None, :],
                    mask=live[:, None] & mask_m[None, :],
                    other=0.0,
                )
                qk_weight = tl.load(
                    qk_weight_ptr + offs_m[:, None] * C + offs_c[None, :],
                    mask=mask_m[:, None] & mask_c[None, :],
                    other=0.0,
                )
                dn = tl.dot(dqk, qk_weight, dn, input_precision=PRECISION)
        dn += tl.load(dn_ptr + first * C + at, mask=mask, other=0.0).to(tl.float32)
        dx = dn
        if NORM != "none":
            x = tl.load(x_ptr + first * C + at, mask=mask, other=0.0).to(tl.float32)
            dx = dn * load_channels(norm_weight_ptr, offs_c, mask_c, 1.0)[None, :]
            if NORM == "layer":
                x = tl.where(mask, standardize(x, mean, rstd), 0.0)
                sum_g += tl.sum(dx, 1)
                sum_gx += tl.sum(dx * x, 1)
            if NORM == "batch":
                dx = dn.to(dtype).to(tl.float32)
                dn = dx  # the sums are of what is stored
                x -= load_channels(statistics_ptr, offs_c, mask_c, 0.0)[None, :]
                x *= load_channels(statistics_ptr + C, offs_c, mask_c, 0.0)[None, :]
                x = tl.where(mask, x, 0.0)
            if partials_ptr is not None:
                partials = partials_ptr + pid * C + offs_c
                tl.store(partials, tl.sum(dn, 0), mask=mask_c)
                partials += tl.num_programs(0).to(tl.int64) * C
                tl.store(partials, tl.sum(dn * x, 0), mask=mask_c)
        if dx_ptr is not None:
            if NORM != "layer" and residual_ptr is not None:
                dx += tl.load(residual_ptr + first * C + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + first * C + at, dx.to(dtype), mask=mask)
    if NORM == "layer" and dx_ptr is not None:
        # What was stored is dn weight; its means over the row are known now.
        tl.debug_barrier()
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask = live[:, None] & (offs_c < C)[None, :]
            at = offs_p[:, None] * C + offs_c[None, :]
            x = tl.load(x_ptr + first * C + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(dx_ptr + first * C + at, mask=mask, other=0.0).to(tl.float32)
            mean_gx = (sum_gx / C)[:, None]
            dx = g - (sum_g / C)[:, None] - standardize(x, mean, rstd) * mean_gx
            dx *= rstd[:, None]
            if residual_ptr is not None:
                dx += tl.load(residual_ptr + first * C + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + first * C + at, dx.to(dtype), mask=mask)


def _input_rule(arch: int, *, p: int, c: int, itemsize: int) -> dict[str, int]:
    """128 x 64 tiles of dn: 32 fp32 registers a thread for the accumulator."""
    if arch == INTERPRETER:
        return {
            "BLOCK_P": 256,
            "BLOCK_C": max(16, triton.next_power_of_2(c)),
            "BLOCK_K": max(16, triton.next_power_of_2(2 * c)),
            "num_warps": 4,
            "num_stages": 1,
        }
    if c % 4:  # no vector access fits a row: addresses take the registers
        return {"BLOCK_P": 64, "BLOCK_C": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    block_p = 128 if itemsize == 2 and p >= 128 * 264 else 64  # two programs for each of 132 SMs
    return {
        "BLOCK_P": block_p,
        "BLOCK_C": block_for(c, (32, 64), 16),
        "BLOCK_K": 64 if itemsize == 2 else 32,
        "num_warps": 8 if itemsize == 4 or block_p == 128 else 4,
        "num_stages": 3 if itemsize == 2 else 2,
    }


def input_gradient(
    x: Tensor,
    dn: Tensor,
    dqk: Tensor | None,
    qk_weight: Tensor | None,
    norm: Norm,
    residual: Tensor | None,
    *,
    needed: tuple[bool, bool, bool],
) -> list[Tensor]:
    """Gradients of x, norm_weight and norm_bias, those ``needed``.

    With a training batch norm dn, and, where the second is needed, its sums (2, C) in fp64.
    """
    n, c, h, w = x.shape
    p = n * h * w
    blocks = tiles("window_attention_bwd_input", _input_rule, p=p, c=c, itemsize=x.element_size())
    programs = triton.cdiv(p, blocks["BLOCK_P"])
    if programs > 1024:  # their sums are added in two steps
        programs = 64 * triton.cdiv(programs, 64)
    dx = layout.new_map(x, n, c, h, w) if needed[0] else None
    partials = None
    if needed[1] or needed[2]:
        partials = torch.empty((2, programs, c), dtype=torch.float32, device=x.device)
    _window_attention_bwd_input_kernel[(programs,)](
        dn_ptr=dn,
        dqk_ptr=dqk,
        qk_weight_ptr=None if dqk is None else qk_weight,
        x_ptr=x,
        statistics_ptr=norm.statistics,
        norm_weight_ptr=norm.weight,
        residual_ptr=residual,
        dx_ptr=dx,
        partials_ptr=partials,
        P=p,
        C=c,
        NORM=norm.kind,
        PRECISION=layout.precision(),
        **blocks,
    )
    grads = [] if dx is None else [dx]
    if partials is None:
        return grads
    if programs > 1024:
        partials = torch.stack([reduce_partials(rows.view(-1, 64, c)) for rows in partials])
    if norm.kind == "batch":
        sums = torch.empty((2, c), dtype=torch.float64, device=x.device)
        for row in range(2):
            reduce_partials(partials[row], out=sums[row])
        return [*grads, sums]
    for wanted, parameter, row in zip(needed[1:], (norm.weight, norm.bias), (1, 0)):
        if wanted:
            assert parameter is not None
            grads.append(reduce_partials(partials[row], out=torch.empty_like(parameter)))
    return grads


@triton.jit
def _window_attention_bwd_weight_kernel(
    dqk_ptr,  # (P, 2C)
    x_ptr,  # (P, C)
    statistics_ptr,  # (2, P)
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    weight_partials_ptr,  # (shares, 2C, C) fp32
    bias_partials_ptr,  # (shares, C) fp32: the q half
    P,
    steps,
    C: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    share = tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < 2 * C, offs_n < C
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias = tl.zeros([BLOCK_M], tl.float32)
    for step in range(0, steps):
        rows = (share * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        live = rows < P
        dqk = tl.load(
            dqk_ptr + rows[:, None] * (2 * C) + offs_m[None, :],
            mask=live[:, None] & mask_m[None, :],
            other=0.0,
        )
        mean, rstd = load_statistics(statistics_ptr, rows, live, P, NORM)
        n = normalized(
            x_ptr,
            rows,
            live,
            mean,
            rstd,
            norm_weight_ptr,
            norm_bias_ptr,
            offs_n,
            mask_n,
            C,
            NORM,
        ).to(dtype)
        acc = tl.dot(tl.trans(dqk), n, acc, input_precision=PRECISION)
        bias += tl.sum(dqk.to(tl.float32), 0)
    at = weight_partials_ptr + (share * (2 * C) + offs_m[:, None]) * C + offs_n[None, :]
    tl.store(at, acc, mask=mask_m[:, None] & mask_n[None, :])
    if tl.program_id(1).to(tl.int64) == 0:
        tl.store(bias_partials_ptr + share * C + offs_m, bias, mask=offs_m < C)


def _weight_rule(arch: int, *, p: int, c: int, itemsize: int) -> dict[str, int]:
    """Tiles of Wqk, pixels a step, and into how many shares the map falls."""
    if arch == INTERPRETER:
        block = max(16, triton.next_power_of_2(c))
        return {
            "BLOCK_M": 2 * block,
            "BLOCK_N": block,
            "BLOCK_P": 256,
            "SHARES": 2,
            "num_warps": 4,
            "num_stages": 1,
        }
    block_m, block_n = 64, 64 if c > 32 else 32
    blocks = triton.cdiv(2 * c, block_m) * triton.cdiv(c, block_n)
    block_p = 64 if itemsize == 2 else 32
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_P": block_p,
        "SHARES": max(1, min(triton.cdiv(p, 4 * block_p), 396 // blocks)),
        "num_warps": 4 if itemsize == 2 else 8,
        "num_stages": 3 if itemsize == 2 else 2,
    }


def weight_gradients(
    x: Tensor,
    dqk: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    norm: Norm,
    *,
    needed: tuple[bool, bool],
) -> list[Tensor]:
    """Gradients of qk_weight and qk_bias, those ``needed``."""
    n, c, h, w = x.shape
    p = n * h * w
    sizes = {"p": p, "c": c, "itemsize": x.element_size()}
    blocks = dict(tiles("window_attention_bwd_weight", _weight_rule, **sizes))
    shares = blocks.pop("SHARES")
    steps = triton.cdiv(triton.cdiv(p, blocks["BLOCK_P"]), shares)
    shares = triton.cdiv(p, blocks["BLOCK_P"] * steps)
    weight_partials = torch.empty((shares, 2 * c, c), dtype=torch.float32, device=x.device)
    bias_partials = torch.empty((shares, c), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(2 * c, blocks["BLOCK_M"]), triton.cdiv(c, blocks["BLOCK_N"]), shares)
    _window_attention_bwd_weight_kernel[grid](
        dqk_ptr=dqk,
        x_ptr=x,
        statistics_ptr=norm.statistics,
        norm_weight_ptr=norm.weight,
        norm_bias_ptr=norm.bias,
        weight_partials_ptr=weight_partials,
        bias_partials_ptr=bias_partials,
        P=p,
        steps=steps,
        C=c,
        NORM=norm.kind,
        PRECISION=layout.precision(),
        **blocks,
    )
    grads = []
    if needed[0]:
        grad = torch.empty_like(qk_weight)
        grads.append(reduce_partials(weight_partials.view(shares, *grad.shape), out=grad))
    if needed[1]:
        assert qk_bias is not None
        grad = torch.zeros_like(qk_bias)
        reduce_partials(bias_partials, out=grad[:c])
        grads.append(grad)
    return grads


@triton.jit
def _window_attention_bwd_padding_kernel(
    padding_ptr,  # (R, M) fp32
    v_bias_ptr,  # (M,)
    grad_ptr,  # (M,), in and out
    R,
    M,
    ACT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for r in range(0, R, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask = (rows < R)[:, None] & mask_m[None, :]
        acc += tl.load(padding_ptr + rows[:, None] * M + offs_m[None, :], mask=mask, other=0.0)
    bias = load_channels(v_bias_ptr, offs_m, mask_m, 0.0)
    grad = load_channels(grad_ptr, offs_m, mask_m, 0.0)
    grad += activate_backward(tl.sum(acc, 0), bias, ACT)
    tl.store(grad_ptr + offs_m, grad.to(grad_ptr.dtype.element_ty), mask=mask_m)


def add_padding_gradient(grad: Tensor, v_bias: Tensor, padding: Tensor, act: str) -> None:
    """Add to d v_bias (M,) what the values act(v_bias) of padding got, partial sums (R, M)."""
    r, m = padding.shape
    _window_attention_bwd_padding_kernel[(triton.cdiv(m, 32),)](
        padding_ptr=padding,
        v_bias_ptr=v_bias,
        grad_ptr=grad,
        R=r,
        M=m,
        ACT=act,
        BLOCK_R=32,
        BLOCK_M=32,
        num_warps=4,
    )
