"""Expanding pointwise convolution: act(W norm(x) + b)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    norm: str,
    eps: float,
) -> Tensor:
    """norm(x): ``none``, ``affine`` (x weight[c] + bias[c]) or ``layer`` (over C, per pixel).

    The layer norm is taken on the map seen as (N, H, W, C), so a channels_last map is neither
    copied nor re-laid; the result always has channels_last strides.
    """
    if norm == "none":
        return x
    if norm == "affine":
        if weight is not None:
            x = (x * weight.reshape(-1, 1, 1)).to(x.dtype)
        return x if bias is None else (x + bias.reshape(-1, 1, 1)).to(x.dtype)
    if norm == "layer":
        pixels = x.permute(0, 2, 3, 1)
        return F.layer_norm(pixels, (x.shape[1],), weight, bias, eps).permute(0, 3, 1, 2)
    raise ValueError(f"normalize: norm must be 'none', 'affine' or 'layer', got {norm!r}")


def activate(x: Tensor, act: str) -> Tensor:
    """act(x): ``none``, ``relu``, ``gelu`` (exact, by erf) or ``silu``."""
    if act == "none":
        return x
    if act == "relu":
        return F.relu(x)
    if act == "gelu":
        return F.gelu(x)
    if act == "silu":
        return F.silu(x)
    raise ValueError(f"activate: act must be 'none', 'relu', 'gelu' or 'silu', got {act!r}")


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm: str = "none",
    eps: float = 1e-6,
    act: str = "none",
    groups: int = 1,
) -> Tensor:
    """u = act(W norm(x) + b): steps 2 and 3 of the block without attention.

    Args:
        x: (N, C, H, W).
        weight: (M, C / groups, 1, 1).
        bias: (M,).
        norm_weight, norm_bias: (C,).
        norm: ``none``; ``affine``: x norm_weight[c] + norm_bias[c], a batch norm with known
            statistics; ``layer``: layer norm over C at every pixel.
        eps: of the layer norm.
        act: ``none``, ``relu``, ``gelu``, ``silu``.
        groups: of the 1x1 convolution.

    Returns:
        (N, M, H, W).

    Example:
        >>> import torch
        >>> expand(torch.ones(1, 2, 1, 1), torch.ones(3, 2, 1, 1), act="relu").flatten()
        tensor([2., 2., 2.])
    """
    h = normalize(x, norm_weight, norm_bias, norm=norm, eps=eps)
    return activate(F.conv2d(h, weight, bias, groups=groups), act)
