"""Depthwise convolution with zero padding and no bias."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from emo_kernels.reference.batch_norm import batch_norm_backward, batch_norm_sums
from emo_kernels.reference.gradients import gradients


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


def depthwise_conv2d_statistics(
    x: Tensor,
    weight: Tensor,
    pivot: Tensor | None,
    *,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """The convolution y and its batch-norm sums, ``batch_norm_sums(y, pivot)``."""
    y = depthwise_conv2d(x, weight, stride=stride, padding=padding, dilation=dilation)
    return y, batch_norm_sums(y, pivot)


def depthwise_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    local_grad: Tensor | None = None,
    *,
    needed: Sequence[bool],
    stride: int,
    padding: int,
    dilation: int,
) -> list[Tensor]:
    """Gradients of x and weight, those that are needed.

    Args:
        grad: (N, C, H', W') at y, or, with ``y`` and ``coefficients`` (4, C), behind a batch norm
            of y: then c1 grad + c2 (y - mean) + c3 is the gradient at y.
        local_grad: (N, C, H, W), added to the gradient of x.
    """
    if coefficients is not None and y is not None:
        grad = batch_norm_backward(grad, y, coefficients, None)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, stride=stride, padding=padding, dilation=dilation)

    grads = gradients(convolve, (x, weight), grad, needed)
    if needed[0] and local_grad is not None:
        grads[0] = grads[0] + local_grad
    return grads
