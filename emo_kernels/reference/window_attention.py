"""Self-attention inside windows of a map: strided (grid) windows, contiguous ones, or both.

A map is padded with zeros at the bottom and at the right to (n1 wh, n2 ww) pixels, so that it
falls into n1 n2 windows of wh x ww. Element (a, b) of window (i, j) is the pixel

    grid:   row a n1 + i, column b n2 + j     every window spans the whole map
    block:  row i wh + a, column j ww + b     ordinary tiles

There is no mask: padded pixels are keys like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from emo_kernels.reference.expand import normalize
from emo_kernels.reference.gradients import channel_sums, gradients
from emo_kernels.spec import activate


class Windows(NamedTuple):
    """How a map falls into windows: n1 x n2 windows of wh x ww pixels."""

    wh: int
    ww: int
    n1: int
    n2: int

    @staticmethod
    def of(x: Tensor, window_size: int) -> Windows:
        """The windows of an unpadded (N, C, H, W) map; a size <= 0 makes the whole map one."""
        height, width = x.shape[-2:]
        if window_size <= 0:
            return Windows(height, width, 1, 1)
        n1, n2 = (height + window_size - 1) // window_size, (width + window_size - 1) // window_size
        return Windows(window_size, window_size, n1, n2)


def window_modes(window_mode: str) -> tuple[str, ...]:
    """The partitions whose attention results are summed."""
    if window_mode == "both":
        return ("grid", "block")
    if window_mode in ("grid", "block"):
        return (window_mode,)
    raise ValueError(
        f"window_attention: window_mode must be 'grid', 'block' or 'both', got {window_mode!r}"
    )


def pad_to_windows(x: Tensor, windows: Windows) -> Tensor:
    """Zeros at the bottom and right: (N, C, H, W) to (N, C, n1 wh, n2 ww)."""
    height, width = x.shape[-2:]
    wh, ww, n1, n2 = windows
    # Padding by zero pixels is not skipped: a branch here would tie an exported graph to maps
    # that windows divide.
    return F.pad(x, (0, n2 * ww - width, 0, n1 * wh - height))


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Without the padding, channels_last: strides that do not tell whether there was any."""
    return _copy(x[:, :, :height, :width].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def partition(x: Tensor, heads: int, windows: Windows, mode: str) -> Tensor:
    """(N, heads D, n1 wh, n2 ww) to (N n1 n2 heads, wh ww, D).

    Channels are head-major; rows are ordered by image, i, j, head; tokens by a, b.
    """
    n, c = x.shape[:2]
    wh, ww, n1, n2 = windows
    d = c // heads
    pixels = x.permute(0, 2, 3, 1).contiguous()
    if mode == "grid":
        split = _view(pixels, (n, wh, n1, ww, n2, heads, d), 4).permute(0, 2, 4, 5, 1, 3, 6)
    else:
        split = _view(pixels, (n, n1, wh, n2, ww, heads, d), 3).permute(0, 1, 3, 5, 2, 4, 6)
    return _view(_copy(split), (n * n1 * n2 * heads, wh * ww, d), 1)


def merge(tokens: Tensor, n: int, heads: int, windows: Windows, mode: str) -> Tensor:
    """Undo :func:`partition`: (N n1 n2 heads, wh ww, D) to (N, heads D, n1 wh, n2 ww)."""
    wh, ww, n1, n2 = windows
    d = tokens.shape[2]
    split = _view(tokens, (n, n1, n2, heads, wh, ww, d), 1)
    order = (0, 4, 1, 5, 2, 3, 6) if mode == "grid" else (0, 1, 4, 2, 5, 3, 6)
    pixels = _view(_copy(split.permute(order)), (n, n1 * wh, n2 * ww, heads * d), 1)
    return pixels.permute(0, 3, 1, 2)


def _view(x: Tensor, shape: tuple[int, ...], split: int) -> Tensor:
    """``x.view(shape)`` of a contiguous tensor by way of ``prod(shape[:split])`` rows.

    A plain reshape of symbolic sizes asks which of them divide which, and so ties a compiled
    graph to the answers; this way, with the right ``split``, it need not ask.
    """
    return x.view(-1).view(prod(shape[:split]), prod(shape[split:])).view(shape)


def _copy(x: Tensor) -> Tensor:
    """The tensor laid out anew in the order of its dimensions."""
    return x.clone(memory_format=torch.contiguous_format)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    head_dim: int,
    windows: Windows,
    window_mode: str,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in every window of padded maps; ``both`` sums two results.

    Args:
        q, k: (N, C, n1 wh, n2 ww).
        v: (N, M, n1 wh, n2 ww); channels fall into C / head_dim equal groups, one for each head.
        dropout: applied to the attention maps, (N n1 n2 heads, wh ww, wh ww).

    Returns:
        (N, M, n1 wh, n2 ww).
    """
    n, heads = q.shape[0], q.shape[1] // head_dim
    results = []
    for mode in window_modes(window_mode):
        qw, kw, vw = (partition(t, heads, windows, mode) for t in (q, k, v))
        attention = ((qw @ kw.transpose(1, 2)) * head_dim**-0.5).softmax(dim=-1)
        if dropout is not None:
            attention = dropout(attention)
        results.append(merge(attention @ vw, n, heads, windows, mode))
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
    windows = Windows.of(x, window_size)
    h = normalize(x, norm_weight, norm_bias, norm=norm, eps=eps)
    h = pad_to_windows(h, windows)
    q, k = (h, h) if qk_weight is None else F.conv2d(h, qk_weight, qk_bias).chunk(2, dim=1)
    v = h
    if v_weight is not None:
        v = activate(F.conv2d(h, v_weight, v_bias, groups=v_groups), v_act)
    z = attend(q, k, v, head_dim=head_dim, windows=windows, window_mode=window_mode)
    return crop(z, height, width)


def window_attention_with_maps(
    x: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`window_attention`, and q and k of its pixels, (N, 2C, H, W): for the gradient."""
    norms = (norm_weight, norm_bias)
    z = window_attention(x, qk_weight, qk_bias, v_weight, v_bias, *norms, **options)
    h = normalize(x, *norms, norm=options["norm"], eps=options["eps"])
    return z, F.conv2d(h, qk_weight, qk_bias)


def window_attention_backward(
    grad: Tensor,
    x: Tensor,
    qk_weight: Tensor | None = None,
    qk_bias: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    affine: Tensor | None = None,
    residual: Tensor | None = None,
    qk: Tensor | None = None,
    *,
    needed: Sequence[bool],
    **options: Any,
) -> list[Tensor]:
    """Gradients of the seven tensors of :func:`window_attention`, those that are needed.

    ``affine`` and ``residual`` are as in :func:`emo_kernels.reference.expand_backward`; qk is what
    :func:`window_attention_with_maps` gave, for a backend that reads it, or None.
    """
    if affine is None:
        tensors = (x, qk_weight, qk_bias, v_weight, v_bias, norm_weight, norm_bias)
        grads = gradients(lambda *t: window_attention(*t, **options), tensors, grad, needed)
        if needed[0] and residual is not None:
            grads[0] = grads[0] + residual
        return grads
    h = normalize(x, affine[0], affine[1], norm="affine", eps=0.0)
    options["norm"] = "none"
    inner = (h, qk_weight, qk_bias, v_weight, v_bias)
    wanted = (True, *needed[1:5])
    grads = gradients(lambda *t: window_attention(*t, **options), inner, grad, wanted)
    sums = [channel_sums(grads[0], x, affine)] if needed[5] else []
    return [*grads[not needed[0] :], *sums]
