"""Gradient of an expansion, with what its neighbours in the block hand over.

Computes: da = (grad + drop Wp^T out_grad) act'(a), a = W n + b recomputed, Wp and out_grad of the
    shrink behind a skipped depthwise convolution (t = e + ...: its gradient reaches e as well);
    db = sum da. Then dx and the norm's gradients (expand_backward_input.py) and dW = da^T n
    (expand_backward_weight.py).
Tiling: of da as the forward's, with a second GEMM over the O channels of out_grad.
Traffic: reads P M of grad, P C of x and P O of out_grad, writes P M of da once; dx and dW read it.
Numerics: a, dt and act' in fp32, da rounded once to the type of x; db sums da before rounding.
Limits: as the forward; da is a workspace of the size of e.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.activation import activate_backward
from emo_kernels.triton.expand import block_for, pre_activation, tile_of
from emo_kernels.triton.expand_backward_fused import expand_backward_fused, fuses
from emo_kernels.triton.expand_backward_input import expand_backward_input
from emo_kernels.triton.expand_backward_terms import (
    Results,
    Tensors,
    Wants,
    new_partials,
)
from emo_kernels.triton.expand_backward_weight import expand_backward_weight
from emo_kernels.triton.normalize import layer_norm_statistics
from emo_kernels.triton.partials import reduce_partials
from emo_kernels.triton.reduce_tall import reduce_tall, whole_groups


@triton.jit
def skipped_gradient(
    out_grad_ptr,
    out_weight_ptr,
    drop_scale_ptr,
    rows,
    mask_p,
    offs_m,
    mask_m,
    PIXELS,
    M: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """The tile (BLOCK_P, BLOCK_M) of drop Wp^T out_grad in fp32."""
    grad_rows = out_grad_ptr + rows[:, None] * OUT
    acc = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    for o in range(0, OUT, BLOCK_O):
        offs_o = o + tl.arange(0, BLOCK_O)
        mask_o = offs_o < OUT
        grad = tl.load(
            grad_rows + offs_o[None, :], mask=mask_p[:, None] & mask_o[None, :], other=0.0
        )
        weight = tl.load(
            out_weight_ptr + offs_o[:, None].to(tl.int64) * M + offs_m[None, :],
            mask=mask_o[:, None] & mask_m[None, :],
            other=0.0,
        )
        acc = tl.dot(grad, weight, acc, input_precision=PRECISION)
    if drop_scale_ptr is not None:
        drop = tl.load(drop_scale_ptr + rows // PIXELS, mask=mask_p, other=0.0)
        acc *= drop.to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["P", "PIXELS"])
def _expand_bwd_activation_kernel(
    grad_ptr,  # (P, M)
    x_ptr,  # (P, C)
    weight_ptr,  # (M, C / GROUPS), in the type of x
    bias_ptr,  # (M,) or None
    statistics_ptr,  # (2, P) fp32, or None
    norm_weight_ptr,  # (C,) or None
    norm_bias_ptr,  # (C,) or None
    out_grad_ptr,  # (P, O) or None
    out_weight_ptr,  # (O, M) in the type of x, or None
    drop_scale_ptr,  # (N,) or None
    da_ptr,  # (P, M)
    partials_ptr,  # (parts, M) fp32, or None
    P,
    PIXELS,  # of an image
    C: tl.constexpr,
    M: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    rows, mask_p, group, offs_m, mask_m = tile_of(P, M, GROUPS, BLOCK_P, BLOCK_M)
    a = pre_activation(
        x_ptr,
        weight_ptr,
        bias_ptr,
        statistics_ptr,
        norm_weight_ptr,
        norm_bias_ptr,
        rows,
        mask_p,
        P,
        group,
        offs_m,
        mask_m,
        C,
        C // GROUPS,
        NORM,
        PRECISION,
        BLOCK_P,
        BLOCK_M,
        BLOCK_K,
    )
    keep = mask_p[:, None] & mask_m[None, :]
    offs = rows[:, None] * M + offs_m[None, :]
    if out_grad_ptr is not None:
        skipped = skipped_gradient(
            out_grad_ptr,
            out_weight_ptr,
            drop_scale_ptr,
            rows,
            mask_p,
            offs_m,
            mask_m,
            PIXELS,
            M,
            OUT,
            PRECISION,
            BLOCK_P,
            BLOCK_M,
            BLOCK_O,
        )
        grad = tl.load(grad_ptr + offs, mask=keep, other=0.0).to(tl.float32) + skipped
    else:
        grad = tl.load(grad_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    da = activate_backward(grad, a, ACT)
    tl.store(da_ptr + offs, da.to(da_ptr.dtype.element_ty), mask=keep)
    if partials_ptr is not None:
        tiles_m: tl.constexpr = (M // GROUPS + BLOCK_M - 1) // BLOCK_M
        part = tl.program_id(0).to(tl.int64) // (tiles_m * GROUPS)
        da = tl.where(mask_p[:, None], da, 0.0)
        tl.store(partials_ptr + part * M + offs_m, tl.sum(da, axis=0), mask=mask_m)


def _expand_bwd_activation_rule(
    arch: int, *, p: int, k: int, m: int, o: int, itemsize: int
) -> dict[str, int]:
    """Half the forward's tiles for two accumulators: two programs fit an SM by registers."""
    if arch == launch.INTERPRETER:
        rows = {"BLOCK_P": 512, "num_warps": 4, "num_stages": 1}
        return rows | {
            "BLOCK_M": max(min(triton.next_power_of_2(m), 1024), 16),
            "BLOCK_K": max(min(triton.next_power_of_2(k), 128), 16),
            "BLOCK_O": max(min(triton.next_power_of_2(o), 128), 16),
        }
    if itemsize == 4:
        rows = {"BLOCK_P": 64, "num_warps": 8, "num_stages": 2}
        return rows | {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_O": 32}
    block_m = block_for(m, (32, 64, 128), 16)
    return {
        "BLOCK_P": 64 if block_m == 128 else 128,
        "BLOCK_M": block_m,
        "BLOCK_K": block_for(k, (16, 32, 64), 8),
        "BLOCK_O": block_for(o, (16, 32, 64), 8),
        "num_warps": 8 if block_m >= 64 else 4,
        "num_stages": 3,
    }


def _activation_gradient(
    t: Tensors, want_bias: bool, *, norm: str, act: str, groups: int
) -> tuple[Tensor, Tensor | None]:
    """(da, partials (parts, M) of its sums over the pixels, ``None`` unless wanted)."""
    n, c, h, w = t.x.shape
    p, m = n * h * w, t.weight.shape[0]
    o = 0 if t.out_grad is None else t.out_grad.shape[1]
    tiles = launch.tiles(
        "expand_bwd_activation",
        _expand_bwd_activation_rule,
        p=p,
        k=c // groups,
        m=m // groups,
        o=o,
        itemsize=t.x.element_size(),
    )
    da = layout.new_map(t.x, n, m, h, w)
    parts = whole_groups(triton.cdiv(p, tiles["BLOCK_P"]))
    partials = new_partials(want_bias, t.x, parts, m)
    programs = parts * triton.cdiv(m // groups, tiles["BLOCK_M"]) * groups
    with layout.on_device(t.x):
        _expand_bwd_activation_kernel[(programs,)](
            t.grad,
            t.x,
            t.weight,
            t.bias,
            t.statistics,
            t.norm_weight,
            t.norm_bias,
            t.out_grad,
            t.out_weight,
            t.drop_scale,
            da,
            partials,
            p,
            h * w,
            C=c,
            M=m,
            OUT=o,
            GROUPS=groups,
            NORM=norm,
            ACT=act,
            PRECISION=layout.precision(),
            **tiles,
        )
    return da, partials


def _expand_backward_split(
    t: Tensors, wants: Wants, *, norm: str, act: str, groups: int
) -> Results:
    """The gradient in three kernels with da between them."""
    da, db = _activation_gradient(t, wants.bias, norm=norm, act=act, groups=groups)
    dx = dw = sums = None
    if wants.dx or wants.sums:
        behind = norm if t.affine is None else "batch"
        dx, sums = expand_backward_input(da, t, wants, norm=behind, groups=groups)
    if wants.weight:
        dw = expand_backward_weight(da, t, norm=norm, groups=groups)
    return Results(dx, dw, db, sums)


def _no_pixels(
    x: Tensor, parameters: Sequence[Tensor | None], needed: Sequence[bool], batch: bool
) -> list[Tensor]:
    """The gradients of an empty map: empty, and sums of nothing."""
    grads = [torch.empty_like(x)] if needed[0] else []
    wanted = needed[1:3] if batch else needed[1:5]
    grads += [torch.zeros_like(t) for t, n in zip(parameters, wanted) if n and t is not None]
    if batch and needed[3]:
        grads.append(torch.zeros((2, x.shape[1]), dtype=torch.float64, device=x.device))
    return grads


def expand_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    affine: Tensor | None = None,
    out_grad: Tensor | None = None,
    out_weight: Tensor | None = None,
    drop_scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    needed: Sequence[bool],
    norm: str,
    eps: float,
    act: str,
    groups: int = 1,
) -> list[Tensor]:
    """The ``needed`` gradients of :func:`expand`: x, weight, bias, norm_weight, norm_bias.

    Args:
        grad: (N, M, H, W), the gradient at e.
        affine: (4, C) fp32, scale, shift, mean and 1 / std of the training batch norm whose affine
            norm_weight and norm_bias are: then dn, the gradient at norm(x), takes the place of dx,
            and one (2, C) fp64 tensor, (sum dn, sum dn xhat), that of the norm's gradients; it
            comes where ``needed[3]``.
        out_grad: (N, O, H, W), with out_weight (O, M, 1, 1): drop_scale[n] out_weight^T out_grad
            is added to ``grad``.
        drop_scale: (N,).
        residual: (N, C, H, W), added to dx.
    """
    parameters = (weight, bias, norm_weight, norm_bias)
    if grad.numel() == 0:
        return _no_pixels(x, parameters, needed, affine is not None)
    x = layout.pixels(x)
    t = Tensors(
        layout.pixels(grad),
        x,
        layout.operand(weight, x),
        layout.dense(bias),
        layer_norm_statistics(x, eps) if norm == "layer" else None,
        layout.dense(norm_weight),
        layout.dense(norm_bias),
        layout.dense(affine),
        None if out_grad is None else layout.pixels(out_grad),
        None if out_weight is None else layout.operand(out_weight, x),
        layout.dense(drop_scale),
        None if residual is None or affine is not None else layout.pixels(residual),
    )
    wants = Wants(needed[0], needed[1], needed[2], needed[3] or (needed[4] and affine is None))
    if fuses(t, groups):
        results = expand_backward_fused(t, wants, norm=norm, act=act)
    else:
        results = _expand_backward_split(t, wants, norm=norm, act=act, groups=groups)
    grads = [] if results.dx is None else [results.dx]
    if results.weight is not None:
        dw = results.weight.view(-1, *weight.shape)
        grads.append(reduce_partials(dw, out=torch.empty_like(weight)))
    if bias is not None and results.bias is not None:
        grads.append(reduce_tall(results.bias, out=torch.empty_like(bias)))
    return grads + _norm_gradients(results.sums, norm_weight, norm_bias, needed, affine is not None)


def _norm_gradients(
    sums: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    needed: Sequence[bool],
    batch: bool,
) -> list[Tensor]:
    """From the partials (2, parts, C) of sum dn and sum dn v."""
    if sums is None:
        return []
    if batch:
        both = torch.empty((2, sums.shape[2]), dtype=torch.float64, device=sums.device)
        reduce_tall(sums[0], out=both[0])
        reduce_tall(sums[1], out=both[1])
        return [both]
    grads = []
    if needed[3] and norm_weight is not None:
        grads.append(reduce_tall(sums[1], out=torch.empty_like(norm_weight)))
    if needed[4] and norm_bias is not None:
        grads.append(reduce_tall(sums[0], out=torch.empty_like(norm_bias)))
    return grads
