"""Which blocks train with the CUDA kernels: they convolve, Triton's do the rest."""

from __future__ import annotations

from torch import Tensor

from emo_kernels.cuda.depthwise_conv2d import depthwise_conv2d_unsupported
from emo_kernels.spec import IRMBSpec, IRMBWeights, composition_limits


def irmb_training_unsupported(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> str | None:
    """Why the convolution's kernels cannot train this block, or ``None`` if they can."""
    limits = composition_limits(weights, spec)
    if limits is not None:
        return limits
    assert weights.dw_weight is not None
    step = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation}
    return depthwise_conv2d_unsupported(x, weights.dw_weight, **step)
