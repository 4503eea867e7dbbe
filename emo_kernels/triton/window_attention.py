"""Window attention, forward: norm, q and k, softmax and the weighted sum in one program.

Computes: n = norm(x), zero at padding; [q; k] = Wqk n + bqk; A = softmax(q k^T / sqrt(D)) in every
    window and head; out = A n, or A act(Wv n + bv) with values from the expand kernel (SPEC.md 1.1,
    reference/window_attention.py). Without Wqk q = k = n. Mode ``both`` adds two partitions.
Tiling: a program owns one window of up to 128 tokens, padded to a power of two, and some of its
    heads, one after the other; the score matrix stays in registers. What does not fit
    (window_tiles.one_tile): window_attention_large.py.
Traffic: x once from memory (the passes over C of the projections hit L1), Wqk from L2 once a
    window, out once: 2 C elements a pixel; with expanded values C + 2 M. A 7 x 7 window of C = 160
    takes 5.0 MFLOP of projection and 3.1 MFLOP of attention on 31 KB: 260 FLOP a byte.
Numerics: fp32 norm, accumulators, softmax (maximum subtracted) and sums; n, q, k and the
    exponentials are rounded to the dtype of x for the tensor cores, the quotient is not.
Limits: fp32, bf16, fp16; head_dim <= 64; values as the expand kernel allows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import layout
from emo_kernels.triton.expand import expand, expand_unsupported
from emo_kernels.triton.launch import INTERPRETER, tiles
from emo_kernels.triton.normalize import row_statistics
from emo_kernels.triton.window_attention_backward import window_attention_backward
from emo_kernels.triton.window_attention_large import large_forward, project
from emo_kernels.triton.window_tiles import (
    GRIDS,
    Windows,
    add_to,
    head_block,
    heads_per_program,
    load_head,
    normalized,
    one_tile,
    queries_and_keys,
    score_tile,
    softmax_scale,
    token_pixels,
    vector,
    warps_for,
)

__all__ = ["window_attention", "window_attention_backward", "window_attention_unsupported"]

LARGEST_HEAD = 64


@triton.jit
def _window_attention_fwd_kernel(
    x_ptr,  # (P, C)
    v_ptr,  # (P, M), or None: the values are norm(x)
    out_ptr,  # (P, M)
    qk_weight_ptr,  # (2C, C)
    qk_bias_ptr,  # (2C,)
    v_bias_ptr,  # (M,), None where no window pads
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    H,
    W,
    wh,
    ww,
    n1,
    n2,
    eps,
    scale,
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
    out_ptr += first_pixel * M
    if v_ptr is not None:
        v_ptr += first_pixel * M
    tokens = tl.arange(0, BLOCK_T)
    rows, live = token_pixels(window, tokens, H, W, wh, ww, n1, n2, GRID, WIDE)
    inside = tokens < wh * ww
    dtype = x_ptr.dtype.element_ty
    if NORM == "layer":
        mean, rstd = row_statistics(x_ptr, rows, live, C, eps, BLOCK_C)
    else:
        mean = tl.zeros([BLOCK_T], tl.float32)
        rstd = mean
    VALUES: tl.constexpr = M // (C // D)  # value channels of a head
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
        total = tl.sum(p, 1)
        for v in range(0, VALUES, BLOCK_V):
            offs_v = v + tl.arange(0, BLOCK_V)
            mask_v = offs_v < VALUES
            offs_v += head * VALUES
            if v_ptr is None:
                values = normalized(
                    x_ptr,
                    rows,
                    live,
                    mean,
                    rstd,
                    norm_weight_ptr,
                    norm_bias_ptr,
                    offs_v,
                    mask_v,
                    C,
                    NORM,
                ).to(dtype)
            else:
                values = load_head(v_ptr, v_bias_ptr, rows, live, inside, offs_v, mask_v, M, ACT)
            out = tl.dot(p.to(dtype), values, input_precision=PRECISION) / total[:, None]
            at = out_ptr + rows[:, None] * M + offs_v[None, :]
            mask = live[:, None] & mask_v[None, :]
            add_to(at, out, mask, ACCUMULATE)


def forward_rule(
    arch: int, *, p: int, c: int, d: int, v: int, t: int, windows: int, itemsize: int
) -> dict[str, int]:
    """Blocks for windows of t tokens, heads of d channels with v value channels each."""
    heads, block_t = c // d, max(16, triton.next_power_of_2(t))
    block_v = min(64, head_block(v))
    if arch == INTERPRETER:
        block_c = max(16, triton.next_power_of_2(c))
        shared = {"BLOCK_V": head_block(v), "HEADS": heads}
        return {"BLOCK_C": block_c, **shared, "num_warps": 4, "num_stages": 1}
    block_c = min(32, head_block(c))
    return {
        "BLOCK_C": block_c,
        "BLOCK_V": block_v,
        "HEADS": heads_per_program(windows, heads),
        "num_warps": warps_for(block_t, d, itemsize),
        "num_stages": 2,
    }


def window_attention_unsupported(
    x: Tensor,
    qk_weight: Tensor | None = None,
    qk_bias: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    head_dim: int,
    window_size: int = 7,
    window_mode: str = "grid",
    norm: str = "none",
    eps: float = 1e-6,
    v_act: str = "none",
    v_groups: int = 1,
) -> str | None:
    """Why the kernels do not take these arguments, or ``None``."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"float32, bfloat16 and float16 only, got {x.dtype}"
    if head_dim > LARGEST_HEAD:
        return f"heads of at most {LARGEST_HEAD} channels, got {head_dim}"
    if v_weight is None:
        return None
    return expand_unsupported(
        x,
        v_weight,
        v_bias,
        norm_weight,
        norm_bias,
        norm=norm,
        eps=eps,
        act=v_act,
        groups=v_groups,
    )


def _forward(
    x: Tensor,
    values: Tensor | None,
    out: Tensor,
    qk_weight: Tensor | None,
    qk_bias: Tensor | None,
    v_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    windows: Windows,
    grid: bool,
    accumulate: bool,
    *,
    head_dim: int,
    norm: str,
    eps: float,
    v_act: str,
) -> None:
    """Launch the kernel for windows of one tile."""
    n, c, h, w = x.shape
    m, count, heads = out.shape[1], n * windows.n1 * windows.n2, c // head_dim
    block_t = max(16, triton.next_power_of_2(windows.tokens))
    blocks = tiles(
        "window_attention_fwd",
        forward_rule,
        p=n * h * w,
        c=c,
        d=head_dim,
        v=m // heads,
        t=windows.tokens,
        windows=count,
        itemsize=x.element_size(),
    )
    _window_attention_fwd_kernel[(count * heads // blocks["HEADS"],)](
        x_ptr=x,
        v_ptr=values,
        out_ptr=out,
        qk_weight_ptr=qk_weight,
        qk_bias_ptr=qk_bias,
        v_bias_ptr=v_bias,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        **windows.arguments(x, max(c, m)),
        eps=eps,
        scale=softmax_scale(head_dim),
        C=c,
        M=m,
        D=head_dim,
        NORM=norm,
        ACT=v_act,
        GRID=grid,
        ACCUMULATE=accumulate,
        PRECISION=layout.precision(),
        BLOCK_T=block_t,
        BLOCK_D=head_block(head_dim),
        **blocks,
    )


def window_attention(
    x: Tensor,
    qk_weight: Tensor | None = None,
    qk_bias: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    head_dim: int,
    window_size: int = 7,
    window_mode: str = "grid",
    norm: str = "none",
    eps: float = 1e-6,
    v_act: str = "none",
    v_groups: int = 1,
) -> Tensor:
    """As :func:`emo_kernels.reference.window_attention`."""
    x = layout.pixels(x)
    n, c, h, w = x.shape
    out = layout.new_map(x, n, c if v_weight is None else v_weight.shape[0], h, w)
    if out.numel() == 0:
        return out
    windows = Windows.of(x, window_size)
    values = None
    if v_weight is not None:
        values = expand(
            x,
            v_weight,
            v_bias,
            norm_weight,
            norm_bias,
            norm=norm,
            eps=eps,
            act=v_act,
            groups=v_groups,
        )
    qk_matrix = None if qk_weight is None else layout.operand(qk_weight, x)
    biases = vector(qk_bias), vector(v_bias) if windows.pads(x) else None
    norms = vector(norm_weight), vector(norm_bias)
    sizes: dict[str, Any] = {"head_dim": head_dim, "v_act": v_act}
    with layout.on_device(x):
        if one_tile(x, windows, head_dim, out.shape[1] * head_dim // c):
            given = (x, values, out, qk_matrix, *biases, *norms, windows)
            for second, grid in enumerate(GRIDS[window_mode]):
                _forward(*given, grid, second > 0, norm=norm, eps=eps, **sizes)
        else:
            of_map = project(x, qk_matrix, biases[0], *norms, head_dim=head_dim, norm=norm, eps=eps)
            values = of_map[0] if values is None else values
            projected = (of_map[1], biases[0], values, biases[1], out, windows)
            for second, grid in enumerate(GRIDS[window_mode]):
                large_forward(*projected, grid, second > 0, channels=c, **sizes)
    return out
