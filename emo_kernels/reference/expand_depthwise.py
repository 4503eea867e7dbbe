"""Expansion and depthwise convolution in a row: what one kernel may do without the map between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emo_kernels.reference.batch_norm import batch_norm_sums
from emo_kernels.reference.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_backward
from emo_kernels.reference.expand import expand, expand_backward
from emo_kernels.reference.gradients import gradients
from emo_kernels.spec import activate


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


def expand_depthwise_statistics(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`expand_depthwise` and its batch-norm sums around the last tensor, or None."""
    *operands, pivot = tensors
    y = expand_depthwise(*operands, **options)
    return y, batch_norm_sums(y, pivot)


def expand_depthwise_with_maps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dw_weight: Tensor,
    pivot: Tensor | None,
    *,
    statistics: bool,
    slope: bool,
    norm: str,
    eps: float,
    act: str,
    groups: int,
    stride: int,
    padding: int,
    dilation: int,
) -> list[Tensor]:
    """y, its sums if ``statistics``, e, and its slope if ``slope``: for the gradient to read."""
    tensors = (x, weight, bias, norm_weight, norm_bias)
    a = expand(*tensors, norm=norm, eps=eps, act="none", groups=groups)
    e, ones = activate(a, act), torch.ones_like(a)
    y = depthwise_conv2d(e, dw_weight, stride=stride, padding=padding, dilation=dilation)
    sums = [batch_norm_sums(y, pivot)] if statistics else []
    return [y, *sums, e, *gradients(lambda t: activate(t, act), (a,), ones, (slope,))]


def expand_depthwise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dw_weight: Tensor,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    local_grad: Tensor | None = None,
    e: Tensor | None = None,
    slope: Tensor | None = None,
    affine: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    needed: Sequence[bool],
    norm: str,
    eps: float,
    act: str,
    groups: int,
    stride: int,
    padding: int,
    dilation: int,
) -> list[Tensor]:
    """Gradients of (x, weight, bias, norm_weight, norm_bias, dw_weight), those that are needed.

    Args:
        grad, y, coefficients, local_grad: of :func:`depthwise_conv2d_backward`, which gives the
            gradient at e.
        e, slope: what :func:`expand_depthwise_with_maps` gave, for a backend that reads them; or
            None.
        affine, residual: of :func:`expand_backward`.
    """
    tensors = (x, weight, bias, norm_weight, norm_bias)
    options: dict[str, Any] = {"norm": norm, "eps": eps, "act": act, "groups": groups}
    step: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    e = expand(*tensors, **options)
    arguments = (grad, e, dw_weight, y, coefficients, local_grad)
    de, *dw = depthwise_conv2d_backward(*arguments, needed=(True, needed[5]), **step)
    grads = expand_backward(de, *tensors, affine, residual=residual, needed=needed[:5], **options)
    return [*grads, *dw]
