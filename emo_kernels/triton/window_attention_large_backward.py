"""Window attention, backward, for windows that one tile does not hold, up to a whole map.

Computes: as window_attention_backward.py from maps of n, q and k, in three kernels: dq (with each
    row's largest score, sum and rowsum(A dA), in a first walk over the keys), dk, dV.
Tiling: a program owns BLOCK_T queries (dq), keys (dk) or values (dV) of one window and head, and
    walks over the other side of the score matrix, recomputing it block by block.
Traffic: projection C in, 3 C out; each kernel reads its own block once and the other side of the
    window once a block, from L2; 12 bytes a query and head of row statistics.
Numerics: as window_attention_backward.py.
Limits: windows of any size.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import layout
from emo_kernels.triton.launch import tiles
from emo_kernels.triton.window_attention_large import large_rule
from emo_kernels.triton.window_tiles import (
    Windows,
    add_to,
    head_block,
    load_head,
    score_tile,
    softmax_scale,
    token_pixels,
)


@triton.jit
def _value_products(
    v_ptr,
    v_bias_ptr,
    grad_ptr,
    head,
    query_rows,
    query_live,
    key_rows,
    key_live,
    key_inside,
    M: tl.constexpr,
    VALUES: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dA = g V^T of a block of queries and a block of keys."""
    dp = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for v in range(0, VALUES, BLOCK_V):
        offs_v = v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < VALUES
        offs_v += head * VALUES
        values = load_head(
            v_ptr, v_bias_ptr, key_rows, key_live, key_inside, offs_v, mask_v, M, ACT
        )
        at = grad_ptr + query_rows[:, None] * M + offs_v[None, :]
        g = tl.load(at, mask=query_live[:, None] & mask_v[None, :], other=0.0)
        dp = tl.dot(g, tl.trans(values), dp, input_precision=PRECISION)
    return dp


@triton.jit
def _window_attention_large_bwd_query_kernel(
    qk_ptr,  # (P, QK): q in columns [0, C), k from column KEYS on
    qk_bias_ptr,  # (QK,)
    v_ptr,  # (P, M)
    v_bias_ptr,  # (M,)
    grad_ptr,  # (P, M)
    out_ptr,  # (P, OUT): dq in columns [0, C)
    rows_ptr,  # (3, windows, heads, T) fp32: largest score, sum of exponentials, rowsum(A dA)
    H,
    W,
    wh,
    ww,
    n1,
    n2,
    blocks,
    scale,
    factor,
    C: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    QK: tl.constexpr,
    KEYS: tl.constexpr,
    OUT: tl.constexpr,
    ACT: tl.constexpr,
    GRID: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    window, head = pid // blocks, tl.program_id(1).to(tl.int64)
    first_pixel = window // (n1 * n2) * H * W  # of the image
    qk_ptr += first_pixel * QK
    v_ptr += first_pixel * M
    grad_ptr += first_pixel * M
    out_ptr += first_pixel * OUT
    heads: tl.constexpr = C // D
    VALUES: tl.constexpr = M // heads
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_d += head * D
    mine = (pid % blocks).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    my_rows, my_live = token_pixels(window, mine, H, W, wh, ww, n1, n2, GRID, WIDE)
    my_inside = mine < wh * ww
    q = load_head(qk_ptr, qk_bias_ptr, my_rows, my_live, my_inside, offs_d, mask_d, QK, "none")
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    delta = tl.zeros([BLOCK_T], tl.float32)
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for walk in tl.static_range(2):  # what a row needs of all keys; then dq
        if walk == 1:
            delta = delta / total
        for first in range(0, wh * ww, BLOCK_T):
            tokens = first + tl.arange(0, BLOCK_T)
            rows, live = token_pixels(window, tokens, H, W, wh, ww, n1, n2, GRID, WIDE)
            inside = tokens < wh * ww
            k = load_head(
                qk_ptr, qk_bias_ptr, rows, live, inside, offs_d + KEYS, mask_d, QK, "none"
            )
            scores = score_tile(q, k, inside, PRECISION)
            dp = _value_products(
                v_ptr,
                v_bias_ptr,
                grad_ptr,
                head,
                my_rows,
                my_live,
                rows,
                live,
                inside,
                M,
                VALUES,
                ACT,
                PRECISION,
                BLOCK_T,
                BLOCK_V,
            )
            if walk == 0:
                larger = tl.maximum(largest, tl.max(scores, 1))
                p = tl.exp2((scores - larger[:, None]) * scale)
                keep = tl.exp2((largest - larger) * scale)
                total = total * keep + tl.sum(p, 1)
                delta = delta * keep + tl.sum(p * dp, 1)
                largest = larger
            else:
                p = tl.exp2((scores - largest[:, None]) * scale) / total[:, None]
                ds = (p * (dp - delta[:, None])).to(k.dtype)
                dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    at = rows_ptr + (window * heads + head) * (wh * ww) + mine
    plane = tl.num_programs(0).to(tl.int64) // blocks * heads * (wh * ww)
    tl.store(at, largest, mask=my_inside)
    tl.store(at + plane, total, mask=my_inside)
    tl.store(at + 2 * plane, delta, mask=my_inside)
    mask = my_live[:, None] & mask_d[None, :]
    add_to(out_ptr + my_rows[:, None] * OUT + offs_d[None, :], dq * factor, mask, ACCUMULATE)


@triton.jit
def _window_attention_large_bwd_key_kernel(
    qk_ptr,  # (P, QK)
    qk_bias_ptr,  # (QK,)
    v_ptr,  # (P, M)
    v_bias_ptr,  # (M,)
    grad_ptr,  # (P, M)
    out_ptr,  # (P, OUT): dk in columns [KEYS, KEYS + C)
    rows_ptr,  # (3, windows, heads, T) fp32
    H,
    W,
    wh,
    ww,
    n1,
    n2,
    blocks,
    scale,
    factor,
    C: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    QK: tl.constexpr,
    KEYS: tl.constexpr,
    OUT: tl.constexpr,
    ACT: tl.constexpr,
    GRID: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    window, head = pid // blocks, tl.program_id(1).to(tl.int64)
    first_pixel = window // (n1 * n2) * H * W  # of the image
    qk_ptr += first_pixel * QK
    v_ptr += first_pixel * M
    grad_ptr += first_pixel * M
    out_ptr += first_pixel * OUT
    heads: tl.constexpr = C // D
    VALUES: tl.constexpr = M // heads
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_d += head * D
    mine = (pid % blocks).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    my_rows, my_live = token_pixels(window, mine, H, W, wh, ww, n1, n2, GRID, WIDE)
    my_inside = mine < wh * ww
    k = load_head(
        qk_ptr, qk_bias_ptr, my_rows, my_live, my_inside, offs_d + KEYS, mask_d, QK, "none"
    )
    plane = tl.num_programs(0).to(tl.int64) // blocks * heads * (wh * ww)
    dk = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(0, wh * ww, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        rows, live = token_pixels(window, tokens, H, W, wh, ww, n1, n2, GRID, WIDE)
        inside = tokens < wh * ww
        q = load_head(qk_ptr, qk_bias_ptr, rows, live, inside, offs_d, mask_d, QK, "none")
        at = rows_ptr + (window * heads + head) * (wh * ww) + tokens
        largest = tl.load(at, mask=inside, other=0.0)
        total = tl.load(at + plane, mask=inside, other=1.0)
        delta = tl.load(at + 2 * plane, mask=inside, other=0.0)
        scores = score_tile(q, k, my_inside, PRECISION)
        p = tl.exp2((scores - largest[:, None]) * scale) / total[:, None]
        dp = _value_products(
            v_ptr,
            v_bias_ptr,
            grad_ptr,
            head,
            rows,
            live,
            my_rows,
            my_live,
            my_inside,
            M,
            VALUES,
            ACT,
            PRECISION,
            BLOCK_T,
            BLOCK_V,
        )
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    at = out_ptr + my_rows[:, None] * OUT + (KEYS + offs_d)[None, :]
    add_to(at, dk * factor, my_live[:, None] & mask_d[None, :], ACCUMULATE)


@triton.jit
def _window_attention_large_bwd_value_kernel(
    qk_ptr,  # (P, QK)
    qk_bias_ptr,  # (QK,)
    grad_ptr,  # (P, M)
    dv_ptr,  # (P, M)
    padding_ptr,  # (windows, blocks, M) fp32, or None
    rows_ptr,  # (3, windows, heads, T) fp32
    H,
    W,
    wh,
    ww,
    n1,
    n2,
    blocks,
    scale,
    C: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    QK: tl.constexpr,
    KEYS: tl.constexpr,
    GRID: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    window, head = pid // blocks, tl.program_id(1).to(tl.int64)
    first_pixel = window // (n1 * n2) * H * W  # of the image
    qk_ptr += first_pixel * QK
    grad_ptr += first_pixel * M
    dv_ptr += first_pixel * M
    heads: tl.constexpr = C // D
    VALUES: tl.constexpr = M // heads
    offs_v = tl.program_id(2).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < VALUES
    offs_v += head * VALUES
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_d += head * D
    mine = (pid % blocks).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    my_rows, my_live = token_pixels(window, mine, H, W, wh, ww, n1, n2, GRID, WIDE)
    my_inside = mine < wh * ww
    k = load_head(
        qk_ptr, qk_bias_ptr, my_rows, my_live, my_inside, offs_d + KEYS, mask_d, QK, "none"
    )
    plane = tl.num_programs(0).to(tl.int64) // blocks * heads * (wh * ww)
    dv = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for first in range(0, wh * ww, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        rows, live = token_pixels(window, tokens, H, W, wh, ww, n1, n2, GRID, WIDE)
        inside = tokens < wh * ww
        q = load_head(qk_ptr, qk_bias_ptr, rows, live, inside, offs_d, mask_d, QK, "none")
        at = rows_ptr + (window * heads + head) * (wh * ww) + tokens
        largest = tl.load(at, mask=inside, other=0.0)
        total = tl.load(at + plane, mask=inside, other=1.0)
        scores = score_tile(q, k, my_inside, PRECISION)
        p = tl.exp2((scores - largest[:, None]) * scale) / total[:, None]
        at = grad_ptr + rows[:, None] * M + offs_v[None, :]
        g = tl.load(at, mask=live[:, None] & mask_v[None, :], other=0.0)
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, dv, input_precision=PRECISION)
    if padding_ptr is not None:
        padded = tl.sum(tl.where((my_inside & ~my_live)[:, None], dv, 0.0), 0)
        tl.store(padding_ptr + pid * M + offs_v, padded, mask=mask_v)
    at = dv_ptr + my_rows[:, None] * M + offs_v[None, :]
    add_to(at, dv, my_live[:, None] & mask_v[None, :], ACCUMULATE)


def large_backward(
    qk: Tensor,
    qk_bias: Tensor | None,
    values: Tensor,
    v_bias: Tensor | None,
    grad: Tensor,
    dqk: Tensor,
    dv: Tensor,
    windows: Windows,
    *,
    head_dim: int,
    channels: int,
    grid: bool,
    accumulate: bool,
    v_act: str,
) -> Tensor | None:
    """Gradients of one partition, into ``dqk`` and ``dv``, one kernel after the other.

    Args:
        qk: (N, 2C, H, W), or (N, C, H, W) where q = k.
        qk_bias: (2C,), what padding has in its place.
        values: (N, M, H, W); v_bias: (M,), None where no window pads.
        grad: (N, M, H, W).
        dqk: channels as ``qk``; may be ``dv``, where q = k = v: then their sum.
        dv: (N, M, H, W).

    Returns:
        With ``v_bias`` the sums of dv over the padding, (programs, M) in fp32.
    """
    images, m, h, w = grad.shape
    heads = channels // head_dim
    sizes = {"d": head_dim, "v": m // heads, "t": windows.tokens, "itemsize": grad.element_size()}
    parameters = tiles("window_attention_large_bwd", large_rule, p=images * h * w, **sizes)
    blocks = triton.cdiv(windows.tokens, parameters["BLOCK_T"])
    count = images * windows.n1 * windows.n2
    rows = torch.empty((3, count, heads, windows.tokens), dtype=torch.float32, device=grad.device)
    padding = None
    if v_bias is not None:
        padding = torch.empty((count * blocks, m), dtype=torch.float32, device=grad.device)
    shared = windows.arguments(grad, max(qk.shape[1], m)) | {
        "qk_ptr": qk,
        "qk_bias_ptr": qk_bias,
        "grad_ptr": grad,
        "rows_ptr": rows,
        "blocks": blocks,
        "scale": softmax_scale(head_dim),
        "C": channels,
        "M": m,
        "D": head_dim,
        "QK": qk.shape[1],
        "KEYS": qk.shape[1] - channels,
        "GRID": grid,
        "PRECISION": layout.precision(),
        "BLOCK_D": head_block(head_dim),
        **parameters,
    }
    score_gradient = shared | {
        "v_ptr": values,
        "v_bias_ptr": v_bias,
        "out_ptr": dqk,
        "factor": head_dim**-0.5,
        "OUT": dqk.shape[1],
        "ACT": v_act,
    }
    _window_attention_large_bwd_query_kernel[(count * blocks, heads)](
        **score_gradient, ACCUMULATE=accumulate
    )
    _window_attention_large_bwd_key_kernel[(count * blocks, heads)](
        **score_gradient, ACCUMULATE=accumulate or qk.shape[1] == channels
    )
    _window_attention_large_bwd_value_kernel[
        (count * blocks, heads, triton.cdiv(m // heads, parameters["BLOCK_V"]))
    ](**shared, dv_ptr=dv, padding_ptr=padding, ACCUMULATE=accumulate or dqk is dv)
    return padding
