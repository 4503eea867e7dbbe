"""Dense convolution, batch norm, activation; and what a training step makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from emo_kernels.reference.batch_norm import (
    batch_norm,
    batch_norm_activate_grad,
    batch_norm_backward,
    batch_norm_sums,
)
from emo_kernels.reference.expand import activate
from emo_kernels.reference.gradients import gradients


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int,
    dilation: int = 1,
    eps: float = 1e-6,
    act: str = "none",
    batch_statistics: bool = False,
) -> Tensor:
    """act(BN(W * x + b)); no norm without statistics, unless those are the batch's.

    Args:
        x: (N, C, H, W).
        weight: (O, C, K, K).
        bias, norm_weight, norm_bias, norm_mean, norm_var: (O,).
        stride, padding, dilation: in pixels, the same for rows and columns.
        batch_statistics: normalise by the mean and variance of this batch.

    Returns:
        (N, O, H', W').

    Example:
        >>> import torch
        >>> conv_norm_act(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 3, 3), padding=1).max()
        tensor(27.)
    """
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    if batch_statistics:
        y = batch_norm(y, None, None, norm_weight, norm_bias, eps)
    elif norm_mean is not None:
        y = batch_norm(y, norm_mean, norm_var, norm_weight, norm_bias, eps)
    return activate(y, act)


def conv_norm_act_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pivot: Tensor | None,
    *,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """The convolution y = W * x + b and its batch-norm sums, ``batch_norm_sums(y, pivot)``."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    return y, batch_norm_sums(y, pivot)


def conv_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    y: Tensor | None = None,
    norm: Tensor | None = None,
    coefficients: Tensor | None = None,
    *,
    needed: Sequence[bool],
    act: str = "none",
    **options: Any,
) -> list[Tensor]:
    """Gradients of the seven tensors of the operator, those that are needed.

    Args:
        grad: (N, O, H', W').
        y, norm, coefficients: (N, O, H', W'), (4, O), (4, O) of a step whose norm is
            differentiated apart: c1 dz + c2 (y - mean) + c3 is the gradient at y, dz behind the
            norm. Then x, weight and bias may be needed.
    """
    if coefficients is None or norm is None or y is None:
        tensors = (x, weight, bias, norm_weight, norm_bias, norm_mean, norm_var)
        return gradients(lambda *t: conv_norm_act(*t, act=act, **options), tensors, grad, needed)
    dz = batch_norm_activate_grad(grad, y, norm, act)
    dy = batch_norm_backward(dz, y, coefficients, None)
    options.pop("eps")
    return gradients(lambda *t: conv_norm_act(*t, **options), (x, weight, bias), dy, needed[:3])
