"""Dense convolution, batch norm with known statistics, activation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from emo_kernels.reference.expand import activate


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int,
    dilation: int = 1,
    eps: float = 1e-6,
    act: str = "none",
) -> Tensor:
    """act(BN(W * x + b)); no norm without statistics.

    Args:
        x: (N, C, H, W).
        weight: (O, C, K, K).
        bias, norm_weight, norm_bias, norm_mean, norm_var: (O,).
        stride, padding, dilation: in pixels, the same for rows and columns.

    Returns:
        (N, O, H', W').

    Example:
        >>> import torch
        >>> conv_norm_act(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 3, 3), padding=1).max()
        tensor(27.)
    """
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    if norm_mean is not None:
        y = F.batch_norm(y, norm_mean, norm_var, norm_weight, norm_bias, False, 0.0, eps)
    return activate(y, act)
