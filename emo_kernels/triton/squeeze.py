"""Squeeze: the channel means that squeeze-excite takes of an image, and their gradient.

Computes: means[n, m] = mean over pixels of silu(z), z = scale[m] y + shift[m]; backward,
    dz += grad[n, m] silu'(z) / HW and the batch norm's sums of dz and dz yhat; SPEC 1.
Tiling: a program owns BLOCK_C channels of a range of one image's pixels, BLOCK_P at a time.
Traffic: reads y once for 5 instructions an element; backward, reads y and dz, writes dz.
Numerics: fp32 in a program, fp64 between programs; the sums are of dz as it is stored.
Limits: no fp64 maps; any N, M and map size.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.activation import silu, silu_grad
from emo_kernels.triton.partials import reduce_partials


@triton.jit
def _squeeze_kernel(
    y_ptr,
    scale_ptr,
    shift_ptr,
    partials_ptr,  # (SPLITS, N, C)
    N,
    HW,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    image, split = pid // SPLITS, pid % SPLITS
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in range(split * BLOCK_P, HW, SPLITS * BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < HW)[:, None] & mask_c[None, :]
        at = (image * HW + offs_p)[:, None] * C + offs_c[None, :]
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        acc += tl.where(mask, silu(scale * y + shift), 0.0)
    out = tl.sum(acc, axis=0) / HW
    tl.store(partials_ptr + (split * N + image) * C + offs_c, out, mask=mask_c)


@triton.jit
def _squeeze_bwd_kernel(
    grad_ptr,  # (N, C)
    y_ptr,
    affine_ptr,  # (4, C): scale, shift, mean, 1 / standard deviation
    dz_ptr,
    out_ptr,
    partials_ptr,  # (N SPLITS, 2, C)
    HW,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    image, split = pid // SPLITS, pid % SPLITS
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    scale = tl.load(affine_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
    shift = tl.load(affine_ptr + C + offs_c, mask=mask_c, other=0.0)[None, :]
    mean = tl.load(affine_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)[None, :]
    invstd = tl.load(affine_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)[None, :]
    grad = tl.load(grad_ptr + image * C + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    grad = (grad / HW)[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    products = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in range(split * BLOCK_P, HW, SPLITS * BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < HW)[:, None] & mask_c[None, :]
        at = (image * HW + offs_p)[:, None] * C + offs_c[None, :]
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dz = tl.load(dz_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dz = (dz + grad * silu_grad(scale * y + shift)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, dz, mask=mask)
        dz = tl.where(mask, dz.to(tl.float32), 0.0)
        sums += dz
        products += tl.where(mask, dz * ((y - mean) * invstd), 0.0)
    at = pid * 2 * C + offs_c
    tl.store(partials_ptr + at, tl.sum(sums, axis=0), mask=mask_c)
    tl.store(partials_ptr + at + C, tl.sum(products, axis=0), mask=mask_c)


def squeeze_rule(arch: int, *, n: int, hw: int, m: int) -> dict[str, int]:
    """Enough programs for 132 SMs where there are few images."""
    if arch == launch.INTERPRETER:
        block_p, block_c = min(triton.next_power_of_2(hw), 512), triton.next_power_of_2(m)
        return {"BLOCK_P": block_p, "BLOCK_C": block_c, "SPLITS": 1, "num_warps": 4}
    block_c = min(max(triton.next_power_of_2(m), 16), 64)
    splits = min(triton.cdiv(hw, 64), max(1, 512 // max(n, 1)))
    return {"BLOCK_P": 64, "BLOCK_C": block_c, "SPLITS": splits, "num_warps": 4}


def squeeze(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The operator of :func:`emo_kernels.reference.squeeze` on Triton."""
    n, m, h, w = y.shape
    tiles = launch.tiles("squeeze", squeeze_rule, n=n, hw=h * w, m=m)
    partials = scale.new_empty((tiles["SPLITS"], n, m), dtype=torch.float32)
    if n == 0:
        return scale.new_empty((n, m))
    with layout.on_device(y):
        _squeeze_kernel[(n * tiles["SPLITS"], triton.cdiv(m, tiles["BLOCK_C"]))](
            layout.pixels(y),
            scale.contiguous(),
            shift.contiguous(),
            partials,
            n,
            h * w,
            C=m,
            **tiles,
        )
    return reduce_partials(partials, scale.dtype)


def squeeze_backward(grad: Tensor, y: Tensor, affine: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """The operator of :func:`emo_kernels.reference.squeeze_backward` on Triton."""
    n, m, h, w = y.shape
    tiles = launch.tiles("squeeze_bwd", squeeze_rule, n=n, hw=h * w, m=m)
    out = layout.new_map(dz, n, m, h, w)
    if n == 0:
        return out, affine.new_zeros((2, m), dtype=torch.float64)
    partials = affine.new_empty((n * tiles["SPLITS"], 2, m), dtype=torch.float32)
    with layout.on_device(y):
        _squeeze_bwd_kernel[(n * tiles["SPLITS"], triton.cdiv(m, tiles["BLOCK_C"]))](
            grad.contiguous(),
            layout.pixels(y),
            affine.contiguous(),
            layout.pixels(dz),
            out,
            partials,
            h * w,
            C=m,
            **tiles,
        )
    return out, reduce_partials(partials, torch.float64)
