"""Window attention, forward, for windows that one tile does not hold, up to a whole map.

Computes: as window_attention.py, in two steps: a map of [q; k] (and of n = norm(x), the values, if
    they are not expanded), then attention with the softmax taken block by block of keys.
Tiling: step 1: BLOCK_T pixels of the map, head after head. Step 2: a program owns BLOCK_T queries
    of one window and head and walks over all keys of the window; queries and keys that are padding
    come from the biases.
Traffic: step 1 reads C and writes 3 C elements a pixel; step 2 reads C and writes C, and reads the
    keys and values of a window once for each block of its queries, from L2.
Numerics: as window_attention.py; the running maximum and sum are fp32.
Limits: as window_attention.py, windows of any size.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import layout
from emo_kernels.triton.launch import INTERPRETER, tiles
from emo_kernels.triton.normalize import row_statistics
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
def _window_attention_project_kernel(
    x_ptr,  # (P, C)
    n_ptr,  # (P, C), or None
    qk_ptr,  # (P, 2C), or None
    qk_weight_ptr,  # (2C, C)
    qk_bias_ptr,  # (2C,)
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    P,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < P
    if NORM == "layer":
        mean, rstd = row_statistics(x_ptr, rows, live, C, eps, BLOCK_C)
    else:
        mean = tl.zeros([BLOCK_T], tl.float32)
        rstd = mean
    if n_ptr is not None:
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            n = normalized(
                x_ptr,
                rows,
                live,
                mean,
                rstd,
                norm_weight_ptr,
                norm_bias_ptr,
                offs_c,
                mask_c,
                C,
                NORM,
            )
            at = n_ptr + rows[:, None] * C + offs_c[None, :]
            tl.store(at, n.to(n_ptr.dtype.element_ty), mask=live[:, None] & mask_c[None, :])
    if qk_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        mask = live[:, None] & (offs_d < D)[None, :]
        for head in range(0, C // D):
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
            at = qk_ptr + rows[:, None] * (2 * C) + (head * D + offs_d)[None, :]
            tl.store(at, q, mask=mask)
            tl.store(at + C, k, mask=mask)


@triton.jit
def _window_attention_large_fwd_kernel(
    qk_ptr,  # (P, QK): q in columns [0, C), k from column KEYS on
    qk_bias_ptr,  # (QK,)
    v_ptr,  # (P, M)
    v_bias_ptr,  # (M,)
    out_ptr,  # (P, M)
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
    out_ptr += first_pixel * M
    VALUES: tl.constexpr = M // (C // D)
    offs_v = tl.program_id(2).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < VALUES
    offs_v += head * VALUES
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_d += head * D

    mine = (pid % blocks).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    my_rows, my_live = token_pixels(window, mine, H, W, wh, ww, n1, n2, GRID, WIDE)
    my_inside = mine < wh * ww
    q = load_head(qk_ptr, qk_bias_ptr, my_rows, my_live, my_inside, offs_d, mask_d, QK, "none")
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for first in range(0, wh * ww, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        rows, live = token_pixels(window, tokens, H, W, wh, ww, n1, n2, GRID, WIDE)
        inside = tokens < wh * ww
        k = load_head(qk_ptr, qk_bias_ptr, rows, live, inside, offs_d + KEYS, mask_d, QK, "none")
        v = load_head(v_ptr, v_bias_ptr, rows, live, inside, offs_v, mask_v, M, ACT)
        scores = score_tile(q, k, inside, PRECISION)
        larger = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2((scores - larger[:, None]) * scale)
        keep = tl.exp2((largest - larger) * scale)
        total = total * keep + tl.sum(p, 1)
        acc = acc * keep[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        largest = larger
    out = acc / total[:, None]
    at = out_ptr + my_rows[:, None] * M + offs_v[None, :]
    mask = my_live[:, None] & mask_v[None, :]
    add_to(at, out, mask, ACCUMULATE)


def _project_rule(arch: int, *, p: int, c: int, d: int, itemsize: int) -> dict[str, int]:
    """Blocks of pixels and of the channels that a projection sums."""
    if arch == INTERPRETER:
        block_c = max(16, triton.next_power_of_2(c))
        return {"BLOCK_T": 1024, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 1}
    return {
        "BLOCK_T": 64,
        "BLOCK_C": min(64 if itemsize == 2 else 32, head_block(c)),
        "num_warps": 4 if itemsize == 2 else 8,
        "num_stages": 2,
    }


def project(
    x: Tensor,
    qk_weight: Tensor | None,
    qk_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    head_dim: int,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(n, [q; k]) as maps of C and 2C channels; without ``qk_weight`` the second is n as well."""
    images, c, h, w = x.shape
    n = x if norm == "none" else layout.new_map(x, images, c, h, w)
    qk = n if qk_weight is None else layout.new_map(x, images, 2 * c, h, w)
    p = images * h * w
    blocks = tiles(
        "window_attention_project",
        _project_rule,
        p=p,
        c=c,
        d=head_dim,
        itemsize=x.element_size(),
    )
    if n is x and qk is x:
        return n, qk
    _window_attention_project_kernel[(triton.cdiv(p, blocks["BLOCK_T"]),)](
        x_ptr=x,
        n_ptr=None if n is x else n,
        qk_ptr=None if qk_weight is None else qk,
        qk_weight_ptr=qk_weight,
        qk_bias_ptr=qk_bias,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        P=p,
        eps=eps,
        C=c,
        D=head_dim,
        NORM=norm,
        PRECISION=layout.precision(),
        BLOCK_D=head_block(head_dim),
        **blocks,
    )
    return n, qk


def large_rule(arch: int, *, p: int, d: int, v: int, t: int, itemsize: int) -> dict[str, int]:
    """Blocks of tokens and of value channels; fp32 operands of a dot need registers."""
    if arch == INTERPRETER:
        block_t = min(256, triton.next_power_of_2(t))
        return {"BLOCK_T": block_t, "BLOCK_V": head_block(v), "num_warps": 4, "num_stages": 1}
    return {
        "BLOCK_T": 64 if itemsize == 2 else 16,
        "BLOCK_V": min(64 if itemsize == 2 else 32, head_block(v)),
        "num_warps": 8 if d > 32 else warps_for(64, d, itemsize),
        "num_stages": 2 if itemsize == 2 else 1,
    }


def large_forward(
    qk: Tensor,
    qk_bias: Tensor | None,
    values: Tensor,
    v_bias: Tensor | None,
    out: Tensor,
    windows: Windows,
    grid: bool,
    accumulate: bool,
    *,
    head_dim: int,
    channels: int,
    v_act: str,
) -> None:
    """The attention of one partition.

    Args:
        qk: (N, 2C, H, W), or (N, C, H, W) where q = k.
        qk_bias: (2C,), what padding has in its place.
        values: (N, M, H, W); v_bias: (M,), None where no window pads.
        out: (N, M, H, W).
    """
    images, m, h, w = out.shape
    heads = channels // head_dim
    sizes = {"d": head_dim, "v": m // heads, "t": windows.tokens, "itemsize": out.element_size()}
    parameters = tiles("window_attention_large_fwd", large_rule, p=images * h * w, **sizes)
    blocks = triton.cdiv(windows.tokens, parameters["BLOCK_T"])
    value_blocks = triton.cdiv(m // heads, parameters["BLOCK_V"])
    count = images * windows.n1 * windows.n2
    _window_attention_large_fwd_kernel[(count * blocks, heads, value_blocks)](
        qk_ptr=qk,
        qk_bias_ptr=qk_bias,
        v_ptr=values,
        v_bias_ptr=v_bias,
        out_ptr=out,
        **windows.arguments(out, max(qk.shape[1], m)),
        blocks=blocks,
        scale=softmax_scale(head_dim),
        C=channels,
        M=m,
        D=head_dim,
        QK=qk.shape[1],
        KEYS=qk.shape[1] - channels,
        ACT=v_act,
        GRID=grid,
        ACCUMULATE=accumulate,
        PRECISION=layout.precision(),
        BLOCK_D=head_block(head_dim),
        **parameters,
    )
