"""Which blocks the operators' kernels make up; ``emo_kernels.ops`` composes them."""

from __future__ import annotations

import torch
from torch import Tensor

from emo_kernels.spec import IRMBSpec, IRMBWeights, composition_limits
from emo_kernels.triton.expand import expand_unsupported
from emo_kernels.triton.window_attention import window_attention_unsupported


def irmb_unsupported(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> str | None:
    """Why the kernels cannot run this block, in inference or training; ``None`` if they can."""
    if x.dtype is torch.float64:
        return "triton has no float64 kernels"
    limit = composition_limits(weights, spec)
    if limit is not None:
        return limit
    w = weights
    if spec.head_dim:
        over_v = not spec.attn_pre and w.v_weight is not None
        reason = window_attention_unsupported(
            x,
            w.qk_weight,
            w.qk_bias,
            w.v_weight if over_v else None,
            w.v_bias if over_v else None,
            head_dim=spec.head_dim,
            window_size=spec.window_size,
            window_mode=spec.window_mode,
            v_groups=spec.v_groups if over_v else 1,
        )
        if reason is not None:
            return reason
    if w.v_weight is None:
        return None
    return expand_unsupported(x, w.v_weight, w.v_bias, groups=spec.v_groups)


irmb_training_unsupported = irmb_unsupported
