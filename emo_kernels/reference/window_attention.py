"""Self-attention inside windows of a map: strided (grid) windows, contiguous ones, or both.

A map is padded with zeros at the bottom and at the right to (n1 wh, n2 ww) pixels, so that it
falls into n1 n2 windows of wh x ww. Element (a, b) of window (i, j) is the pixel

    grid:   row a n1 + i, column b n2 + j     every window spans the whole map
    block:  row i wh + a, column j ww + b     ordinary tiles

There is no mask: padded pixels are keys like any other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from emo_kernels.reference.expand import activate, normalize


def window_shape(height: int, width: int, window_size: int) -> tuple[int, int]:
    """Rows and columns of one window; a size <= 0 makes the whole map one window."""
    return (height, width) if window_size <= 0 else (window_size, window_size)


def window_modes(window_mode: str) -> tuple[str, ...]:
    """The partitions whose attention results are summed."""
    if window_mode == "both":
        return ("grid", "block")
    if window_mode in ("grid", "block"):
        return (window_mode,)
    raise ValueError(
        f"window_attention: window_mode must be 'grid', 'block' or 'both', got {window_mode!r}"
    )


def pad_to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Zeros at the bottom and right: (N, C, H, W) to (N, C, n1 wh, n2 ww)."""
    height, width = x.shape[-2:]
    wh, ww = window
    rows, cols = (height + wh - 1) // wh * wh, (width + ww - 1) // ww * ww
    # Padding by zero pixels is not skipped: a branch here would tie an exported graph to maps
    # that windows divide.
    return F.pad(x, (0, cols - width, 0, rows - height))


def partition(x: Tensor, heads: int, window: tuple[int, int], mode: str) -> Tensor:
    """(N, heads D, n1 wh, n2 ww) to (N n1 n2, heads, wh ww, D).

    Channels are head-major; windows are ordered by image, i, j; tokens by a, b.
    """
    n, c, height, width = x.shape
    wh, ww = window
    n1, n2, d = height // wh, width // ww, c // heads
    if mode == "grid":
        windows = x.reshape(n, heads, d, wh, n1, ww, n2).permute(0, 4, 6, 1, 3, 5, 2)
    else:
        windows = x.reshape(n, heads, d, n1, wh, n2, ww).permute(0, 3, 5, 1, 4, 6, 2)
    return windows.reshape(n * n1 * n2, heads, wh * ww, d)


def merge(tokens: Tensor, size: tuple[int, int, int], window: tuple[int, int], mode: str) -> Tensor:
    """Undo :func:`partition`; ``size`` is (N, n1 wh, n2 ww). Strides are channels_last."""
    n, height, width = size
    _, heads, _, d = tokens.shape
    wh, ww = window
    n1, n2 = height // wh, width // ww
    windows = tokens.reshape(n, n1, n2, heads, wh, ww, d)
    order = (0, 4, 1, 5, 2, 3, 6) if mode == "grid" else (0, 1, 4, 2, 5, 3, 6)
    pixels = windows.permute(order).reshape(n, height, width, heads * d)
    return pixels.permute(0, 3, 1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    head_dim: int,
    window: tuple[int, int],
    window_mode: str,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in every window of padded maps; ``both`` sums two results.

    Args:
        q, k: (N, C, Hp, Wp) with Hp, Wp multiples of ``window``.
        v: (N, M, Hp, Wp); its channels fall into C / head_dim equal groups, one for each head.
        dropout: applied to the attention maps.

    Returns:
        (N, M, Hp, Wp).
    """
    heads = q.shape[1] // head_dim
    size = (q.shape[0], q.shape[2], q.shape[3])
    results = []
    for mode in window_modes(window_mode):
        qw, kw, vw = (partition(t, heads, window, mode) for t in (q, k, v))
        attention = ((qw @ kw.transpose(-2, -1)) * head_dim**-0.5).softmax(dim=-1)
        if dropout is not None:
            attention = dropout(attention)
        results.append(merge(attention @ vw, size, window, mode))
    return results[0] if len(results) == 1 else results[0] + results[1]


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
    """Attention inside windows of h = norm(x), padded after the norm.

    [q; k] = Wqk h + bqk, A = softmax(q k^T / sqrt(head_dim)), result A h, or A act(Wv h + bv).

    Args:
        x: (N, C, H, W).
        qk_weight: (2C, C, 1, 1), channels [0, C) are q, head-major; None: q = k = h.
        qk_bias: (2C,).
        v_weight: (M, C / v_groups, 1, 1); None: attention over h itself.
        v_bias: (M,).
        norm_weight, norm_bias: (C,).
        head_dim: channels of one head; divides C. The number of heads divides M.
        window_size: side in pixels; <= 0: the whole map is one window.
        window_mode: ``grid``, ``block``, or ``both`` (the two results are summed).
        norm, eps: as in :func:`emo_kernels.reference.expand`.
        v_act, v_groups: activation and groups of the v convolution.

    Returns:
        (N, M, H, W), or (N, C, H, W) without ``v_weight``.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 8, 5, 6)
        >>> window_attention(x, head_dim=4, window_size=3).shape
        torch.Size([1, 8, 5, 6])
    """
    height, width = x.shape[-2:]
    window = window_shape(height, width, window_size)
    h = normalize(x, norm_weight, norm_bias, norm=norm, eps=eps)
    h = pad_to_windows(h, window)
    q, k = (h, h) if qk_weight is None else F.conv2d(h, qk_weight, qk_bias).chunk(2, dim=1)
    v = h
    if v_weight is not None:
        v = activate(F.conv2d(h, v_weight, v_bias, groups=v_groups), v_act)
    z = attend(q, k, v, head_dim=head_dim, window=window, window_mode=window_mode)
    return z[:, :, :height, :width]
