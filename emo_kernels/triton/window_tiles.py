"""What the kernels of window attention share: where tokens lie, norm(x) of a tile, q and k of it.

A map is padded at the bottom and right to n1 wh x n2 ww pixels. Token (a, b) of window (i, j) is
the pixel (a n1 + i, b n2 + j) of a grid, (i wh + a, j ww + b) among blocks. A token that is padding
is a key and a query like any other, and its norm(x) is zero.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton.activation import activate
from emo_kernels.triton.launch import interpreting
from emo_kernels.triton.normalize import load_channels, normalize


class Windows(NamedTuple):
    """How a map falls into windows: n1 x n2 windows of wh x ww pixels in every image."""

    wh: int
    ww: int
    n1: int
    n2: int

    @staticmethod
    def of(x: Tensor, window_size: int) -> Windows:
        """The windows of a (N, C, H, W) map; a size <= 0 makes the whole map one."""
        h, w = x.shape[-2:]
        if window_size <= 0:
            return Windows(h, w, 1, 1)
        return Windows(window_size, window_size, -(-h // window_size), -(-w // window_size))

    @property
    def tokens(self) -> int:
        """Pixels of a window."""
        return self.wh * self.ww

    def pads(self, x: Tensor) -> bool:
        """Whether some tokens of a map are padding."""
        return x.shape[-2:] != (self.n1 * self.wh, self.n2 * self.ww)

    def arguments(self, x: Tensor, channels: int) -> dict[str, int]:
        """What :func:`token_pixels` asks for, as a kernel's keyword arguments.

        ``channels`` is the most that a map of this call has.
        """
        h, w = x.shape[2:]
        return {"H": h, "W": w, **self._asdict(), "WIDE": h * w * channels >= 2**31}


GRIDS = {"grid": (True,), "block": (False,), "both": (True, False)}


def head_block(head_dim: int) -> int:
    """Columns of a tile that holds one head: a power of two that a dot accepts."""
    return max(16, triton.next_power_of_2(head_dim))


def softmax_scale(head_dim: int) -> float:
    """exp(score / sqrt(head_dim)) is exp2(score * scale)."""
    return math.log2(math.e) * head_dim**-0.5


def one_tile(x: Tensor, windows: Windows, head_dim: int, values: int) -> bool:
    """Whether the score matrix of a window fits into registers, with heads of ``values`` channels.

    fp32 operands of a dot live in registers too, where 16-bit ones come from shared memory.
    """
    if x.element_size() == 2 or interpreting():
        return windows.tokens <= (128 if head_dim <= 32 and values <= 64 else 64)
    return windows.tokens <= 64 and max(head_dim, values) <= 32


def heads_per_program(windows: int, heads: int) -> int:
    """Heads that share the statistics and cached rows of a window; fewer where windows are few."""
    wanted = max(1, heads * windows // 528)  # 528 programs fill 132 SMs four times
    return max(h for h in range(1, min(heads, wanted) + 1) if heads % h == 0)


def warps_for(block_t: int, head_dim: int, itemsize: int) -> int:
    """Warps for a window in one tile; heads that no vector access fits need registers for more."""
    return 8 if block_t == 128 or (block_t == 64 and (itemsize == 4 or head_dim % 4)) else 4


def vector(values: Tensor | None) -> Tensor | None:
    """A bias or scale with dense elements."""
    return None if values is None else values.contiguous()


@triton.jit
def token_pixels(window, tokens, H, W, wh, ww, n1, n2, GRID: tl.constexpr, WIDE: tl.constexpr):
    """Pixels of an image that hold tokens of a window, and which tokens are no padding.

    The index is of 32 bits unless an image has 2^31 elements (``WIDE``): that is half the
    registers of an address, whose image is found in 64 bits.
    """
    within = (window % (n1 * n2)).to(tl.int32)
    i, j = within // n2, within % n2
    a, b = tokens // ww, tokens % ww
    if GRID:
        row, column = a * n1 + i, b * n2 + j
    else:
        row, column = i * wh + a, j * ww + b
    live = (tokens < wh * ww) & (row < H) & (column < W)
    if WIDE:
        row = row.to(tl.int64)
    return row * W + column, live


@triton.jit
def normalized(
    x_ptr,
    rows,
    live,
    mean,
    rstd,
    norm_weight_ptr,
    norm_bias_ptr,
    offs_c,
    mask_c,
    C: tl.constexpr,
    NORM: tl.constexpr,
):
    """norm(x) at some rows and columns, in fp32; zero where there is nothing."""
    mask = live[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + rows[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM != "none":
        weight = load_channels(norm_weight_ptr, offs_c, mask_c, 1.0)
        bias = load_channels(norm_bias_ptr, offs_c, mask_c, 0.0)
        x = tl.where(mask, normalize(x, mean, rstd, weight, bias, NORM), 0.0)
    return x


@triton.jit
def add_to(ptr, value, mask, ACCUMULATE: tl.constexpr):
    """Store a tile of fp32, added to what is there if ``ACCUMULATE``; rounded once."""
    if ACCUMULATE:
        value += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_head(
    ptr,  # (P, STRIDE)
    bias_ptr,  # (STRIDE,)
    rows,
    live,
    inside,
    offs_c,
    mask_c,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
):
    """Columns of a map at tokens; ACT(bias) at tokens that are padding, zero behind the window."""
    mask = live[:, None] & mask_c[None, :]
    tile = tl.load(ptr + rows[:, None] * STRIDE + offs_c[None, :], mask=mask, other=0.0)
    if bias_ptr is not None:
        fill = activate(load_channels(bias_ptr, offs_c, mask_c, 0.0), ACT).to(tile.dtype)
        tile = tl.where((inside & ~live)[:, None], fill[None, :], tile)
    return tile


@triton.jit
def queries_and_keys(
    x_ptr,
    rows,
    live,
    mean,
    rstd,
    norm_weight_ptr,
    norm_bias_ptr,
    qk_weight_ptr,  # (2C, C), or None: q = k = norm(x)
    qk_bias_ptr,  # (2C,)
    head,
    C: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q and k (BLOCK_T, BLOCK_D) of one head, in the dtype of x; columns from D on are zero."""
    dtype = x_ptr.dtype.element_ty
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_q = head * D + offs_d
    if qk_weight_ptr is None:
        q = normalized(
            x_ptr, rows, live, mean, rstd, norm_weight_ptr, norm_bias_ptr, offs_q, mask_d, C, NORM
        )
        k = q
    else:
        q = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        k = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
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
            ).to(dtype)
            weight = qk_weight_ptr + offs_q[None, :] * C + offs_c[:, None]
            mask = mask_c[:, None] & mask_d[None, :]
            weight_q = tl.load(weight, mask=mask, other=0.0).to(dtype)
            q = tl.dot(n, weight_q, q, input_precision=PRECISION)
            weight_k = tl.load(weight + C * C, mask=mask, other=0.0).to(dtype)
            k = tl.dot(n, weight_k, k, input_precision=PRECISION)
        q += load_channels(qk_bias_ptr, offs_q, mask_d, 0.0)[None, :]
        k += load_channels(qk_bias_ptr, C + offs_q, mask_d, 0.0)[None, :]
    return q.to(dtype), k.to(dtype)


@triton.jit
def score_tile(q, k, inside, PRECISION: tl.constexpr):
    """q k^T, not scaled; -inf at keys behind the window."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return tl.where(inside[None, :], scores, float("-inf"))
