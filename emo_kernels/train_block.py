"""One call of an accelerated block with gradients, batch statistics or autocast, on kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed

from emo_kernels import backends
from emo_kernels.link import Link
from emo_kernels.ops.irmb_training import Plan, irmb_training, irmb_training_among
from emo_kernels.ops.registration import runs_standard_operators
from emo_kernels.spec import BatchNormMode, IRMBSpec, IRMBWeights
from emo_kernels.structure import BlockReading


def train(
    x: Tensor, weights: IRMBWeights, reading: BlockReading, requested: str | None, link: Link
) -> Tensor | None:
    """What the block computes now, by the kernels of a training step.

    Under autocast the maps have its dtype, and the weights stay as they are: the kernels round
    them as they load.

    Returns:
        (N, O, H', W'), or ``None`` where no backend has the kernels: nothing has happened then.
    """
    if reading.dropout or x.numel() == 0 or runs_standard_operators(x):
        return None
    spec, device, given = reading.spec, x.device.type, x
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    elif any(tensor.dtype != x.dtype for _, tensor in weights.present()):
        return None
    backend = _choose(requested, device, x, weights, spec)
    spans = [process_group(norm) is not None for norm in (reading.norm, reading.bn)]
    if backend is None or (torch.compiler.is_compiling() and any(spans)):
        return None
    weights = _tracked(weights, reading)
    drop_scale = None if reading.drop_path is None else _drop_scale(x, reading.drop_path)
    # Autocast rounds a block's branch, and not the wider map that it is added to.
    adds_residual = spec.skip and x.dtype == given.dtype
    modes = batch_norm_mode(reading.norm), batch_norm_mode(reading.bn)
    plan = Plan(spec, *modes, backend, adds_residual)
    with _no_autocast(device):
        if torch.compiler.is_compiling():
            out = irmb_training(x, weights, plan, drop_scale)
        else:
            known = link.neighbours(x, reading.norm, weights.norm_mean, plan)
            out, sums = irmb_training_among(x, weights, plan, drop_scale, known)
            link.leave_on(out, sums, known)
        return given + out if spec.skip and not adds_residual else out


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _choose(
    requested: str | None, device: str, x: Tensor, weights: IRMBWeights, spec: IRMBSpec
) -> str | None:
    """The backend asked for, if it has the kernels; unasked, the best that has them."""
    operator = "irmb_training"
    names = backends.candidates(operator, device) if requested is None else (requested,)
    for name in names:
        if backends.why_not(name, operator, device, x, weights, spec) is None:
            return name
    return None


def _takes_batch_statistics(norm: Any) -> bool:
    return norm is not None and (norm.training or norm.running_mean is None)


def batch_norm_mode(norm: Any) -> BatchNormMode:
    """How the batch norm runs now; counts the batch, as PyTorch does."""
    if norm is None or not _takes_batch_statistics(norm):
        return BatchNormMode()
    momentum = norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the average of all batches
            momentum = 1.0 / float(norm.num_batches_tracked)
    return BatchNormMode(True, 0.0 if momentum is None else momentum, process_group(norm))


def process_group(norm: Any) -> Any:
    """The processes whose batches are one to this batch norm; ``None``: this one alone."""
    spans = isinstance(norm, torch.nn.SyncBatchNorm) and norm.training
    if not spans or not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _tracked(weights: IRMBWeights, reading: BlockReading) -> IRMBWeights:
    """Without the running statistics that a training batch norm does not keep."""
    for norm, names in ((reading.norm, "norm"), (reading.bn, "bn")):
        if norm is not None and norm.training and not norm.track_running_stats:
            weights = weights._replace(**{f"{names}_mean": None, f"{names}_var": None})
    return weights


def _drop_scale(x: Tensor, drop_path: Any) -> Tensor:
    """(N,): 0, or 1 / keep where the layer scales; drawn as the layer draws it."""
    keep = 1.0 - drop_path.drop_prob
    mask = x.new_empty(x.shape[0]).bernoulli_(keep)
    if keep > 0.0 and getattr(drop_path, "scale_by_keep", True):
        mask.div_(keep)
    return mask
