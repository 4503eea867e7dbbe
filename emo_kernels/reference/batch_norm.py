"""Batch norm of a training step, in the pieces between which sums may cross processes.

norm(x) = scale x + shift with scale = weight / sqrt(var + eps), shift = bias - mean scale, and
mean, var over the n pixels of the batch (Ioffe & Szegedy, 2015). Its gradient, with
xhat = (x - mean) / sqrt(var + eps):

    dx = scale (dz - sum(dz) / n - xhat sum(dz xhat) / n)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from emo_kernels.reference.gradients import channel_sums, gradients
from emo_kernels.spec import activate


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Batch norm of x by mean and variance, the batch's where they are ``None``, and its affine."""
    # torch 2.13's backward on channels_last maps reads past vectors that are strided.
    vectors = (t if t is None else t.contiguous() for t in (mean, var, weight, bias))
    mean, var, weight, bias = vectors
    return F.batch_norm(x, mean, var, weight, bias, training=mean is None, eps=eps)


def batch_norm_sums(x: Tensor, pivot: Tensor | None) -> Tensor:
    """Sums over the pixels of each channel: of x - pivot and of its square.

    Args:
        x: (N, C, H, W).
        pivot: (C,), near the mean, so that nothing cancels; ``None``: 0.

    Returns:
        (2, C), float64.

    Example:
        >>> batch_norm_sums(torch.full((1, 1, 2, 2), 3.0), torch.tensor([1.0])).flatten().tolist()
        [8.0, 16.0]
    """
    shifted = x.double() if pivot is None else x.double() - pivot.double().reshape(-1, 1, 1)
    return torch.stack([shifted.sum((0, 2, 3)), shifted.square().sum((0, 2, 3))])


def batch_norm_finalize(
    sums: Tensor,
    count: float,
    global_count: Tensor | None,
    pivot: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """From sums to the norm's affine map; running statistics move in place, as PyTorch's.

    Args:
        sums: (2, C) of :func:`batch_norm_sums`, perhaps added up over processes.
        count: pixels behind the sums.
        global_count: (1,), the count where it is known on the device alone.
        pivot: (C,), as given to the sums.
        weight, bias: (C,).
        running_mean, running_var: (C,), moved by ``momentum`` towards mean and unbiased variance.
        dtype: of the result.

    Returns:
        (4, C): scale, shift, mean and 1 / sqrt(var + eps).

    Example:
        >>> sums = torch.tensor([[4.0], [8.0]], dtype=torch.float64)
        >>> none = (None,) * 6
        >>> batch_norm_finalize(sums, 4, *none, 0.1, 0.0, torch.float32).flatten().tolist()
        [1.0, -1.0, 1.0, 1.0]
    """
    n = count if global_count is None else global_count.double()
    mean = sums[0] / n
    var = (sums[1] / n - mean * mean).clamp_min(0.0)
    if pivot is not None:
        mean = mean + pivot.double()
    for running, new in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
        if running is not None:
            running.copy_((1.0 - momentum) * running.double() + momentum * new)
    invstd = torch.rsqrt(var + eps)
    scale = invstd if weight is None else invstd * weight.double()
    shift = -mean * scale if bias is None else bias.double() - mean * scale
    return torch.stack([scale, shift, mean, invstd]).to(dtype)


def batch_norm_backward_finalize(
    sums: Tensor,
    affine: Tensor,
    count: float,
    global_count: Tensor | None,
    batch_statistics: bool,
) -> Tensor:
    """From the sums of a backward pass to dx = c1 dz + c2 (x - mean) + c3.

    Args:
        sums: (2, C), float64: sum dz (the gradient of bias) and sum dz xhat (of weight).
        affine: (4, C) of :func:`batch_norm_finalize`.
        count, global_count: as there.
        batch_statistics: whether mean and variance were the batch's; else c2 = c3 = 0.

    Returns:
        (4, C): c1, c2, c3 and mean, in the dtype of ``affine``.

    Example:
        >>> sums, affine = torch.ones(2, 1, dtype=torch.float64), torch.ones(4, 1)
        >>> batch_norm_backward_finalize(sums, affine, 4, None, True).flatten().tolist()
        [1.0, -0.25, -0.25, 1.0]
    """
    scale, _, mean, invstd = affine.double()
    if batch_statistics:
        n = count if global_count is None else global_count.double()
        c2, c3 = -scale * invstd * sums[1] / n, -scale * sums[0] / n
    else:
        c2 = c3 = torch.zeros_like(scale)
    return torch.stack([scale, c2, c3, mean]).to(affine.dtype)


def batch_norm_backward(
    grad: Tensor, x: Tensor, coefficients: Tensor, residual: Tensor | None
) -> Tensor:
    """dx = c1 grad + c2 (x - mean) + c3 + residual.

    Args:
        grad, x, residual: (N, C, H, W).
        coefficients: (4, C) of :func:`batch_norm_backward_finalize`.

    Returns:
        (N, C, H, W).

    Example:
        >>> x = torch.ones(1, 1, 1, 1)
        >>> batch_norm_backward(x, x, torch.tensor([[2.0], [0.0], [1.0], [0.0]]), None).item()
        3.0
    """
    c1, c2, c3, mean = coefficients.reshape(4, -1, 1, 1)
    dx = c1 * grad + c2 * (x - mean) + c3
    return (dx if residual is None else dx + residual).to(x.dtype)


def batch_norm_activate(x: Tensor, norm: Tensor, *, act: str) -> Tensor:
    """act(scale (x - mean) + bias): no shift that cancels a large mean.

    Args:
        x: (N, C, H, W).
        norm: (4, C): scale, bias, mean and 1 / sqrt(var + eps).
        act: ``none``, ``relu``, ``gelu`` or ``silu``.

    Returns:
        (N, C, H, W).

    Example:
        >>> batch_norm_activate(torch.ones(1, 1, 1, 1), torch.ones(4, 1), act="relu").item()
        1.0
    """
    scale, bias, mean = norm[:3].reshape(3, -1, 1, 1)
    return activate(scale * (x - mean) + bias, act).to(x.dtype)


def batch_norm_activate_grad(grad: Tensor, x: Tensor, norm: Tensor, act: str) -> Tensor:
    """dz = grad act'(scale (x - mean) + bias): (N, C, H, W)."""
    scale, bias, mean = norm[:3].reshape(3, -1, 1, 1)
    (dz,) = gradients(lambda z: activate(z, act), [scale * (x - mean) + bias], grad, [True])
    return dz


def batch_norm_activate_sums(grad: Tensor, x: Tensor, norm: Tensor, *, act: str) -> Tensor:
    """What :func:`batch_norm_backward_finalize` takes of :func:`batch_norm_activate`'s gradient.

    Args:
        grad: (N, C, H, W), behind the activation.
        x, norm, act: as there.

    Returns:
        (2, C), float64: sum dz and sum dz xhat.

    Example:
        >>> x = torch.ones(1, 1, 1, 2)
        >>> batch_norm_activate_sums(x, 3 * x, torch.ones(4, 1), act="none").flatten().tolist()
        [2.0, 4.0]
    """
    return channel_sums(batch_norm_activate_grad(grad, x, norm, act), x, norm)
