"""Expansion and depthwise convolution in one kernel: torch ops over the backends that have one.

Semantics: :mod:`emo_kernels.reference.expand_depthwise`. A block's training step takes them, that
of the forward pass where nobody else wants the map between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emo_kernels.ops.registration import define_kernel, empty_gradients, empty_map
from emo_kernels.spec import conv_output_size

_TENSORS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor dw_weight"
)
_NORM_AT = 3
_OPTIONS = "str norm, float eps, str act, int groups, int stride, int padding, int dilation"


def _convolved(
    x: Tensor,
    weight: Tensor,
    *rest: Any,
    stride: int,
    padding: int,
    dilation: int,
    **_: Any,
) -> Tensor:
    n, _c, h, w = x.shape
    step = (rest[3].shape[-1], stride, padding, dilation)
    return empty_map(x, (n, weight.shape[0], *(conv_output_size(side, *step) for side in (h, w))))


def _statistics(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    y = _convolved(x, weight, *rest, **options)
    return y, x.new_empty((2, weight.shape[0]), dtype=torch.float64)


def _with_maps(
    x: Tensor, weight: Tensor, *rest: Any, statistics: bool, slope: bool, **options: Any
) -> list[Tensor]:
    n, _c, h, w = x.shape
    y = _convolved(x, weight, *rest, **options)
    sums = [x.new_empty((2, weight.shape[0]), dtype=torch.float64)] if statistics else []
    return [y, *sums, *(empty_map(x, (n, weight.shape[0], h, w)) for _ in range(1 + slope))]


def _gradients(
    grad: Tensor, *tensors: Tensor | None, needed: Sequence[bool], **_: Any
) -> list[Tensor]:
    *_extras, affine, _residual = tensors
    return empty_gradients(tensors[:6], needed, affine, _NORM_AT)


forward = define_kernel("expand_depthwise", _TENSORS, _OPTIONS, "Tensor", _convolved)
statistics = define_kernel(
    "expand_depthwise_statistics",
    f"{_TENSORS}, Tensor? pivot",
    _OPTIONS,
    "(Tensor, Tensor)",
    _statistics,
)
with_maps = define_kernel(
    "expand_depthwise_with_maps",
    f"{_TENSORS}, Tensor? pivot",
    f"bool statistics, bool slope, {_OPTIONS}",
    "Tensor[]",
    _with_maps,
)
backward = define_kernel(
    "expand_depthwise_backward",
    f"Tensor grad, {_TENSORS}, Tensor? y, Tensor? coefficients, Tensor? local_grad, Tensor? e, "
    "Tensor? slope, Tensor? affine, Tensor? residual",
    f"bool[] needed, {_OPTIONS}",
    "Tensor[]",
    _gradients,
)
