"""Layer norm over channels, mean over pixels, linear head."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def norm_pool_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """W mean(LN(x)) + b.

    Args:
        x: (N, C, H, W).
        weight: (O, C).
        bias: (O,).
        norm_weight, norm_bias: (C,).

    Returns:
        (N, O).

    Example:
        >>> import torch
        >>> norm_pool_linear(torch.eye(2)[None, :, :, None], torch.eye(2)).abs().max() < 1e-6
        tensor(True)
    """
    y = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], norm_weight, norm_bias, eps)
    return F.linear(y.mean((1, 2)), weight, bias)
