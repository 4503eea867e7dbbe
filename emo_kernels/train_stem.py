"""One call of an accelerated stem with gradients, batch statistics or autocast, on kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_kernels import backends
from emo_kernels.ops.conv_norm_act_training import StemPlan, conv_norm_act_training
from emo_kernels.train_block import batch_norm_mode


def train_stem(
    x: Tensor, tensors: tuple[Any, ...], norm: Any, spec: dict[str, Any], requested: str | None
) -> Tensor | None:
    """What the stem computes now, by the kernels of a training step.

    Under autocast the maps have its dtype, and the weights stay as they are.

    Args:
        x: (N, C, H, W).
        tensors: weight, bias and the norm's four.
        norm: the batch norm itself.
        spec: what ``ops.conv_norm_act`` takes.
        requested: the backend asked for.

    Returns:
        (N, O, H', W'), or ``None`` where no backend has the kernels: nothing has happened then.
    """
    device = x.device.type
    if x.numel() == 0 or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    elif any(t is not None and t.dtype != x.dtype for t in tensors):
        return None
    backend = _choose(requested, x, *tensors, **spec)
    if backend is None:
        return None
    if norm.training and not norm.track_running_stats:
        tensors = (*tensors[:4], None, None)
    plan = StemPlan(**spec, norm=batch_norm_mode(norm), backend=backend)
    with torch.autocast(device, enabled=False):
        return conv_norm_act_training(x, *tensors, plan=plan)


def _choose(requested: str | None, x: Tensor, *args: Any, **options: Any) -> str | None:
    """The backend asked for, if it has the kernels; unasked, the best that has them."""
    operator, device = "conv_norm_act_training", x.device.type
    names = backends.candidates(operator, device) if requested is None else (requested,)
    for name in names:
        if backends.why_not(name, operator, device, x, *args, **options) is None:
            return name
    return None
