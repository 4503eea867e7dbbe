"""The gradient of expansion and depthwise convolution in one pass: its launcher."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.launches import launch


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

    As the reference defines them. e and slope are both given, or both computed again.
    """
    n, c, h, w = x.shape
    m, k, dtype = weight.shape[0], dw_weight.shape[-1], x.dtype
    assert (e is None) == (slope is None) and groups == 1
    trains_norm = affine is not None
    dx = layout.new_map(x, n, c, h, w) if needed[0] else None
    wide = layout.computed_in(dtype)
    dweight = layout.empty((m, c), wide) if needed[1] else None
    dbias = layout.doubles(m) if needed[2] else None
    sums = layout.doubles(2, c) if needed[3] or (needed[4] and not trains_norm) else None
    dfilters = layout.empty((m, 1, k, k), wide) if needed[5] else None
    mean = invstd = None
    if affine is not None:
        norm, (norm_weight, norm_bias, mean, invstd) = "affine", affine
        residual = None
    if x.numel() == 0:
        for empty in (dx, dweight, dbias, sums, dfilters):
            if empty is not None:
                empty.zero_()
    else:
        if coefficients is None:
            y = None
        tensors = [layout.pixels(grad), layout.dense(dw_weight, dtype), layout.dense_map(y)]
        tensors += [layout.dense(coefficients, dtype), layout.dense_map(local_grad)]
        tensors += [layout.dense_map(e), layout.dense_map(slope), layout.pixels(x)]
        vectors = (weight, bias, norm_weight, norm_bias, mean, invstd)
        tensors += [layout.dense(t, dtype) for t in vectors]
        tensors += [layout.dense_map(residual), dx, dweight, dbias, sums, dfilters]
        switches = (layout.NORMS[norm], layout.ACTIVATIONS[act], trains_norm)
        sizes = (n, h, w, c, m, k, stride, padding, dilation, *switches)
        launch(_C.expand_depthwise_backward(layout.DTYPES[dtype], sizes, eps), *tensors)
    grads = [dx, *map(layout.gradient_like, (dweight, dbias), (weight, bias))]
    of_norm = [sums, None]
    if not trains_norm and sums is not None:
        of_norm = [
            layout.gradient_like(sums[1], norm_weight),
            layout.gradient_like(sums[0], norm_bias),
        ]
    return layout.chosen([*grads, *of_norm, layout.gradient_like(dfilters, dw_weight)], needed)
