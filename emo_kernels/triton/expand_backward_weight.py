"""Gradient of an expansion's weight.

Computes: dW = da^T n per group, n = norm(x) recomputed in the loads.
Tiling: BLOCK_M x BLOCK_C of dW a program in registers, over its share of the pixels in steps of
    BLOCK_P; as many shares as fill the GPU.
Traffic: reads P M of da once a channel tile (one, up to 256 channels) and P C of x once for every
    BLOCK_M of M, mostly from L2; writes shares * M C fp32.
Numerics: n rounded to the type of x as in the forward; fp32 accumulation, shares added in order.
Limits: as the forward.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.expand import block_for, load_normalized, load_statistics
from emo_kernels.triton.expand_backward_terms import Tensors

MULTIPROCESSORS = 132  # of an H200; fixed, so that every GPU adds in the same order


@triton.jit(do_not_specialize=["P", "steps"])
def _expand_bwd_weight_kernel(
    da_ptr,  # (P, M)
    x_ptr,  # (P, C)
    statistics_ptr,  # (2, P) fp32, or None
    norm_weight_ptr,  # (C,) or None
    norm_bias_ptr,  # (C,) or None
    partials_ptr,  # (shares, M, C / GROUPS) fp32
    P,
    steps,  # of BLOCK_P pixels in a share
    C: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    CG: tl.constexpr = C // GROUPS
    MG: tl.constexpr = M // GROUPS
    tiles_c: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    tiles_m: tl.constexpr = (MG + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0).to(tl.int64)
    share = pid // (tiles_c * tiles_m * GROUPS)
    tile = (pid % (tiles_c * tiles_m * GROUPS)).to(tl.int32)
    group = tile // (tiles_c * tiles_m)
    within_m = (tile // tiles_c) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    within_c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = within_m < MG, within_c < CG
    offs_m, offs_c = group * MG + within_m, group * CG + within_c

    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
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
            NORM,
        )
        da = tl.load(
            da_ptr + rows[:, None] * M + offs_m[None, :],
            mask=mask_p[:, None] & mask_m[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(da), n, acc, input_precision=PRECISION)
    out = partials_ptr + (share * M + offs_m[:, None]) * CG + within_c[None, :]
    tl.store(out, acc, mask=mask_m[:, None] & mask_c[None, :])


def _expand_bwd_weight_rule(arch: int, *, p: int, c: int, m: int, itemsize: int) -> dict[str, int]:
    """Few, wide tiles: each channel tile reads da anew, each row tile x."""
    if arch == launch.INTERPRETER:
        block_m = max(min(triton.next_power_of_2(m), 1024), 16)
        block_c = max(min(triton.next_power_of_2(c), 512), 16)
        blocks = {"BLOCK_P": 256, "BLOCK_M": block_m, "BLOCK_C": block_c}
        return blocks | {"SHARES": 2, "num_warps": 4, "num_stages": 1}
    if itemsize == 4:
        block_m, block_c, block_p = 64, 64 if c > 32 else 32, 16
    else:
        block_m = 64 if m <= 64 else 128
        block_c = block_for(c, (32, 64, 128, 256), 96)
        block_p = 32 if block_c == 256 else 64
    tiles = triton.cdiv(m, block_m) * triton.cdiv(c, block_c)
    resident = min(max(32768 // (block_m * block_c), 1), 4)  # programs an SM, by registers
    shares = max(MULTIPROCESSORS * resident // tiles, 1)
    return {
        "BLOCK_P": block_p,
        "BLOCK_M": block_m,
        "BLOCK_C": block_c,
        "SHARES": shares,
        "num_warps": 8 if itemsize == 4 or block_m * block_c > 4096 else 4,
        "num_stages": 2 if itemsize == 4 else 3,
    }


def expand_backward_weight(da: Tensor, t: Tensors, *, norm: str, groups: int) -> Tensor:
    """Partials (shares, M, C / groups) of dW; ``da`` (N, M, H, W) has dense pixels."""
    n, c, h, w = t.x.shape
    p, m = n * h * w, da.shape[1]
    tiles = launch.tiles(
        "expand_bwd_weight",
        _expand_bwd_weight_rule,
        p=p,
        c=c // groups,
        m=m // groups,
        itemsize=t.x.element_size(),
    )
    blocks = {name: value for name, value in tiles.items() if name != "SHARES"}
    steps = triton.cdiv(triton.cdiv(p, blocks["BLOCK_P"]), tiles["SHARES"])
    shares = triton.cdiv(triton.cdiv(p, blocks["BLOCK_P"]), steps)
    partials = torch.empty((shares, m, c // groups), dtype=torch.float32, device=t.x.device)
    programs = triton.cdiv(m // groups, blocks["BLOCK_M"])
    programs *= triton.cdiv(c // groups, blocks["BLOCK_C"]) * groups
    with layout.on_device(t.x):
        _expand_bwd_weight_kernel[(shares * programs,)](
            da,
            t.x,
            t.statistics,
            t.norm_weight,
            t.norm_bias,
            partials,
            p,
            steps,
            C=c,
            M=m,
            GROUPS=groups,
            NORM=norm,
            PRECISION=layout.precision(),
            **blocks,
        )
    return partials
