"""Window attention, backward: gradients at q, k and the values, one window and head at a time.

Computes: from g = d out: dA = g V^T, dV = A^T g, dS = A (dA - rowsum(A dA)), dq = dS k / sqrt(D),
    dk = dS^T q / sqrt(D), A recomputed; then the projection, the norm and its parameters in
    window_attention_gradients.py. The K half of d qk_bias is exactly zero: rows of dS sum to zero.
Tiling: a program owns one window of up to 128 tokens and some of its heads; larger windows:
    window_attention_large_backward.py.
Traffic: reads x, g and the values, writes dq, dk and dV: 5 C elements a pixel where the values are
    norm(x), 3 C + 3 M where they are expanded.
Numerics: as the forward; dS and A are rounded to the dtype of x for the tensor cores, dq, dk and dV
    when they are stored. Padding: its keys take part; values there are act(v_bias), whose gradient
    leaves as one partial sum a window.
Limits: as the forward. Same bits on repeat: no atomics.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import layout
from emo_kernels.triton.expand import load_statistics
from emo_kernels.triton.launch import INTERPRETER, tiles
from emo_kernels.triton.window_attention_gradients import Norm
from emo_kernels.triton.window_tiles import (
    Windows,
    add_to,
    head_block,
    load_head,
    normalized,
    queries_and_keys,
    score_tile,
    softmax_scale,
    token_pixels,
    warps_for,
)


@triton.jit
def _window_attention_bwd_kernel(
    x_ptr,  # (P, C)
    v_ptr,  # (P, M), or None: the values are norm(x)
    grad_ptr,  # (P, M)
    dqk_ptr,  # (P, 2C); dq + dk, (P, C), where q = k; None where that goes to dv as well
    dv_ptr,  # (P, M)
    padding_ptr,  # (windows, M) fp32: sums of dv over the padding, or None
    qk_weight_ptr,  # (2C, C)
    qk_bias_ptr,  # (2C,)
    v_bias_ptr,  # (M,), None where no window pads
    statistics_ptr,  # (2, P)
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    P,
    H,
    W,
    wh,
    ww,
    n1,
    n2,
    scale,
    factor,
    C: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    GRID: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HEADS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    GROUPS: tl.constexpr = C // D // HEADS
    window, first_head = pid // GROUPS, (pid % GROUPS).to(tl.int32) * HEADS
    first_pixel = window // (n1 * n2) * H * W  # of the image
    x_ptr += first_pixel * C
    grad_ptr += first_pixel * M
    dv_ptr += first_pixel * M
    if v_ptr is not None:
        v_ptr += first_pixel * M
    if dqk_ptr is not None:
        dqk_ptr += first_pixel * (C if qk_weight_ptr is None else 2 * C)
    if NORM == "layer":
        statistics_ptr += first_pixel
    tokens = tl.arange(0, BLOCK_T)
    rows, live = token_pixels(window, tokens, H, W, wh, ww, n1, n2, GRID, WIDE)
    inside = tokens < wh * ww
    dtype = x_ptr.dtype.element_ty
    mean, rstd = load_statistics(statistics_ptr, rows, live, P, NORM)
    VALUES: tl.constexpr = M // (C // D)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = live[:, None] & mask_d[None, :]
    for head in range(first_head, first_head + HEADS):
        q, k = queries_and_keys(
            x_ptr,
            rows,
            live,
            mean,
            rstd,
            norm_weight_ptr,
            norm_bias_ptr,
            qk_weight_ptr,
            qk_bias_ptr,
            head,
            C,
            D,
            NORM,
            BLOCK_T,
            BLOCK_C,
            BLOCK_D,
            PRECISION,
        )
        scores = score_tile(q, k, inside, PRECISION)
        p = tl.exp2((scores - tl.max(scores, 1)[:, None]) * scale)
        p = p / tl.sum(p, 1)[:, None]
        columns = (head * D + offs_d)[None, :]
        if v_ptr is None:
            g = tl.load(grad_ptr + rows[:, None] * C + columns, mask=mask, other=0.0)
            values = normalized(
                x_ptr,
                rows,
                live,
                mean,
                rstd,
                norm_weight_ptr,
                norm_bias_ptr,
                head * D + offs_d,
                mask_d,
                C,
                NORM,
            ).to(dtype)
            dp = tl.dot(g, tl.trans(values), input_precision=PRECISION)
            dv = tl.dot(tl.trans(p.to(dtype)), g, input_precision=PRECISION)
        else:
            dp = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
            for v in range(0, VALUES, BLOCK_V):
                offs_v = v + tl.arange(0, BLOCK_V)
                mask_v = offs_v < VALUES
                offs_v += head * VALUES
                values = load_head(v_ptr, v_bias_ptr, rows, live, inside, offs_v, mask_v, M, ACT)
                mask_tile = live[:, None] & mask_v[None, :]
                at = rows[:, None] * M + offs_v[None, :]
                g = tl.load(grad_ptr + at, mask=mask_tile, other=0.0)
                dp = tl.dot(g, tl.trans(values), dp, input_precision=PRECISION)
                dv = tl.dot(tl.trans(p.to(dtype)), g, input_precision=PRECISION)
                add_to(dv_ptr + at, dv, mask_tile, ACCUMULATE)
                if padding_ptr is not None:
                    padded = tl.sum(tl.where((inside & ~live)[:, None], dv, 0.0), 0)
                    tl.store(padding_ptr + window * M + offs_v, padded, mask=mask_v)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION) * factor
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * factor
        if qk_weight_ptr is not None:
            at = dqk_ptr + rows[:, None] * (2 * C) + columns
            add_to(at, dq, mask, ACCUMULATE)
            add_to(at + C, dk, mask, ACCUMULATE)
        elif v_ptr is None:
            dv += dq + dk
        else:
            add_to(dqk_ptr + rows[:, None] * C + columns, dq + dk, mask, ACCUMULATE)
        if v_ptr is None:
            add_to(dv_ptr + rows[:, None] * C + columns, dv, mask, ACCUMULATE)


def backward_rule(
    arch: int, *, p: int, c: int, d: int, v: int, t: int, windows: int, itemsize: int
) -> dict[str, int]:
    """Blocks for windows of t tokens, heads of d channels with v value channels each."""
    heads, block_t = c // d, max(16, triton.next_power_of_2(t))
    if arch == INTERPRETER:
        block_c = max(16, triton.next_power_of_2(c))
        return {
            "BLOCK_C": block_c,
            "BLOCK_V": head_block(v),
            "HEADS": heads,
            "num_warps": 4,
            "num_stages": 1,
        }
    narrow = arch < 90 and v > d  # mma.sync holds both operands of dA and dV in registers
    return {
        "BLOCK_C": min(32, head_block(c)),
        "BLOCK_V": min(32 if narrow or block_t == 128 else 64, head_block(v)),
        "HEADS": 1,  # a loop over heads keeps 45 more registers alive
        "num_warps": 8 if narrow and block_t == 64 else warps_for(block_t, d, itemsize),
        "num_stages": 2,
    }


def small_backward(
    x: Tensor,
    values: Tensor | None,
    grad: Tensor,
    dqk: Tensor | None,
    dv: Tensor,
    norm: Norm,
    parameters: dict[str, Tensor | None],
    windows: Windows,
    *,
    head_dim: int,
    grid: bool,
    accumulate: bool,
    v_act: str,
) -> Tensor | None:
    """Gradients of one partition into ``dqk`` and ``dv``; sums of dv over the padding, if asked."""
    n, c, h, w = x.shape
    m, count, heads = dv.shape[1], n * windows.n1 * windows.n2, c // head_dim
    blocks = tiles(
        "window_attention_bwd",
        backward_rule,
        p=n * h * w,
        c=c,
        d=head_dim,
        v=m // heads,
        t=windows.tokens,
        windows=count,
        itemsize=x.element_size(),
    )
    padding = None
    if parameters["v_bias_ptr"] is not None:
        padding = torch.empty((count, m), dtype=torch.float32, device=x.device)
    _window_attention_bwd_kernel[(count * heads // blocks["HEADS"],)](
        x_ptr=x,
        v_ptr=values,
        grad_ptr=grad,
        dqk_ptr=dqk,
        dv_ptr=dv,
        padding_ptr=padding,
        statistics_ptr=norm.statistics,
        norm_weight_ptr=norm.weight,
        norm_bias_ptr=norm.bias,
        **parameters,
        **windows.arguments(x, max(2 * c, m)),
        P=n * h * w,
        scale=softmax_scale(head_dim),
        factor=head_dim**-0.5,
        C=c,
        M=m,
        D=head_dim,
        NORM=norm.kind,
        ACT=v_act,
        GRID=grid,
        ACCUMULATE=accumulate,
        PRECISION=layout.precision(),
        BLOCK_T=max(16, triton.next_power_of_2(windows.tokens)),
        BLOCK_D=head_block(head_dim),
        **blocks,
    )
    return padding
