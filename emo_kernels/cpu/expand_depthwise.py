"""Expansion and depthwise convolution in one pass, and their gradient: launchers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.expand import expand_unsupported
from emo_kernels.cpu.irmb_training import keeps_slope
from emo_kernels.cpu.launches import launch
from emo_kernels.spec import conv_output_size


def expand_depthwise_unsupported(
    x: Tensor, weight: Tensor, *_: Tensor | None, groups: int, **__: Any
) -> str | None:
    """Why a training step should not leave out the map between, or ``None`` if it should."""
    if keeps_slope(x):
        return "the expanded map and its slope are sooner read than computed again, and are kept"
    return expand_unsupported(x, weight, groups=groups)


def _forward(
    tensors: tuple[Any, ...],
    sums: Tensor | None = None,
    kept: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    norm: str,
    eps: float,
    act: str,
    groups: int,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """y; into what is given of its sums, e and the slope, those.

    Args:
        tensors: x, weight, bias, norm_weight, norm_bias, dw_weight, pivot.
    """
    assert groups == 1
    x, weight, *_, dw_weight, _pivot = tensors
    n, c, h, w = x.shape
    m, k, dtype = weight.shape[0], dw_weight.shape[-1], x.dtype
    step = (k, stride, padding, dilation)
    y = layout.new_map(x, n, m, conv_output_size(h, *step), conv_output_size(w, *step))
    if y.numel() == 0:
        if sums is not None:
            sums.zero_()
        return y
    dense = [layout.pixels(x), *[layout.dense(t, dtype) for t in tensors[1:]]]
    sizes = (n, h, w, c, m, *step, layout.NORMS[norm], layout.ACTIVATIONS[act])
    launch(_C.expand_depthwise(layout.DTYPES[dtype], sizes, eps), *dense, *kept, y, sums)
    return y


def expand_depthwise(*tensors: Any, **options: Any) -> Tensor:
    """The convolution of act(W norm(x) + b), as the reference defines it: (N, M, H', W')."""
    return _forward((*tensors, None), **options)


def expand_depthwise_statistics(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`expand_depthwise` and, from the same pass, its (2, M) sums around the last tensor."""
    sums = layout.doubles(2, tensors[1].shape[0])
    return _forward(tensors, sums, **options), sums


def expand_depthwise_with_maps(
    *tensors: Any, statistics: bool, slope: bool, **options: Any
) -> list[Tensor]:
    """y, its sums if asked for, e, and its slope if asked for, from one pass."""
    x, m = tensors[0], tensors[1].shape[0]
    n, _, h, w = x.shape
    sums = layout.doubles(2, m) if statistics else None
    e = layout.new_map(x, n, m, h, w)
    kept = (e, layout.new_map(x, n, m, h, w) if slope else None)
    y = _forward(tensors, sums, kept, **options)
    return [t for t in (y, sums, *kept) if t is not None]


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
