"""Expansion and depthwise convolution in a row: what one kernel may do without the map between."""

from __future__ import annotations

from torch import Tensor

from emo_kernels.reference.batch_norm import batch_norm_sums
from emo_kernels.reference.depthwise_conv2d import depthwise_conv2d
from emo_kernels.reference.expand import expand


def expand_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dw_weight: Tensor,
    *,
    act: str,
    stride: int,
    padding: int,
) -> Tensor:
    """The convolution of e = act(W n + b), n = norm_weight[c] x + norm_bias[c], zeros around e.

    Args:
        x: (N, C, H, W).
        weight: (M, C, 1, 1).
        bias: (M,).
        norm_weight, norm_bias: (C,); absent: 1 and 0.
        dw_weight: (M, 1, K, K).
        act: ``none``, ``relu``, ``gelu``, ``silu``.
        stride, padding: of the convolution.

    Returns:
        (N, M, H', W').

    Example:
        >>> import torch
        >>> x, weight, dw_weight = (torch.ones(1, c, 3, 3) for c in (2, 2, 1))
        >>> tensors = (x, weight[:, :, :1, :1], None, None, None, dw_weight)
        >>> expand_depthwise(*tensors, act="relu", stride=1, padding=1)[0, 0, 1, 1]
        tensor(18.)
    """
    e = expand(x, weight, bias, norm_weight, norm_bias, norm="affine", act=act)
    return depthwise_conv2d(e, dw_weight, stride=stride, padding=padding)


def expand_depthwise_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dw_weight: Tensor,
    pivot: Tensor | None,
    *,
    act: str,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor]:
    """:func:`expand_depthwise` and its batch-norm sums, ``batch_norm_sums(y, pivot)``."""
    tensors = (x, weight, bias, norm_weight, norm_bias, dw_weight)
    y = expand_depthwise(*tensors, act=act, stride=stride, padding=padding)
    return y, batch_norm_sums(y, pivot)
