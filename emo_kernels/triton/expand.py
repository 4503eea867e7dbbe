"""Expand: normalise, widen every pixel from C to M channels, activate.

Computes: e = act(W n + b), n = norm(x) (SPEC, steps 2 and 3a): a GEMM (P, C) x (C, M) over the
    pixels, with the norm in its loads and bias and activation behind it.
Tiling: a program owns BLOCK_P pixels and BLOCK_M output channels and walks over C in steps of
    BLOCK_K; programs of one pixel tile are neighbours, so x comes from memory once and then from
    L2. Grouped: the output tiles of each group walk over that group's channels.
Traffic: reads P C, writes P M elements; 2 C M / (2 (C + M)) flop a byte in bf16, 64 for 160 to 640
    channels: bound by memory. Layer norm reads x once more and 8 bytes a pixel of statistics.
Numerics: norm, accumulation, bias and activation in fp32; n is rounded to the type of x for the
    tensor core, e once. fp32 maps multiply in fp32 unless torch allows TF32.
Limits: fp32, bf16, fp16; the weight is taken in the type of x, the other parameters in any.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.activation import activate
from emo_kernels.triton.normalize import layer_norm_statistics, load_channels, normalize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def load_statistics(statistics_ptr, rows, mask_p, P, NORM: tl.constexpr):
    """Mean and rstd of the layer norm of the rows; (0, 0), unused, for the other norms."""
    if NORM == "layer":
        mean = tl.load(statistics_ptr + rows, mask=mask_p, other=0.0)
        rstd = tl.load(statistics_ptr + P + rows, mask=mask_p, other=0.0)
    else:
        mean = tl.zeros(rows.shape, dtype=tl.float32)
        rstd = mean
    return mean, rstd


@triton.jit
def load_normalized(
    x_rows,  # (BLOCK_P, 1) pointers to the rows
    mask_p,
    offs_c,
    mask_c,
    mean,
    rstd,
    norm_weight_ptr,
    norm_bias_ptr,
    NORM: tl.constexpr,
):
    """The tile (BLOCK_P, BLOCK_C) of n in the type of x; zero outside the masks."""
    keep = mask_p[:, None] & mask_c[None, :]
    x = tl.load(x_rows + offs_c[None, :], mask=keep, other=0.0)
    if NORM == "none":
        n = x
    else:
        weight = load_channels(norm_weight_ptr, offs_c, mask_c, 1.0)
        bias = load_channels(norm_bias_ptr, offs_c, mask_c, 0.0)
        n = normalize(x.to(tl.float32), mean, rstd, weight, bias, NORM)
        n = tl.where(keep, n, 0.0).to(x.dtype)
    return n


@triton.jit
def pre_activation(
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
    C: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile (BLOCK_P, BLOCK_M) of a = W n + b in fp32; K = C / groups."""
    mean, rstd = load_statistics(statistics_ptr, rows, mask_p, P, NORM)
    x_rows = x_ptr + rows[:, None] * C
    weight_columns = weight_ptr + offs_m[None, :].to(tl.int64) * K
    acc = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        n = load_normalized(
            x_rows,
            mask_p,
            group * K + offs_k,
            mask_k,
            mean,
            rstd,
            norm_weight_ptr,
            norm_bias_ptr,
            NORM,
        )
        keep = mask_k[:, None] & mask_m[None, :]
        weight = tl.load(weight_columns + offs_k[:, None], mask=keep, other=0.0)
        acc = tl.dot(n, weight, acc, input_precision=PRECISION)
    return acc + load_channels(bias_ptr, offs_m, mask_m, 0.0)[None, :]


@triton.jit
def tile_of(P, M: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows, row mask, group, channels and channel mask of a program; channels vary fastest."""
    tiles_m: tl.constexpr = (M // GROUPS + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0).to(tl.int64)
    pid_m = (pid % (tiles_m * GROUPS)).to(tl.int32)
    rows = (pid // (tiles_m * GROUPS)) * BLOCK_P + tl.arange(0, BLOCK_P)
    group = pid_m // tiles_m
    within = (pid_m % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, rows < P, group, group * (M // GROUPS) + within, within < M // GROUPS


@triton.jit(do_not_specialize=["P"])
def _expand_fwd_kernel(
    x_ptr,  # (P, C)
    weight_ptr,  # (M, C / GROUPS), in the type of x
    bias_ptr,  # (M,) or None
    statistics_ptr,  # (2, P) fp32, or None
    norm_weight_ptr,  # (C,) or None
    norm_bias_ptr,  # (C,) or None
    out_ptr,  # (P, M)
    P,
    C: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    out = activate(a, ACT).to(out_ptr.dtype.element_ty)
    keep = mask_p[:, None] & mask_m[None, :]
    tl.store(out_ptr + rows[:, None] * M + offs_m[None, :], out, mask=keep)


def block_for(size: int, choices: tuple[int, ...], step: int) -> int:
    """The block that covers ``size`` with the least padding, a step costing ``step`` elements."""
    return min(choices, key=lambda b: (triton.cdiv(size, b) * (b + step), -b))


def _expand_fwd_rule(arch: int, *, p: int, k: int, m: int, itemsize: int) -> dict[str, int]:
    """128 x 128 and 128 x 64 tiles; half of that in fp32, whose dot needs registers for both."""
    if arch == launch.INTERPRETER:
        block_m, block_k = min(triton.next_power_of_2(m), 1024), min(triton.next_power_of_2(k), 128)
        return {
            "BLOCK_P": 512,
            "BLOCK_M": max(block_m, 16),
            "BLOCK_K": max(block_k, 16),
            "num_warps": 4,
            "num_stages": 1,
        }
    if itemsize == 4:
        return {"BLOCK_P": 64, "BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    block_m = block_for(m, (32, 64, 128), 16)
    return {
        "BLOCK_P": 128,
        "BLOCK_M": block_m,
        "BLOCK_K": block_for(k, (16, 32, 64), 8),
        "num_warps": 8 if block_m == 128 else 4,
        "num_stages": 3,
    }


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm: str,
    eps: float,
    act: str,
    groups: int = 1,
) -> Tensor:
    """act(W norm(x) + b), as ``emo_kernels.ops.expand`` defines it: (N, M, H, W), channels_last."""
    n, c, h, w = x.shape
    m, p = weight.shape[0], n * h * w
    out = layout.new_map(x, n, m, h, w)
    if out.numel() == 0:
        return out
    x = layout.pixels(x)
    statistics = layer_norm_statistics(x, eps) if norm == "layer" else None
    tiles = launch.tiles(
        "expand_fwd", _expand_fwd_rule, p=p, k=c // groups, m=m // groups, itemsize=x.element_size()
    )
    programs = triton.cdiv(p, tiles["BLOCK_P"]) * triton.cdiv(m // groups, tiles["BLOCK_M"])
    with layout.on_device(x):
        _expand_fwd_kernel[(programs * groups,)](
            x,
            layout.operand(weight, x),
            None if bias is None else bias.contiguous(),
            statistics,
            None if norm_weight is None else norm_weight.contiguous(),
            None if norm_bias is None else norm_bias.contiguous(),
            out,
            p,
            C=c,
            M=m,
            GROUPS=groups,
            NORM=norm,
            ACT=act,
            PRECISION=layout.precision(),
            **tiles,
        )
    return out


def expand_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    **options: Any,
) -> str | None:
    """Why :func:`expand` and its gradient cannot take these arguments; None if they can."""
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16 maps, got {x.dtype}"
    return None
