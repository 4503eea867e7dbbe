"""Second half of the block: batch norm, SiLU, both skips and the projection."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from emo_kernels.reference.batch_norm import batch_norm_sums
from emo_kernels.reference.expand import normalize
from emo_kernels.reference.gradients import channel_sums, gradients


def shrink(
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    local: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    drop_scale: Tensor | None = None,
) -> Tensor:
    """out = residual + drop_scale[n] W (local + gate[n, m] SiLU(scale[m] y + shift[m])).

    Absent terms drop out; without ``scale`` and ``shift`` the SiLU remains.

    Args:
        y: (N, M, H, W), the depthwise convolution's output.
        weight: (O, M, 1, 1).
        scale, shift: (M,), the batch norm as an affine map.
        local: (N, M, H, W), the expanded map that skips the depthwise convolution.
        residual: (N, O, H, W), the block's input.
        gate: (N, M), squeeze-excite.
        drop_scale: (N,), drop path: 0 or 1 / keep for each sample.

    Returns:
        (N, O, H, W).

    Example:
        >>> import torch
        >>> y = torch.full((1, 1, 1, 1), 20.0)
        >>> shrink(y, torch.ones(1, 1, 1, 1), residual=y).item()
        40.0
    """
    c = F.silu(normalize(y, scale, shift, norm="affine", eps=0.0))
    if gate is not None:
        c = gate[:, :, None, None] * c
    if local is not None:
        c = local + c
    out = F.conv2d(c, weight)
    if drop_scale is not None:
        out = drop_scale[:, None, None, None] * out
    return out if residual is None else residual + out


def shrink_statistics(
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    local: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    drop_scale: Tensor | None,
    pivot: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`shrink`, and ``batch_norm_sums(out, pivot)`` for the batch norm that reads it next."""
    out = shrink(y, weight, scale, shift, local, residual, gate, drop_scale)
    return out, batch_norm_sums(out, pivot)


def shrink_backward(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    local: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    drop_scale: Tensor | None = None,
    affine: Tensor | None = None,
    *,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the eight tensors of :func:`shrink`, those that are needed.

    Args:
        grad: (N, O, H, W).
        affine: (4, M), a training batch norm whose first two rows are scale and shift: dz, the
            gradient at its output, takes the place of y's, and (2, M) sums of dz and of dz yhat,
            in float64, that of scale's; shift has none.
    """
    if affine is None:
        tensors = (y, weight, scale, shift, local, residual, gate, drop_scale)
        return gradients(shrink, tensors, grad, needed)
    z = normalize(y, affine[0], affine[1], norm="affine", eps=0.0)

    def behind_the_norm(z: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
        return shrink(z, weight, None, None, *others)

    wanted = (True, needed[1], *needed[4:])
    inner = (z, weight, local, residual, gate, drop_scale)
    dz, *grads = gradients(behind_the_norm, inner, grad, wanted)
    found = [dz] if needed[0] else []
    found += grads[: needed[1]]
    found += [channel_sums(dz, y, affine)] if needed[2] else []
    return found + grads[needed[1] :]
