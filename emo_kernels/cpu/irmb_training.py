"""Which blocks the training kernels make up: the composition itself is ``ops.irmb_training``."""

from __future__ import annotations

from torch import Tensor

from emo_kernels.cpu import layout
from emo_kernels.cpu.depthwise_conv2d import depthwise_conv2d_unsupported
from emo_kernels.spec import IRMBSpec, IRMBWeights, composition_limits


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
