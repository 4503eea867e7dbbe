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
    norm: str,
    eps: float,
    act: str,
    groups: int,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """The depthwise convolution of e = act(W norm(x) + b), zeros around e.

    Args:
        x: (N, C, H, W).
        weight, bias, norm_weight, norm_bias, norm, eps, act, groups: of :func:`expand`.
        dw_weight: (M, 1, K, K).
        stride, padding, dilation: of the convolution.

    Returns:
        (N, M, H', W').

    Example:
        >>> import torch
        >>> x, weight, dw_weight = (torch.ones(1, c, 3, 3) for c in (2, 2, 1))
        >>> tensors = (x, weight[:, :, :1, :1], None, None, None, dw_weight)
        >>> expansion = {"norm": "none", "eps": 1e-6, "act": "relu", "groups": 1}
        >>> y = expand_depthwise(*tensors, **expansion, stride=1, padding=1, dilation=1)
        >>> y[0, 0, 1, 1]
        tensor(18.)
    """
    tensors = (x, weight, bias, norm_weight, norm_bias)
    e = expand(*tensors, norm=norm, eps=eps, act=act, groups=groups)
    return depthwise_conv2d(e, dw_weight, stride=stride, padding=padding, dilation=dilation)


def expand_depthwise_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dw_weight: Tensor,
    pivot: Tensor | None,
    *,
    norm: str,
    eps: float,
    act: str,
    groups: int,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """:func:`expand_depthwise` and its batch-norm sums, ``batch_norm_sums(y, pivot)``."""
    tensors = (x, weight, bias, norm_weight, norm_bias, dw_weight)
    y = expand_depthwise(
        *tensors,
        norm=norm,
        eps=eps,
        act=act,
        groups=groups,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    return y, batch_norm_sums(y, pivot)
