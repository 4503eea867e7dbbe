"""Expansion and depthwise convolution in one kernel, and the statistics of the result: launchers.

For CUDA tensors; for CPU tensors the same calls take the kernel's walk on the host, as
:mod:`emo_kernels.cuda.depthwise_conv2d` does.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cuda import layout
from emo_kernels.cuda.depthwise_conv2d import depthwise_conv2d_unsupported
from emo_kernels.spec import conv_output_size


def _sizes(
    x: Tensor,
    weight: Tensor,
    dw_weight: Tensor,
    norm: str,
    eps: float,
    act: str,
    stride: int,
    padding: int,
) -> tuple[int, ...]:
    """What the kernel is told besides pointers; eps as the bits of a float."""
    n, c, h, w = x.shape
    bits = int.from_bytes(struct.pack("<f", eps), "little")
    switches = (layout.ACTIVATIONS[act], layout.NORMS[norm], bits)
    return (n, c, weight.shape[0], h, w, dw_weight.shape[-1], stride, padding, *switches)


def expand_depthwise_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dw_weight: Tensor,
    pivot: Tensor | None = None,
    *,
    norm: str,
    eps: float,
    act: str,
    groups: int,
    stride: int,
    padding: int,
    dilation: int,
) -> str | None:
    """Why the kernel cannot run the call, or ``None`` if it can; ``pivot`` is that of the sums."""
    step = {"stride": stride, "padding": padding, "dilation": dilation}
    reason = depthwise_conv2d_unsupported(x, dw_weight, **step)
    if reason is not None:
        return reason
    m, k = dw_weight.shape[0], dw_weight.shape[-1]
    limits = {
        "a convolution of 3 or 5 taps": (k in (3, 5), k),
        "a stride of 1 or 2": (stride in (1, 2), stride),
        "no dilation": (dilation == 1, dilation),
        "an even number of expanded channels": (m % 2 == 0, m),
        "one group": (groups == 1, groups),
    }
    for limit, (kept, got) in limits.items():
        if not kept:
            return f"expand and depthwise convolution in one kernel take {limit}, got {got}"
    sizes = _sizes(x, weight, dw_weight, norm, eps, act, stride, padding)
    shared_bytes = _C.cuda_expand_depthwise_shared_bytes
    if 0 not in (x.numel(), m) and shared_bytes(layout.DTYPES[x.dtype], sizes) == 0:
        return f"{x.shape[1]} channels of {x.dtype} do not fit into shared memory"
    return None


def _forward(
    tensors: tuple[Any, ...],
    sums: Tensor | None = None,
    *,
    norm: str,
    eps: float,
    act: str,
    groups: int,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """y; into what is given of its sums, those.

    Args:
        tensors: x, weight, bias, norm_weight, norm_bias, dw_weight, pivot.
    """
    assert groups == dilation == 1
    x, weight, bias, norm_weight, norm_bias, dw_weight, pivot = tensors
    n, _, h, w = x.shape
    m, k = weight.shape[0], dw_weight.shape[-1]
    y = layout.new_map(x, n, m, *(conv_output_size(s, k, stride, padding, 1) for s in (h, w)))
    if y.numel() == 0:
        if sums is not None:
            sums.zero_()
        return y
    sizes = _sizes(x, weight, dw_weight, norm, eps, act, stride, padding)
    x = layout.pixels(x)
    vectors = (norm_weight, norm_bias, weight, bias, dw_weight, pivot)
    rows = [None if vector is None else vector.contiguous() for vector in vectors]
    pointers = (
        layout.address(x),
        *(layout.vector(row) for row in rows),
        layout.address(y),
        layout.address(sums),
    )
    layout.run(
        _C.cuda_expand_depthwise_scratch,
        _C.cuda_expand_depthwise,
        _C.cuda_expand_depthwise_walk,
        x,
        pointers,
        sizes,
    )
    return y


def expand_depthwise(*tensors: Any, **options: Any) -> Tensor:
    """The convolution of act(W norm(x) + b), as the reference defines it, within the limits."""
    return _forward((*tensors, None), **options)


def expand_depthwise_statistics(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`expand_depthwise` and, from the same pass, its (2, M) float64 sums about the pivot."""
    x, weight = tensors[:2]
    sums = torch.empty((2, weight.shape[0]), dtype=torch.float64, device=x.device)
    return _forward(tensors, sums, **options), sums
