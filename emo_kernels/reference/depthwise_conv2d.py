"""Depthwise convolution with zero padding and no bias."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def depthwise_conv2d(
    x: Tensor, weight: Tensor, *, stride: int = 1, padding: int, dilation: int = 1
) -> Tensor:
    """One K x K filter per channel: y[c] = w[c] * x[c] (cross-correlation, zeros outside).

    Args:
        x: (N, C, H, W).
        weight: (C, 1, K, K).
        stride, padding, dilation: in pixels, the same for rows and columns.

    Returns:
        (N, C, H', W') with H' = (H + 2 padding - dilation (K - 1) - 1) // stride + 1.

    Example:
        >>> import torch
        >>> x = torch.arange(9.0).reshape(1, 1, 3, 3)
        >>> depthwise_conv2d(x, torch.ones(1, 1, 3, 3), padding=1)[0, 0, 1, 1]
        tensor(36.)
    """
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=weight.shape[0])
