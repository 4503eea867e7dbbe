"""Which blocks the training kernels make up: the composition itself is ``ops.irmb_training``."""

from __future__ import annotations

import torch
from torch import Tensor

from emo_kernels.cpu import layout
from emo_kernels.cpu.depthwise_conv2d import depthwise_conv2d_unsupported
from emo_kernels.spec import IRMBSpec, IRMBWeights, composition_limits

_CHANNELS_OF_A_KEPT_SLOPE = 64


def irmb_training_unsupported(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> str | None:
    """Why the kernels cannot train this block, or ``None`` if they can."""
    limits = composition_limits(weights, spec) or layout.wrong_dtype(x)
    if limits is not None:
        return limits
    if spec.v_groups != 1 and weights.v_weight is not None:
        return f"the cpu kernels have no grouped expansion, got v_groups = {spec.v_groups}"
    assert weights.dw_weight is not None
    return depthwise_conv2d_unsupported(x, weights.dw_weight)


def keeps_local_gradient() -> bool:
    """Whether the gradient of the local skip is kept as a map: sooner here than its product again.

    A namespace without this function has it recomputed by the expansion's gradient.
    """
    return True


def keeps_slope(x: Tensor) -> bool:
    """Whether the slope of the expansion's activation is kept, a map of the expanded width.

    A product of as many terms as x has channels is saved for it. Written and read, the map costs
    as much time as a product of some 40 terms; memory sets the bound: a step of EMO-5M (batch 8)
    takes 0.49 of the memory of eager PyTorch from 80 channels on, 0.52 from 64, 0.59 from 40, and
    1.7 and 3.4 % less time on one thread of 2 Zen 4 vCPUs. In bfloat16 products cost less, and the
    slope would be rounded.

    A namespace without this function has it recomputed.
    """
    return x.dtype is not torch.bfloat16 and x.shape[1] >= _CHANNELS_OF_A_KEPT_SLOPE
