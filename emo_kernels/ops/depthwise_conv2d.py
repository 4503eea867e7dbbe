"""Depthwise convolution: the operator to copy when adding one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_kernels.ops import checks
from emo_kernels.ops.registration import Operator, define_kernel, empty_map
from emo_kernels.spec import conv_output_size, conv_padding


def _output_shape(
    x: Tensor, weight: Tensor, *, stride: int, padding: int, dilation: int
) -> tuple[int, ...]:
    n, c, h, w = x.shape
    k = weight.shape[-1]
    return (n, c, *(conv_output_size(side, k, stride, padding, dilation) for side in (h, w)))


_operator = Operator(
    "depthwise_conv2d",
    tensors="Tensor x, Tensor weight",
    options="int stride, int padding, int dilation",
    shape=_output_shape,
    extras="Tensor? y, Tensor? coefficients, Tensor? local_grad",
)
forward, backward = _operator.forward, _operator.backward_op


def _statistics(
    x: Tensor, weight: Tensor, pivot: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    y = empty_map(x, _output_shape(x, weight, **options))
    return y, x.new_empty((2, x.shape[1]), dtype=torch.float64)


statistics = define_kernel(
    "depthwise_conv2d_statistics",
    "Tensor x, Tensor weight, Tensor? pivot",
    "int stride, int padding, int dilation",
    "(Tensor, Tensor)",
    _statistics,
)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Convolve every channel with its own K x K kernel (step 4 of the block, before its norm).

    y[n, c, i, j] = sum_ab weight[c, 0, a, b] * x[n, c, i*stride + a*dilation - padding,
    j*stride + b*dilation - padding], with zeros outside the map.

    Args:
        x: (N, C, H, W), floating point, any strides; channels_last is the fast layout.
        weight: (C, 1, K, K), dtype and device of x.
        stride: step of the output grid in input pixels, >= 1.
        padding: zero pixels on each side; ``None`` is the published ceil((K - stride) / 2).
        dilation: step between taps in input pixels, >= 1.
        backend: who runs it; ``None`` chooses the best that can.

    Returns:
        (N, C, H', W'), H' = (H + 2*padding - dilation*(K - 1) - 1) // stride + 1.

    Raises:
        ValueError: an argument is wrong, or the kernel does not fit the padded map.
        NotImplementedError: the backend asked for cannot run this call.

    Example:
        >>> import torch
        >>> depthwise_conv2d(torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3))[0, 0, 0]
        tensor([4., 6., 6., 4.])
    """
    checks.check_map("depthwise_conv2d", x)
    checks.check_is_tensor("depthwise_conv2d", "weight", weight)
    c, h, w = x.shape[1:]
    if weight.dim() != 4 or weight.shape[:2] != (c, 1) or weight.shape[-1] < 1:
        raise ValueError(
            f"depthwise_conv2d: weight must be (C, 1, K, K) with C = {c}, got {tuple(weight.shape)}"
        )
    k = weight.shape[-1]
    checks.check_tensor("depthwise_conv2d", x, "weight", weight, (c, 1, k, k), "(C, 1, K, K)")
    checks.check_integer("depthwise_conv2d", "stride", stride, 1)
    checks.check_integer("depthwise_conv2d", "dilation", dilation, 1)
    if padding is None:
        padding = conv_padding(k, stride)
    checks.check_integer("depthwise_conv2d", "padding", padding, 0)
    if dilation * (k - 1) >= min(h, w) + 2 * padding:
        raise ValueError(
            f"depthwise_conv2d: a kernel of {k} taps at dilation {dilation} does not fit a "
            f"{h} x {w} map with padding {padding}; raise padding or lower dilation"
        )
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    return _operator((x, weight), options, backend)
